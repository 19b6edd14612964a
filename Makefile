# One command for each job.  The first one that runs makes the virtual environment, installs the package with its
# native part and what the tests need; later ones start at once.  PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(shell find native/src native/bindings -type f) native/CMakeLists.txt CMakeLists.txt

.PHONY: demo test check bench soak clean

demo: $(VENV)/.ready
	$(BIN)/ckptengine demo

test: $(VENV)/.ready
	$(BIN)/python -m tests.run

check: $(VENV)/.ready
	$(BIN)/python -m tests.run tests/checks

bench: $(VENV)/.ready
	$(BIN)/ckptengine bench

soak: $(VENV)/.ready
	$(BIN)/python -m bench.soak kills --kills 50

$(VENV)/.ready: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt torch==2.13.0 -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build
