# On a fresh machine two commands are enough: make train and make test. Each prepares .venv once, then runs the command that it prints.
#
#   PYTHON=python3.12    the interpreter for .venv (3.11 or newer)
#   WORKERS=4            processes that run tests side by side (default: 2)
#   PIP_ARGS="…"         arguments for every pip install, e.g. an index with CPU-only torch
#
# If .venv already has the pinned version of torch, CPU-only or not, it is kept.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-hosts check clean
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# DeepSpeed's kernels are not built, because nothing here uses them.
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The GPUs that torch sees, counted once and only for `make train`: two ranks cannot share one GPU. On a machine without a GPU,
# DS_ACCELERATOR keeps DeepSpeed's launcher from warning that it found none.
GPUS = $(eval GPUS := $(shell $(VENV)/bin/python -c 'import torch; print(torch.accelerator.device_count())'))$(GPUS)
RANKS = $(if $(filter 1,$(GPUS)),1,2)
CPU = $(if $(filter 0,$(GPUS)),DS_ACCELERATOR=cpu )

# $(call install,FILE): pip's whole output goes to a log. The terminal shows the pinned packages as they are installed, and the end of the
# log if pip fails.
define install
	@$(VENV)/bin/python -m pip install --progress-bar off $(PIP_ARGS) -r $(1) 2>&1 | tee $(VENV)/install.log \
	| while IFS= read -r line; do case "$$line" in \
		"Collecting "*" (from -r "* | "Processing "*" (from -r "*) line=$${line#* }; line=$${line%% *}; echo "  $${line##*/}" ;; \
		"Installing collected packages"*) echo "  unpacking" ;; \
	esac; done || { grep -v 'already satisfied' $(VENV)/install.log | tail -n 12; \
		echo "error  pip could not install $(1) → its last words are above, all of them in $(VENV)/install.log"; exit 1; }
endef

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

train: $(VENV)/ready  ## set up if needed, then train the default experiment: on two ranks, about three minutes on two CPU cores
	$(CPU)deepspeed --quiet --num_gpus $(RANKS) \
	  experiments/gpt_sotu/launch.py --parallel.tensor $(RANKS)

test: $(VENV)/ready-dev  ## set up if needed, then run all tests except the slow ones
	pytest -n $(WORKERS) --dist loadfile

test-slow: $(VENV)/ready-dev  ## run the slow tests
	pytest -n $(WORKERS) --dist loadfile -m slow

test-hosts: $(VENV)/ready-dev  ## run the slow tests that need two hosts, on two made of Linux namespaces (no container, no network)
	pytest -n 0 -m hosts

check: $(VENV)/ready-dev  ## check style (ruff), types (mypy), the direction of imports, and what experiments declare
	ruff check .
	mypy
	pytest tests/test_arrows.py
	python -m research check

clean:  ## remove .venv and all caches, but not runs/
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +

# The stamp files are written last, so the next make repeats an install that was interrupted.
$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"error  Python {sys.version.split()[0]} is older than 3.11 → make PYTHON=python3.11 …")'
	@echo "setting up $(VENV) (once, one to three minutes)"
	@rm -f $@
	@$(PYTHON) -m venv $(VENV)
	$(call install,requirements.txt)
	@touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(call install,requirements-dev.txt)
	@touch $@
