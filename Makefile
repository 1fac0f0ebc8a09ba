# Every command of README.md. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
BASE_MODEL ?= smollm2-135m-instruct
PROTOS := $(shell find protos -name '*.proto')
API := libs/adaptermesh/api

.DEFAULT_GOAL := help

.PHONY: help
help: ## Lists the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt 'torch==2.13.0'
	$(PIP) install -q -c constraints.txt -e '.[all]'
	@# Without a compiler torch computes everything, slower.
	-$(BIN)/python -m adaptermesh.worker.engine.native.build
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: install
install: $(VENV)/.installed ## Makes .venv and installs the four services and the CLI

.PHONY: model
model: install ## Fetches the default base model into the cache
	$(BIN)/adaptermesh models pull $(BASE_MODEL)

.PHONY: demo
demo: model ## Starts the mesh, runs the guided demonstration, stops it again
	$(BIN)/adaptermesh demo

.PHONY: up
up: model ## Starts the mesh with the demo adapters and routes; Ctrl-C stops it
	$(BIN)/adaptermesh up --with-demo-adapters

.PHONY: test
test: $(VENV)/.installed-dev model ## Runs the tests
	$(BIN)/python -m pytest -q

.PHONY: test-faults
test-faults: $(VENV)/.installed-dev ## Kills stores, PostgreSQL and S3 under 500 uploads, and fuzzes uploads for long; many minutes
	$(BIN)/python -m pytest -q -rA -m faults tests/integration

.PHONY: bench
bench: $(VENV)/.installed-dev model ## Measures the engine beside its peers; BENCH="--scenarios throughput" for one
	$(BIN)/python -m tests.bench $(BENCH)

.PHONY: test-gpu
test-gpu: ## Runs the tests that need a CUDA card, and the kernels' own; needs what bench-gpu needs, and pytest
	PYTHONPATH=libs:services $(PYTHON) -m pytest -q -c /dev/null --rootdir . --import-mode=importlib \
		tests/gpu tests/unit/worker/engine/ops/test_lowrank_triton.py tests/unit/worker/engine/test_paged_attention.py

.PHONY: bench-gpu
bench-gpu: ## Measures the engine on a CUDA card; needs torch for it, triton, transformers, peft, pydantic; no network
	PYTHONPATH=libs:services $(PYTHON) -m tests.bench.gpu $(BENCH)

.PHONY: lint
lint: $(VENV)/.installed-dev ## Format, lint, types, import direction, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code

.PHONY: breaking
breaking: $(VENV)/.installed-dev ## Wire compatibility of the protos with the main branch
	$(BIN)/buf breaking --against '.git#branch=main'

.PHONY: protos
protos: $(VENV)/.installed-dev ## Generates the Python code of the protos
	rm -rf $(API)/adapter $(API)/inference $(API)/router $(API)/store $(API)/worker
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=libs --grpc_python_out=libs \
		--mypy_out=quiet:libs --mypy_grpc_out=quiet:libs $(PROTOS)
	find $(API) -type d -exec touch {}/__init__.py \;

.PHONY: clean
clean: ## Removes what the build made; the model cache stays
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
