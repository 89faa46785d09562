# Two commands to know: `make serve` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
LOCKS := deploy/requirements
# Served with the CUDA build of vLLM where there is a GPU, else with the CPU build of the same version; tested with the
# latter everywhere.
BUILD ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
BIN := .venv/bin
JOBS ?= 2
SERVE := $(if $(filter cuda,$(BUILD)),.venv-cuda,.venv)

# `make serve PORT=9000 MODEL=… TENSOR_PARALLEL=2`: short names for the most used settings.
# Every other setting is a variable CAPTIONER_<NAME>; `make settings` lists them.
serve serve-cluster: export CAPTIONER_HOST ?= $(HOST)
serve serve-cluster: export CAPTIONER_PORT ?= $(PORT)
serve serve-cluster: export CAPTIONER_MODEL ?= $(MODEL)
serve serve-cluster: export CAPTIONER_TENSOR_PARALLEL ?= $(TENSOR_PARALLEL)
serve serve-cluster: export CAPTIONER_CONFIG ?= $(CONFIG)
serve serve-cluster: export CAPTIONER_LOG_FORMAT ?= text

# On a terminal uv shows the progress of downloads.
INSTALL = $(@D)/bin/uv pip install $(shell [ -t 2 ] || echo --quiet) --python $(@D)/bin/python --no-deps
LOCKED = $(INSTALL) --require-hashes --compile-bytecode -r

# 1.0 GB that only GPUs need; the images leave the same out (deploy/docker/README.md).
WITHOUT_cpu := triton,nvidia-cusolver,nvidia-nvtx
# Tests need all of them: kernels of the CUDA build run in Triton's interpreter.
WITHOUT_cpu-dev :=
NEEDED = $(@D)/bin/python deploy/docker/missing_requirements.py --without "$(WITHOUT_$(1))" $(LOCKS)/$(1).txt \
	2>/dev/null >$(@D)/$(1).txt

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

# Runs the service; if it fails, `captioner doctor` checks the machine, and the service's exit status is kept. A service
# that somebody stops has not failed. `set -m` puts it into a separate process group, where it gets each signal once, from the trap.
define RUN
@set -m; stopped=; service=; status=0; \
pass() { stopped=yes; [ -z "$$service" ] || kill -$$1 $$service 2>/dev/null || true; }; \
for signal in INT TERM HUP; do trap "pass $$signal" $$signal; done; \
$(SERVE)/bin/captioner $(1) & service=$$!; [ -z "$$stopped" ] || pass TERM; \
while kill -0 $$service 2>/dev/null; do wait $$service 2>/dev/null || true; done; \
wait $$service 2>/dev/null || status=$$?; \
if [ $$status -ne 0 ] && [ -z "$$stopped" ]; then \
  echo; echo "captioner $(1) failed with status $$status. What captioner doctor says about this machine:"; echo; \
  $(SERVE)/bin/captioner doctor || true; \
fi >&2; \
exit $$status
endef

.PHONY: serve
serve: $(SERVE)/serve.stamp ## Install if needed, then serve on 127.0.0.1:8000
	$(call RUN,serve)

.PHONY: serve-cluster
serve-cluster: $(SERVE)/serve.stamp ## The same on Ray Serve (one machine), behind HAProxy
	$(call RUN,cluster)

.PHONY: settings
settings: $(SERVE)/serve.stamp ## List every setting
	@$(SERVE)/bin/captioner serve --help

.PHONY: test
test: check .venv/dev.stamp ## Install if needed, then all checks and tests
	$(BIN)/pytest -n $(JOBS) --durations=25

# Tests of which none starts a process, a server, an engine or a cluster (tests/needs.py).
FAST := not ($(subst $(eval) , or ,process store engine cluster sdk chart cuda))

.PHONY: test-fast
test-fast: .venv/dev.stamp ## Lint, types, and every test that needs no process, server, engine, cluster, client, Helm or CUDA build
	@$(MAKE) --no-print-directory --output-sync=target -j 3 check fast-tests

.PHONY: fast-tests
fast-tests: .venv/dev.stamp
	$(BIN)/pytest -q -n $(JOBS) -m "$(FAST)"

