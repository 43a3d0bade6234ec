# make demo   export, compile, verify and run the bundled model
# make test   the test suite that every change must pass
# Both set themselves up in .venv: only Python >= 3.10, g++ >= 11 and make are needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TINY := examples/tiny-qwen3

.PHONY: demo test test-full lint format clean
.DEFAULT_GOAL := demo

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $(PYTHON) is older than Python 3.10; name another with make PYTHON=..."; exit 2; }
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready
	@echo "--- export: the checkpoint as an ONNX graph whose weights stay where they are"
	$(BIN)/python -m frontend.export $(TINY) -o build/model.onnx --check
	@echo "--- build: passes, C++ and compiler"
	$(BIN)/python -m codegen build --target cpu --onnx build/model.onnx -o build/cpu
	@echo "--- verify: the engine against onnxruntime"
	$(BIN)/python -m codegen verify build/cpu
	@echo "--- generate"
	$(BIN)/python -m runtime.generate $(TINY) --build build/cpu --chat --prompt "123+456="
	$(BIN)/python -m runtime.generate $(TINY) --build build/cpu --chat --prompt "reverse: stone"
	$(BIN)/python -m runtime.generate $(TINY) --build build/cpu --chat --prompt "你好"

# In two processes: tests/infinicpu loads a build of the embedded library of its own.
test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "not slow" --durations=5 tests/infinicpu
	$(BIN)/python -m pytest -q -m "not slow" --durations=10 --ignore tests/infinicpu

# What takes longer or needs more: real size, long sanitizer runs, comparison with PyTorch. torch is taken from where pip finds it.
test-full: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,train]'
	$(BIN)/python -m pytest -q --durations=10 tests/infinicpu
	$(BIN)/python -m pytest -q --durations=20 --ignore tests/infinicpu

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build $(VENV)
