# `make train`, `make test`, `make smoke`. All install what they need into .venv first (tools/install.py;
# instant when nothing has changed) and can be repeated at any time.

PYTHON ?= python3
VENV ?= .venv
ACCELERATOR ?= auto
CONFIG ?= configs/openmoe_tiny.py
WORKDIR ?= workdir
DEVICES ?= 8
JOBS ?= 2
ARGS ?=

# A Python named by the user wins over the one that .venv was made with; the default does not.
ifneq ($(origin PYTHON),file)
NAMED := --python-was-named
endif

INSTALL = "$(PYTHON)" tools/install.py --venv "$(VENV)" --accelerator "$(ACCELERATOR)" $(NAMED)

.DEFAULT_GOAL := help
.PHONY: help train test smoke golden lock clean python-is-there

help:
	@echo "make train   install, train $(CONFIG) on the corpus that comes with Python, write the report;"
	@echo "             again: resume, or say that the run is complete"
	@echo "make test    install what the tests need too (TensorFlow, and libtpu to compile for TPUs that need not be there:"
	@echo "             1 GB more), run the test suite"
	@echo "make smoke   a few steps of every arm of every experiment, and their tables"
	@echo "make golden  write docs/collectives.md again: what each parallel layout exchanges, from the compiled programs"
	@echo "make lock    make requirements.lock from setup.py again (ARGS=--upgrade takes newer releases)"
	@echo "make clean   remove $(VENV) and what installing and testing left; training runs stay"
	@echo "make help    this"
	@echo
	@echo "Variables, as in 'make train DEVICES=4 ARGS=--config.training.num_steps=1000':"
	@echo "  PYTHON=$(PYTHON)     the Python that .venv is made with: 3.11, 3.12 or 3.13"
	@echo "  WORKDIR=$(WORKDIR)    where the run and its report.html go"
	@echo "  CONFIG=$(CONFIG)"
	@echo "  DEVICES=$(DEVICES)          CPU devices to pretend to have where there is no accelerator"
	@echo "  ARGS=              more words for moe-jax train or sweep, or for pytest"
	@echo "  ACCELERATOR=$(ACCELERATOR)   cpu, cuda, cuda13 or tpu where looking at the machine is not enough"
	@echo "  JOBS=$(JOBS)             test processes, or runs of a sweep at a time"
	@echo "  VENV=$(VENV)         where everything is installed"

train: python-is-there
	@$(INSTALL)
	@"$(VENV)/bin/moe-jax" train --config="$(CONFIG)" --workdir="$(WORKDIR)" --devices="$(DEVICES)" $(ARGS)

test: python-is-there
	@$(INSTALL) --extras data,dev,tpu
	@"$(VENV)/bin/python" -m pytest -n "$(JOBS)" --dist loadfile --max-worker-restart=0 $(ARGS)

smoke: python-is-there
	@$(INSTALL)
	@"$(VENV)/bin/moe-jax" sweep experiments --scale=smoke --jobs="$(JOBS)" $(ARGS)

golden: python-is-there
	@$(INSTALL) --extras data,dev,tpu
	@"$(VENV)/bin/python" tests/golden_collectives.py write

lock: python-is-there
	@test -x .venv-lock/bin/uv || { "$(PYTHON)" -m venv .venv-lock && .venv-lock/bin/python -m pip install -qq uv; }
	@echo "Resolving setup.py for every supported Python ..."
	@.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra data --extra dev --extra tpu \
		--annotation-style line --custom-compile-command "make lock" --output-file requirements.lock $(ARGS) setup.py
	@echo "requirements.lock is up to date; 'git diff requirements.lock' shows what changed."

clean:
	@rm -rf "$(VENV)" .venv-lock .venv-train build dist moe_jax.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed $(VENV), caches and build products. Training runs (such as $(WORKDIR)) are still there."

python-is-there:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "make: there is no '$(PYTHON)' on this machine; name a Python 3.11, 3.12 or 3.13: make train PYTHON=/path/to/python3.12" >&2; exit 1; }
