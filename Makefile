# make demo    set up .venv, train on the phantom for two minutes, segment a real fundus photograph
# make test    set up .venv if need be and pass the tests in JOBS=2 processes; ARGS="-m slow" goes
#              to pytest
# make check   ruff, mypy and the tests: what .ci/run does
# make bench   the benchmarks
# make setup   only the set-up; make lint, make types, make format, make clean
#
# PYTHON=, VENV= and TORCH_INDEX= steer the set-up: see CONTRIBUTING.md.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
PY := $(VENV)/bin/python
STAMP := $(VENV)/.lamina-setup
DEMO := runs/demo
ARGS ?=
JOBS ?= 2
PYTEST := -m pytest -n $(JOBS) --dist loadgroup

# Real images for tests and benchmarks: a data folder beside the checkout, one level further at most.
ifndef LAMINA_DATA
REAL_DATA := $(firstword $(foreach folder,$(wildcard ../data) $(sort $(wildcard ../*/data)),\
	$(if $(and $(wildcard $(folder)/README.md),$(wildcard $(folder)/fundus)),$(folder))))
ifneq ($(REAL_DATA),)
export LAMINA_DATA := $(CURDIR)/$(REAL_DATA)
endif
endif

.PHONY: demo test check bench setup lint format types clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt .ci/setup
	PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" bash .ci/setup
	@touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(PY) -m pipeline train fundus_vessels quick --output_dir $(DEMO)/train
	$(PY) -m pipeline data sample fundus -o $(DEMO)/input
	$(PY) -m pipeline predict fundus_vessels -i $(DEMO)/input -o $(DEMO)/predict
	@test -s $(DEMO)/train/report.html && test -s $(DEMO)/predict/report.html
	@echo
	@echo "The vessels found in the photograph, drawn over it:"
	@ls $(DEMO)/predict/pictures/*.png
	@echo "Open in a browser: $(DEMO)/predict/report.html (this photograph)"
	@echo "                   $(DEMO)/train/report.html (the training on the phantom)"

test: $(STAMP)
	$(PY) $(PYTEST) $(ARGS)

check: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict pipeline
	$(PY) $(PYTEST) $(ARGS)

bench: $(STAMP)
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do \
		echo "== $$script"; $(PY) $$script; done

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(STAMP)
	$(PY) -m mypy --strict pipeline

# Leaves .venv and runs/ alone: one is slow to make again, the other is somebody's work.
clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
