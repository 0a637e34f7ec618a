# make train: environment, installation, the default job. make test: the same for the tests.
# Each command first installs what it alone needs; .venv/.train, .venv/.test, ... note what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
export OMP_NUM_THREADS ?= 1
# Some groups of tests start four ranks, or SLURM's daemons, of their own.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.PHONY: train test test-slow bench bench-gpu bench-overlap lint docs clean

# Compiling every module of scipy or sympy costs a minute and a sixth of the disk: Python compiles what training imports,
# also where the environment says not to write bytecode.
train: export PYTHONDONTWRITEBYTECODE :=
train: $(VENV)/.train
	$(BIN)/anemoi-dist train $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) -m slow $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/optimizer_step.py $(ARGS)
	$(BIN)/python benchmarks/engine_step.py

bench-gpu: $(VENV)/.bench
	$(BIN)/python benchmarks/gpu_optimizer_step.py $(ARGS)

# Linux only: two ranks in a network namespace of their own (unshare, ip, tc).
bench-overlap: $(VENV)/.train
	$(BIN)/python benchmarks/overlap.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/figures.py

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W -b html docs docs/_build

PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INSTALLED_FROM := pyproject.toml setup.py constraints.txt anemoi_dist/optimizers/_ademamix.c

# torchvision is timm's dependency and needed by nothing here; its wheel cannot be loaded beside a CPU build of torch, and
# Lightning imports it if it is there.
define install
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(2) -e '.[report$(1)]'
	@$(BIN)/python -m pip --disable-pip-version-check uninstall -q -y torchvision
	@touch $(VENV)/.train $@
endef

$(VENV)/.train: $(INSTALLED_FROM)
	@echo 'Installing torch, DeepSpeed, anemoi-datasets and this package into $(VENV), once: about 3 minutes and 1.7 GB'
	@echo '(several GB more where pip takes the CUDA build of torch). Training starts when that is done.'
	$(call install,,--no-compile)

$(VENV)/.test: $(INSTALLED_FROM)
	@echo 'Installing what the tests need into $(VENV), once: about 5 minutes and 3.3 GB in all.'
	$(call install,$(comma)test)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-anemoi.txt
	@touch $@

$(VENV)/.lint $(VENV)/.docs $(VENV)/.bench: $(VENV)/.%: $(INSTALLED_FROM)
	@echo 'Installing what `make $*` needs into $(VENV), once: about 4 minutes and 2.1 GB in all.'
	$(call install,$(comma)$*)

comma := ,

clean:
	rm -rf $(VENV) build *.egg-info docs/_build anemoi_dist/optimizers/*.so
