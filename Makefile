# Everything runs from here with plain Python: `make help` lists the targets.

# The first of these that is at least 3.11 builds the environment; another one: make setup PYTHON=/path/to/python
PYTHON ?= python3 python3.13 python3.12 python3.11
# Extras of pyproject.toml to install, e.g. EXTRAS=dev,detection
EXTRAS ?= dev
# SLOW=1: `test` and `check` run the tests marked slow as well
SLOW ?=
# UPGRADE=1: `lock` takes the newest releases; without it, it keeps every pin it can
UPGRADE ?=
# Further arguments of the launcher (`ablation`), the benchmarks (`bench`) or pytest (`test`, `check`)
ARGS ?=
# Tests run in so many processes, a file in one: most tests wait more than they compute
WORKERS ?= 3
# The image of the cluster in containers, and what it is built from (docs/cluster.md); PIP_CONF=FILE: a pip.conf with
# indexes of your own, TORCH_INDEX=URL: an index with CPU wheels of torch
IMAGE ?= spft-studies:latest
BASE ?= debian:bookworm-slim
TORCH_INDEX ?=
PIP_CONF ?=
# Further arguments of `docker build`, e.g. --network=host
BUILD_ARGS ?=
# Ray workers of `up`; GPU=1: one with all GPUs of this machine in their place. DATA: a folder with data sets
NODES ?= 2
GPU ?=
DATA ?=
# Name of the containers' project, and folder of its secrets
PROJECT ?= spft
SECRETS ?= docker/secrets
# Put before pytest, e.g. LIMIT='timeout --signal=INT 60m'
LIMIT ?=
DOCKER ?= docker

comma := ,
VENV := .venv
PY := $(VENV)/bin/python
LOCK := requirements.lock
# Inside .venv, so that it cannot outlive what it vouches for; one for each choice of extras.
STAMP := $(VENV)/.installed-$(subst $(comma),+,$(EXTRAS))
on = $(filter-out 0,$(1))
# The plugin where there is one, else the older program; the profile makes GPU workers exist.
compose_of = $(if $(shell $(DOCKER) compose version 2>/dev/null),$(DOCKER) compose,docker-compose)
COMPOSE = SPFT_SECRETS='$(abspath $(SECRETS))' SPFT_IMAGE='$(IMAGE)' $(if $(DATA),SPFT_DATA='$(abspath $(DATA))') \
    $(compose_of) --file docker/compose.yaml --project-name $(PROJECT) $(if $(call on,$(GPU)),--profile gpu)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup ablation test lint types check check-all bench lock audit clean \
    image up cluster-ablation down

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## build .venv from the lock; again only when pyproject.toml or the lock change

ablation: setup ## run the main study on the embedded synthetic data (no network, no GPU)
	$(PY) study/launch.py ablation $(ARGS)

test: setup ## run the tests that take seconds (SLOW=1: all of them)
	$(LIMIT) $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(if $(call on,$(SLOW)),,-m 'not slow') $(ARGS)

lint: setup ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup ## mypy
	$(PY) -m mypy

check: lint types test ## what CI runs: lint, types, tests (SLOW=1: all tests)

check-all: ## check with the slow tests
	@$(MAKE) --no-print-directory check SLOW=1

bench: setup ## time what the design promises
	$(PY) -m tests.benchmarks.run $(ARGS)

lock: | $(PY) ## rewrite requirements.lock from pyproject.toml, keeping pins (UPGRADE=1: newest releases)
	$(PY) .ci/lock.py $(if $(call on,$(UPGRADE)),--upgrade)

audit: setup ## ask for known vulnerabilities of the locked releases (needs the network; fails where it cannot ask)
	$(PY) .ci/audit.py $(ARGS)

image: ## build the image of the cluster's nodes (BASE=…: on a CUDA base, IMAGE=…: its name)
	DOCKER_BUILDKIT=1 $(DOCKER) build --file docker/Dockerfile --tag $(IMAGE) --build-arg BASE=$(BASE) \
	    $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) \
	    $(if $(PIP_CONF),--secret id=pip$(comma)src=$(PIP_CONF)) $(BUILD_ARGS) .

up: image $(SECRETS) ## start PostgreSQL, MLflow, a Ray head and NODES workers in containers (docs/cluster.md)
	$(COMPOSE) up --detach $(if $(call on,$(GPU)),--scale worker=0 --scale worker-gpu=1,--scale worker=$(NODES))

cluster-ablation: $(SECRETS) ## run the main study on the cluster that `up` started
	$(COMPOSE) run --rm $$([ -t 1 ] || echo -T) study study ablation $(ARGS)

down: $(SECRETS) ## end the cluster's containers; results, databases and secrets stay (ARGS=--volumes: not the former two)
	$(COMPOSE) down $(ARGS)

$(SECRETS): docker/secrets.sh
	docker/secrets.sh $(SECRETS)
	@touch $(SECRETS)

clean: ## remove caches and build output; .venv and outputs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# Debian and Ubuntu ship venv without ensurepip: said here, before `python -m venv` leaves half an environment behind.
$(PY):
	@found=; \
	for python in $(PYTHON); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "setup: needs Python 3.11 or newer; tried: $(PYTHON)." \
	        "Install it, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "setup: $$found cannot create environments (no ensurepip)." \
	        "On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	echo "$$found -m venv --clear $(VENV)"; \
	"$$found" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# As environment variables the constraints reach the isolated build of the project too: up to pip 25.2 through
# PIP_CONSTRAINT, from 25.3 on through PIP_BUILD_CONSTRAINT (docs/decisions/0001).
$(STAMP): pyproject.toml $(LOCK) | $(PY)
	PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK) PIP_DISABLE_PIP_VERSION_CHECK=1 \
	    $(PY) -m pip install -e '.[$(EXTRAS)]'
	@touch $@
