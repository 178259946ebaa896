# The two main targets are `make demo` and `make test`. Both create a virtual environment first.
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
OUTPUT ?= runs/demo

.PHONY: demo test check lint docs bench fuzz mutants dist clean

$(VENV)/.user: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[faces,onnx]"
	touch $@

$(VENV)/.dev: $(VENV)/.user
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[faces,onnx,trainers,docs,dev]"
	touch $@

demo: $(VENV)/.user
	$(VENV)/bin/kdlib-faces demo --output $(OUTPUT)
	@echo "open $(OUTPUT)/report.html"

test: $(VENV)/.dev
	$(MAKE) --no-print-directory check

# The checks of `make test` with an existing environment: make check PY=/path/to/python. The tests build the documentation.
# One worker per core, each with one thread; a file stays on one worker because its fixtures are built once per worker.
check: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile

lint:
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# Damaged files for every reader, and interruptions at random times; `make test` runs a short form of both.
CASES ?= 200000
KILLS ?= 50
WORKERS ?= $(shell nproc)
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz.campaign --cases $(CASES) --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz.kills --kills $(KILLS)

# Change the code, one expression at a time, and see whether a test fails: make mutants MUTANTS=all
MUTANTS ?= 400
mutants: $(VENV)/.dev
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt mutmut==3.8.1
	OMP_NUM_THREADS=1 $(PY) -m tests.mutants.campaign --mutants $(MUTANTS) --workers $(WORKERS)

docs:
	$(PY) -m sphinx -q -W -n -b html docs docs/_build/html

bench: $(VENV)/.dev
	$(VENV)/bin/python -m pip install --quiet --no-deps torchdistill==1.1.5 torch-pruning==1.6.1 pytorch-metric-learning==2.9.0
	for file in benchmarks/bench_*.py; do $(VENV)/bin/python $$file || exit 1; done

# The wheel and the source distribution, in dist/.
dist: $(VENV)/.dev
	$(VENV)/bin/python -m pip install --quiet twine==7.0.0
	$(VENV)/bin/python -m build --outdir dist .
	$(VENV)/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info docs/_build docs/api/generated runs
