# vlmserve: every target sets up what it needs in .venv; `make` lists them.
PYTHON ?= python3
PORT ?= 8000
HOST ?= 127.0.0.1
MODEL ?=
ARGS ?=
# How many random requests a route of the API gets in fuzz-api from schemathesis, how many all routes
# get from the fast sampler, and from which seed.
EXAMPLES ?= 300
REQUESTS ?= 10000
SEED ?= 1
# Processes that run the tests, and how they share them; WORKERS=0 runs them in one, as for `--pdb`.
WORKERS ?= 3
# Tests start many processes: compiled modules and rewritten assertions are kept for the next one.
unexport PYTHONDONTWRITEBYTECODE
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
EXTRA := soak or torture or fuzz or gpu
# The rules of scheduling, blocks, schemas, parsing and templates: no process, no socket, no model.
FAST := tests/router/blocks tests/router/scheduler tests/router/processes/test_wire.py tests/server/schemas \
  tests/server/generation tests/server/prompts tests/server/http/test_head.py \
  tests/server/images/test_sources.py \
  tests/server/supervisor tests/test_rows.py tests/test_old_paths.py
# Where torch comes from: the ordinary index unless you name another, for example
# TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu for a CPU-only build.
TORCH_INDEX_URL ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_REQUIRE_VIRTUALENV=1 $(BIN)/python -m pip --disable-pip-version-check -q
TORCH_PIN := $(shell grep -E '^torch==' requirements/base.txt)
TYPING := build/typing/vlmserve
# The variable leaves out an advertisement of mkdocs-material.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

.DEFAULT_GOAL := help
.PHONY: help setup setup-test serve check docs picture test test-slow fuzz fuzz-api soak bench bench-gpu bench-gpu-wheels clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "vlmserve needs Python 3.11 or 3.12; name one with PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(BIN)/python requirements/base.txt setup.cfg pyproject.toml
	@echo "installing the pinned requirements into $(VENV) (a few minutes the first time)"
	$(if $(TORCH_INDEX_URL),$(PIP) install --index-url $(TORCH_INDEX_URL) $(TORCH_PIN))
	$(PIP) install -r requirements/base.txt
	$(PIP) install --no-deps -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base requirements/test.txt
	$(PIP) install -r requirements/test.txt
	@touch $@

setup: $(VENV)/.base ## make .venv and install; afterwards .venv/bin/vlmserve is there

setup-test: $(VENV)/.test

$(VENV)/.docs: $(VENV)/.base requirements/docs.txt
	$(PIP) install -r requirements/docs.txt
	@touch $@

serve: setup ## serve the bundled model on port 8000 (PORT=, HOST=, MODEL=, ARGS= change it)
	@exec $(BIN)/python deploy/foreground.py $(BIN)/vlmserve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

$(TYPING): | $(VENV)/.test
	@mkdir -p $(TYPING)
	@for part in __init__.py py.typed server router models; do ln -sfn ../../../$$part $(TYPING)/$$part; done

check: setup-test $(VENV)/.docs $(TYPING) ## lint, types, import rules, links of the docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/typing $(BIN)/mypy -p vlmserve
	$(BIN)/python -m pytest -q tests/test_floors.py tests/test_docs.py
	$(MKDOCS) build --strict -q

picture: setup-test ## draw docs/architecture.svg from the imports
	PYTHONPATH=tests $(BIN)/python -m support.architecture_picture

docs: $(VENV)/.docs ## serve the documentation on port 8001 (DOCS_PORT= changes it)
	$(MKDOCS) serve --dev-addr 127.0.0.1:$(or $(DOCS_PORT),8001)

test-fast: setup-test ## the rules alone, while you write (90 seconds on 2 cores)
	$(PYTEST) -q -m "not slow and not ($(EXTRA))" $(wildcard $(FAST)) $(ARGS)

test: setup-test ## the tests of every run (about 8 minutes on 2 cores)
	$(PYTEST) -q -m "not slow and not ($(EXTRA))" --durations=15 $(ARGS)

test-slow: setup-test ## the long tests: training, real clients, the version range, the install steps
	$(PYTEST) -v -m "slow and not ($(EXTRA))" --durations=15 $(ARGS)

fuzz: setup-test ## minutes of hostile bytes at each parser (SECONDS=, ARGS="--target NAME" change them)
	$(BIN)/python tests/fuzz.py --seconds $(or $(SECONDS),300) $(ARGS)

fuzz-api: setup-test ## thousands of requests made from the API's document (EXAMPLES=, REQUESTS=, SEED= change them)
	EXAMPLES=$(EXAMPLES) REQUESTS=$(REQUESTS) SEED=$(SEED) $(BIN)/python -m pytest -s -m fuzz $(ARGS)

soak: setup-test ## ten thousand random requests against one engine, each checked against itself alone
	$(BIN)/python -m pytest -s -m soak $(ARGS)

torture: setup-test ## engine kills, cancels, twice the load it can serve, attacks of one key; JSON lines
	$(BIN)/python bench/torture.py kills --count 200
	$(BIN)/python -m pytest -s -m torture $(ARGS)
	$(BIN)/python bench/torture.py cancels --count 100000
	$(BIN)/python bench/torture.py overload
	$(BIN)/python bench/torture.py neighbours

bench: setup-test ## a load run against the bundled model; one JSON document last
	$(BIN)/python bench/serve.py --concurrency 1,4,16 $(ARGS)

bench-gpu: ## tests and tables of steps on one GPU, with $(PYTHON) as it is; one JSON document last
	@exec $(PYTHON) bench/gpu.py $(ARGS)

# what models/, the scheduler and their tests import beside torch, transformers, accelerate, triton
GPU_WHEELS := msgspec llguidance pytest iniconfig pluggy packaging Pygments pillow
WHEEL_PYTHON ?= 3.12

bench-gpu-wheels: ## the wheels that bench-gpu takes on a machine without a network, in build/wheels
	rm -rf build/wheels
	$(PYTHON) -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: \
	  --python-version $(WHEEL_PYTHON) --implementation cp -d build/wheels \
	  $(foreach name,$(GPU_WHEELS),$(shell grep -hE '^$(name)==' requirements/base.txt requirements/test.txt))

clean: ## remove .venv and build
	rm -rf $(VENV) build *.egg-info
