# Two commands do everything on a fresh machine: `make train` and `make test`.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: install train test test-fast lint format docs

install: $(VENV)/installed

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "This project needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	@echo "Installing JAX, TensorFlow and what belongs to them: a few minutes, the first time only."
	$(RUN) -m pip install --quiet --editable '.[dev]'
	@touch $@

train: install
	$(RUN) -m perceiver_ar_jax.main --config=configs/photos32.py --workdir=runs/photos32

# By file, since tests of a file share expensive fixtures; conftest.py sorts the files.
PYTEST = $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m 'not slow'

lint: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports
	$(RUN) .ci/check.py
	$(RUN) .ci/path.py
	$(VENV)/bin/shellcheck benchmarks/*.sh launch/*.sh launch/*.sbatch

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

docs: install
	$(RUN) -m pip install --quiet --editable '.[docs]'
	$(RUN) -m mkdocs build --strict
