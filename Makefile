# make demo   environment, then build + verify + run + bench of the example model
# make test   environment, then lint, types and every test
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
ENGINE := engines/stdlib-llama-int4
MODEL := examples/stdlib-llama

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: demo test clean
.NOTPARALLEL:

demo: $(VENV)/.demo
	mkdir -p $(dir $(ENGINE))
	$(BIN)/enginesmith build $(MODEL) --target onnxruntime --recipe int4-rtn --out $(ENGINE) --force
	$(BIN)/enginesmith verify $(ENGINE) --against $(MODEL)
	$(BIN)/enginesmith run $(ENGINE) --prompt 'def binary_search(items, target):' --max-new-tokens 48
	$(BIN)/enginesmith bench $(ENGINE)
	@echo
	@echo "Built from $(MODEL), verified against the eager model, run and measured. The engine is in $(CURDIR)/$(ENGINE)"
	@echo "Try: $(BIN)/enginesmith run $(ENGINE) --chat"

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
