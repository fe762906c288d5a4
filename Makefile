# make help lists the targets. PYTHON chooses the interpreter for .venv, PIP_ARGS goes to every pip install
# (for instance --no-index --find-links wheels/).
PYTHON ?= python3
PIP_ARGS ?=
MODEL ?= zamba2-tiny
# More than there are cores: many tests wait for processes and for daemons.
TEST_WORKERS ?= 3
GPU_TEST_WORKERS ?= 8
VENV := .venv
RUN_PYTHON := $(VENV)/bin/python
# pytest in several processes, where an environment that was there already has pytest-xdist.
workers = $$($(RUN_PYTHON) -c 'import importlib.util as u; print(["", "-n $(1) --dist $(2)"][u.find_spec("xdist") is not None])')
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-clean test test-slow gpu-test lint bench train status data-plan data-run data-status data-verify data-report

help:
	@grep -hE '^[a-z][a-z -]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/ready ## make .venv with what this machine can use

$(VENV)/ready: pyproject.toml setup.sh
	@PYTHON="$(PYTHON)" PIP_ARGS="$(PIP_ARGS)" VENV="$(VENV)" bash setup.sh

demo: setup ## prepare data, pretrain, anneal, release and check a tiny model (MODEL=zamba2-tiny|zamba-tiny)
	@$(RUN_PYTHON) -m train.demo --model $(MODEL)

demo-clean: ## remove the demo's data, runs and releases
	rm -rf data/demo runs/demo runs/demo-* releases/demo-*

test: setup ## the tests that need minutes
	$(RUN_PYTHON) -m pytest -m "not slow and not gpu" $(call workers,$(TEST_WORKERS),loadfile --no-loadscope-reorder)

test-slow: setup ## the long kill, corruption and layout schedules
	$(RUN_PYTHON) -m pytest -m slow --timeout 3600

gpu-test: setup ## tests on the GPUs of this machine
	$(RUN_PYTHON) -m pytest -m "gpu and not whole_gpu" $(call workers,$(GPU_TEST_WORKERS),worksteal) tests/gpu
	$(RUN_PYTHON) -m pytest -m "gpu and whole_gpu" tests/gpu

lint: setup ## ruff and mypy
	$(RUN_PYTHON) -m ruff format --check .
	$(RUN_PYTHON) -m ruff check .
	$(RUN_PYTHON) -m mypy

bench: setup ## the benchmarks that this machine can run (peers: pip install -r benchmarks/requirements.txt)
	$(RUN_PYTHON) -m benchmarks

ifneq ($(filter data-%,$(MAKECMDGOALS)),) # said before anything is installed
CONFIG ?= $(error say CONFIG=configs/data_prep/....yaml)
CONFIG := $(CONFIG)
endif
data-plan data-run data-status data-verify data-report: data-%: setup ## data preparation of CONFIG=configs/data_prep/....yaml
	@$(RUN_PYTHON) -m data_prep $* $(CONFIG) $(ARGS)

train: ## submit RUN=configs/runs/....yaml to Slurm (ARGS="key=value", OPTIONS="--time=2:00:00 --dependency=afterok:12")
	@bash slurm/pretrain.sbatch $(OPTIONS) $(or $(RUN),$(error say RUN=configs/runs/....yaml)) $(ARGS)

status: setup ## job, last step, checkpoint and restarts of RUN=configs/runs/....yaml or a run directory
	@$(RUN_PYTHON) -m train.status $(or $(RUN),$(error say RUN=configs/runs/....yaml)) $(ARGS)
