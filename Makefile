# make demo   environment, then build + verify + run + bench of the example model, for both targets
# make test   environment, then lint, types and every test
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
ENGINES := engines
PROMPT := 'def binary_search(items, target):'
MODEL := examples/stdlib-llama

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: demo test clean
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
	@echo
	@echo "Built from $(MODEL) for two targets, verified against the eager model, run and measured."
	@echo "The engines are in $(CURDIR)/$(ENGINES)"
	@echo "Try: $(BIN)/enginesmith run $(ENGINES)/stdlib-llama-tvm --chat"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

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
	$(call install,-e '.[build$(,)onnxruntime$(,)tvm]')

# setuptools: tests/test_wheel.py builds the wheel without a second environment.
$(VENV)/.test: pyproject.toml
	$(call install,'setuptools>=77' -e '.[build$(,)onnxruntime$(,)tvm$(,)genai$(,)test$(,)lint]')

, := ,