.PHONY: check
check: .venv/dev.stamp ## Lint, types, import contract, spelling, words
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m tests.support.language

.PHONY: format
format: .venv/dev.stamp ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: .venv/dev.stamp ## Load this service, or what serves at URL, at several loads: figures and a page (about 8 minutes)
	$(BIN)/python -m benchmarks.suite all $(if $(URL),--url $(URL)) --out .cache/bench

.PHONY: bench-compare
bench-compare: .venv/dev.stamp ## Compare with `vllm serve` and the offline engine, side by side
	$(BIN)/python -m benchmarks.compare

.PHONY: embedded-checkpoint
embedded-checkpoint: .venv/dev.stamp ## Make the embedded stand-in's corpus and train it (hours; resumable)
	deploy/embedded/recipe.sh .cache/embedded

.PHONY: image-test
image-test: ## Build the CPU image and try it (as root, on Debian; writes some 20 GB; not part of `make test`)
	deploy/docker/try.sh

.PHONY: harden
harden: .venv/dev.stamp ## Fuzz, kill processes, stop the database and soak, at length (hours; no GPU)
	$(BIN)/python -m tests.hardening
	$(BIN)/python -m tests.tenancy.bill_checks --requests 100000
	$(BIN)/python -m benchmarks.tenancy.ledger_chaos --requests 100000
	$(BIN)/python -m benchmarks.tenancy.cluster_chaos --requests 100000
	$(BIN)/python -m benchmarks.cluster.chaos --out .cache/chaos.json
	$(BIN)/python -m benchmarks.cluster.soak --out .cache/soak.json

# The rooms of money, access, admission and the wire. Slower than the tests without it; prints a table by module.
.PHONY: coverage
coverage: .venv/dev.stamp ## Branch coverage of money, access, admission and wire, by the tests that need no model
	$(BIN)/pytest -q -n $(JOBS) -m "not (engine or cluster or sdk or chart or cuda)" --cov --cov-report= \
	  tests/api tests/engine tests/observability tests/scheduling tests/storage tests/tenancy
	$(BIN)/coverage report --include="serving/api/*,serving/tenancy/*,serving/scheduling/*,serving/engine/admission*"

.PHONY: mutate
mutate: .venv/dev.stamp ## One fault at a time in the modules of money, access, admission and wire; MODULES="serving/…" for some
	$(BIN)/python -m tests.mutants --jobs $(JOBS) $(MODULES)

.PHONY: chart
chart: .venv/dev.stamp ## Regenerate what the chart takes from elsewhere: README table, schema, rules, dashboards
	$(BIN)/python helm/generate.py

.PHONY: lock
lock: .venv/uv.stamp ## Resolve and lock the requirements
	for build in cpu cuda; do $(call COMPILE,--extra $$build,$$build); done
	$(call COMPILE,--extra cpu --extra dev,cpu-dev)
	$(call COMPILE,--constraint $(LOCKS)/cuda.txt,frontend)

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-header --no-annotate --override $(LOCKS)/overrides.txt pyproject.toml --extra build $(1) -o $(LOCKS)/$(2).txt

.PHONY: clean
clean: ## Remove what `make` installed and what tests left
	rm -rf .venv .venv-cuda .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

%/uv.stamp: $(LOCKS)/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 …")'
	@echo "Making $* …"
	@$(PYTHON) -m venv $*
	@$*/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(LOCKS)/uv.txt
	@touch $@

define SERVING
$(1)/serve.stamp: $(1)/uv.stamp $(LOCKS)/$(2).txt pyproject.toml
	@echo "Installing the $(2) build of the engine (several GB the first time; the service takes $(3)) …"
	@$$(call NEEDED,$(2))
	@$$(LOCKED) $$(@D)/$(2).txt
	@$$(INSTALL) --no-build-isolation -e .
	@touch $$@
endef
$(eval $(call SERVING,.venv,cpu,2.9 GB of memory))
$(eval $(call SERVING,.venv-cuda,cuda,a GPU))

.venv/dev.stamp: .venv/serve.stamp $(LOCKS)/cpu-dev.txt
	@echo "Installing what the tests need …"
	@$(call NEEDED,cpu-dev)
	@$(LOCKED) $(@D)/cpu-dev.txt
	@touch $@
