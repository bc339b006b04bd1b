# fastmed: `make demo` shows it, `make test` proves it, `make test-all` to the last. They need only python3 (3.10 or later) with pip; a second run skips the installation.
SHELL    := /bin/bash
PYTHON   ?= python3
VENV     ?= .venv
BIN       = $(VENV)/bin
TEST_JOBS ?= 2
TESTS    ?=
# What runs, by pytest's markers; whatever is named in TESTS runs, marked or not.
MARK     ?= $(if $(TESTS),,not slow)
# What is installed follows the content of these three (nbdev-export touches pyproject.toml without changing it).
SUM      := $(shell cat pyproject.toml settings.ini setup.py | cksum | cut -d' ' -f1)
DEV       = $(VENV)/.fastmed-dev-$(SUM)
DEMO      = $(VENV)/.fastmed-demo-$(SUM)

export PYTHONWARNINGS := ignore
export MPLBACKEND     := agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-all test-slow lint env docs dist clean
help:
	@echo "make demo      install, train 2D and 3D on the embedded cohort, write demo/report.html and demo/overlay.png"
	@echo "make test      install, then run the tests and notebooks that are not marked slow (two at a time, one thread each; TEST_JOBS=1 runs them in a row)"
	@echo "make test-all  run every test and every notebook; make test-slow those that make test leaves out"
	@echo "make lint      the layout of the code: ruff, and tests/layout.py for what ruff does not see"
	@echo "make docs      README.md from nbs/index.ipynb"
	@echo "make dist      wheel and sdist into dist/, checked by twine"
	@echo "make clean     remove what was built (the environment $(VENV) stays)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v=sys.version_info; sys.exit(0 if v>=(3,10) else f"fastmed needs Python 3.10 or later, and $(PYTHON) is {v.major}.{v.minor}; say which with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# The development installation holds the demo's too, so `make demo` after `make test` installs nothing.
$(DEV): | $(BIN)/python
	@echo "installing fastmed with its tests into $(VENV) (some minutes the first time)"
	$(BIN)/python -m pip install -q -e '.[dev,demo,track,dicom]'
	@rm -f $(VENV)/.fastmed-*; touch $(DEV) $(DEMO)

$(DEMO): | $(BIN)/python
	@echo "installing fastmed with its demo into $(VENV) (some minutes the first time)"
	$(BIN)/python -m pip install -q -e '.[demo]'
	@rm -f $(VENV)/.fastmed-*; touch $(DEMO)

demo: $(DEMO)
	$(BIN)/fastmed demo --overwrite

env: $(DEV)

test: env
ifeq ($(TEST_JOBS),1)
	$(BIN)/python -m pytest -m "$(MARK)" $(TESTS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal -m "$(MARK)" $(TESTS)
endif

test-all:
	@$(MAKE) --no-print-directory test MARK=

test-slow:
	@$(MAKE) --no-print-directory test MARK=slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/python tests/layout.py

docs: env
	$(BIN)/python .ci/readme.py

dist: env
	$(BIN)/python -m pip install -q build twine
	rm -rf build dist
	$(BIN)/python -m build -q
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf build dist demo _proc _docs site *.egg-info .pytest_cache .hypothesis
	find fastmed nbs tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
