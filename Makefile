# make train: environment, installation, the default job. make test: environment, installation, all tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := anemoi,test,report,tensorboard,dev
ARGS ?=
export OMP_NUM_THREADS ?= 1
# Some groups of tests start four ranks, or SLURM's daemons, of their own.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: train test test-slow bench bench-gpu bench-overlap lint docs clean

train: $(VENV)/.installed
	$(BIN)/anemoi-dist train $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/optimizer_step.py $(ARGS)
	$(BIN)/python benchmarks/engine_step.py

bench-gpu: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/gpu_optimizer_step.py $(ARGS)

# Linux only: two ranks in a network namespace of their own (unshare, ip, tc).
bench-overlap: $(VENV)/.installed
	$(BIN)/python benchmarks/overlap.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W -b html docs docs/_build

$(VENV)/.installed: pyproject.toml setup.py constraints.txt anemoi_dist/optimizers/_ademamix.c
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info docs/_build anemoi_dist/optimizers/*.so
