# One command for each job; the first one that runs makes the virtual environment, later ones reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find native -type f 2>/dev/null)

.PHONY: demo test check bench soak clean

demo: $(VENV)/.ready
	$(BIN)/ckptengine demo

test: $(VENV)/.ready
	$(BIN)/python -m tests.run

check: $(VENV)/.ready
	$(BIN)/python -m pytest tests/checks

bench: $(VENV)/.ready
	$(BIN)/ckptengine bench

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build
