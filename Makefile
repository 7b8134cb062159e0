# Every target that needs .venv brings it up to date by itself, and does nothing when it already is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The DALI build, cuda12 or cuda13. Left out, it is the one that .venv already has.
DALI ?= $(or $(patsubst $(VENV)/dali-%,%,$(wildcard $(VENV)/dali-*)),cuda12)
ifeq ($(filter $(DALI),cuda12 cuda13),)
$(error DALI is cuda12 or cuda13, not "$(DALI)")
endif

PIP_INSTALL := $(BIN)/python -m pip install -qq --no-input --disable-pip-version-check
# Wheels only: what building another file takes would be neither pinned nor checked.
PIP_INSTALL_HASHED := $(PIP_INSTALL) --require-hashes --only-binary :all:

.PHONY: help setup demo test lint stress bench-gpu clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(VENV)/installed  ## build .venv (DALI=cuda13 for the CUDA 13 build, PYTHON=... for another Python)
	@echo "$(VENV) is ready: make demo, or $(BIN)/synco-fast --help"

demo: $(VENV)/installed  ## pretrain on generated JPEGs and write runs/demo/report.html
	$(BIN)/synco-fast demo

test: $(VENV)/installed  ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=loadfile --durations=10

lint: $(VENV)/installed  ## check style, formatting, types and pins
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy synco_fast bench
	$(BIN)/python -m tests.audit

stress: $(VENV)/installed  ## run the long reliability counts; an interrupted run resumes
	$(BIN)/python -m tests.stress

# Neither .venv nor network is needed: PYTHON if it is given, or else .venv's if it is there, or else python3.
bench-gpu:  ## build, test and time everything on this GPU in 9 minutes (DRY_RUN=1 rehearses on the CPU)
	@PYTHON='$(if $(filter file,$(origin PYTHON)),$(firstword $(wildcard $(BIN)/python) $(PYTHON)),$(PYTHON))' bench/gpu.sh

clean:  ## remove build products, compiled kernels too, and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info synco_fast/_*.so $(VENV)/installed .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o -name __pycache__ -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV)/dali-* $(VENV)

# A .venv without this mark is half built, somebody else's, or holds the other DALI build, whose wheel owns the
# same files: start anew.
$(VENV)/dali-$(DALI):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "synco-fast needs Python 3.10 or later, and $(PYTHON) is not; name one: make setup PYTHON=python3.12" >&2; \
	  exit 1; }
	@rm -f $(VENV)/dali-*
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

KERNELS := $(wildcard kernels/*.cpp kernels/*/*.cpp kernels/*/*.h kernels/*/*/*.h kernels/*/*.cu)

$(VENV)/installed: setup.py pyproject.toml constraints.txt $(VENV)/dali-$(DALI) $(KERNELS)
	@echo "Installing the pinned dependencies (several GB and some minutes the first time, silent until done)"
	@# The pip that comes with Python takes no hashes from -c. Python 3.10 reads pyproject.toml by tomli.
	sed -nE '/^(pip|tomli)==/,/[^\\]$$/p' constraints.txt | $(PIP_INSTALL_HASHED) -r /dev/stdin
	@# Before the package, whose libraries are compiled against them, and which is a folder and so has no hash.
	$(BIN)/python -m tests.requirements $(DALI) dev >$(VENV)/requirements.txt
	$(PIP_INSTALL_HASHED) -c constraints.txt -r $(VENV)/requirements.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@$(BIN)/synco-fast doctor | sed -n '/^backends/,/^$$/p; /^augmentation/,/^$$/p'  # pip does not show what was built
	@touch $@
