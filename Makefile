# make demo   environment, then build + verify + run + bench of the example model on this CPU, and builds for NVIDIA GPUs
# make test   environment, then lint, types and every test
#
# On a machine with an NVIDIA GPU, in its own Python (GPU_PYTHON) with torch, transformers, onnx and onnxruntime:
# make test-gpu   whether engines run there, then parity of fp16, fp8 and int4 engines, a classifier, decoding
# make bench-gpu  the moderation case, then decoding beside torch
# Where that machine has no network, run `make gpu-pack` on one that has, carry build/gpu-pack/1 and then
# build/gpu-pack/2 over, and both targets unpack TensorRT-RTX from there.
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
ENGINES := engines
PROMPT := 'def binary_search(items, target):'
MODEL := examples/stdlib-llama

GPU_PYTHON ?= python3
GPU_PACK := build/gpu-pack
GPU_SITE := build/gpu-site
GPU_WORK := build/gpu-work
# Packages that are carried come first, then the repository itself.
GPU_RUN = PYTHONPATH=$(CURDIR)/$(GPU_SITE):$(CURDIR) $(GPU_PYTHON)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: demo test clean gpu-pack gpu-unpack test-gpu bench-gpu bench-gpu-moderation bench-gpu-decode
.NOTPARALLEL:

demo: $(VENV)/.demo
	mkdir -p $(ENGINES)
	for target in onnxruntime tvm; do \
	  $(BIN)/enginesmith build $(MODEL) --target $$target --recipe int4-rtn --out $(ENGINES)/stdlib-llama-$$target --force \
	  && $(BIN)/enginesmith run $(ENGINES)/stdlib-llama-$$target --prompt $(PROMPT) --max-new-tokens 48 \
	  && $(BIN)/enginesmith bench $(ENGINES)/stdlib-llama-$$target || exit $$?; \
	done
	$(BIN)/enginesmith verify $(ENGINES)/stdlib-llama-tvm --against $(MODEL)
	$(BIN)/enginesmith compare $(ENGINES)/stdlib-llama-onnxruntime $(ENGINES)/stdlib-llama-tvm --against $(MODEL)
	$(BIN)/enginesmith build $(MODEL) --target tensorrt --recipe int4-rtn --device sm89 --out $(ENGINES)/stdlib-llama-sm89 --force
	$(BIN)/enginesmith build $(MODEL) --target tensorrt-llm --recipe fp8-channel --out $(ENGINES)/stdlib-llama-fp8 --force
	@echo
	@echo "Built from $(MODEL) for four targets, verified against the eager model; run and measured for this CPU's."
	@echo "The engines are in $(CURDIR)/$(ENGINES)"
	@echo "Try: $(BIN)/enginesmith run $(ENGINES)/stdlib-llama-tvm --chat"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

gpu-pack:
	$(PYTHON) -m tests.gpu.pack $(GPU_PACK)

# Nothing to do where the packages are installed, or unpacked before.
gpu-unpack:
	test ! -e $(GPU_PACK) || $(GPU_PYTHON) -m tests.gpu.unpack $(GPU_PACK) $(GPU_SITE)

test-gpu: gpu-unpack
	ENGINESMITH_REQUIRE_GPU=1 $(GPU_RUN) -m pytest tests/gpu -m gpu -rA -p no:cacheprovider

bench-gpu: bench-gpu-moderation bench-gpu-decode

# Each makes its checkpoint and engines from a seed, and removes them: tens of gigabytes.
bench-gpu-moderation: gpu-unpack
	$(GPU_RUN) -m tests.benchmarks.gpu_moderation --work $(GPU_WORK); status=$$?; rm -rf $(GPU_WORK); exit $$status

bench-gpu-decode: gpu-unpack
	$(GPU_RUN) -m tests.benchmarks.gpu_decode --work $(GPU_WORK); status=$$?; rm -rf $(GPU_WORK); exit $$status

clean:
	rm -rf $(VENV) engines build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# $(call install,WHAT): an interrupted installation leaves .incomplete behind and the environment is made anew.
# Byte-compiling every module of every package would take longer than the demo itself.
define install
	$(BIN)/python -m pip --version >/dev/null 2>&1 && test ! -e $(VENV)/.incomplete \
	  || $(PYTHON) -m venv --clear $(VENV)
	touch $(VENV)/.incomplete
	$(BIN)/python -m pip install --quiet --progress-bar off --prefer-binary --no-compile $(1)
	rm $(VENV)/.incomplete
	touch $@
endef

$(VENV)/.demo: pyproject.toml
	$(call install,-e '.[build$(,)onnxruntime$(,)tvm$(,)tensorrt-rtx]')

# setuptools: tests/test_wheel.py builds the wheel without a second environment.
$(VENV)/.test: pyproject.toml
	$(call install,'setuptools>=77' -e '.[build$(,)onnxruntime$(,)tvm$(,)tensorrt-rtx$(,)genai$(,)test$(,)lint]')

, := ,
