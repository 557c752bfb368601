# One environment, one line per step. Any PIP_* setting is respected; a CPU-only torch is had with
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
PYTHON ?= python3
# test processes, which have a thread each: as many as cores; 0 keeps all tests in one
JOBS ?= auto
# more arguments for pytest, such as PYTEST_ARGS='-m "not slow"'
PYTEST_ARGS ?=

venv := .venv
bin := $(venv)/bin
pip := $(bin)/python -m pip --disable-pip-version-check -qq
torch := $(shell grep '^torch==' constraints.txt)
say = @printf '%s\n'

.PHONY: help demo test soak lint reference families docs clean
.DEFAULT_GOAL := help

help:
	$(say) \
	  'make demo    shrink a small language model, measure cost and gain, write a report' \
	  'make test    lint, types and all tests' \
	  'make soak    kill every command at random, damage its inputs; for hours' \
	  'make lint    ruff, mypy and the layers of imports' \
	  'make reference   write what the option models say into help and reference pages' \
	  'make families    try every family of transformers, and write the page of them' \
	  'make docs    build the site into site/, links checked' \
	  'make clean   remove the environment and everything built' \
	  '' \
	  'PYTHON=python3.12 picks the interpreter, JOBS=0 keeps all tests in one process'

demo: $(venv)/.ready
	@$(bin)/secateur demo

test: lint
	$(say) '==> pytest'
	@$(if $(filter-out 0,$(JOBS)),OMP_NUM_THREADS=1 )$(bin)/pytest -q -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

soak: $(venv)/.ready
	$(say) '==> kills, pairs and full disks; SOAK_KILLS, SOAK_PAIRS and SOAK_DISKS say how many'
	@OMP_NUM_THREADS=1 $(bin)/pytest -q -m soak tests/soak $(PYTEST_ARGS)
	@OMP_NUM_THREADS=1 SOAK_CATALOGUE=1 SOAK_MUTATIONS=5000 $(bin)/pytest -q -n $(JOBS) tests/catalogue

lint: $(venv)/.ready
	$(say) '==> ruff, mypy, import-linter'
	@$(bin)/ruff check --quiet --output-format concise .
	@$(bin)/ruff format --quiet --check .
	@$(bin)/mypy --no-error-summary
	@$(bin)/lint-imports --no-logo --no-cache > $(venv)/lint-imports.log || { cat $(venv)/lint-imports.log; exit 1; }

reference: $(venv)/.ready
	@$(bin)/python docs/generate.py

families: $(venv)/.ready
	$(say) '==> every family that transformers can build, tiny'
	@OMP_NUM_THREADS=1 $(bin)/python docs/family_table.py

docs: $(venv)/.docs
	$(say) '==> mkdocs'
	@NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --quiet --strict
	$(say) 'site/index.html'

clean:
	@rm -rf $(venv) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(venv)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)' >&2; exit 1; }
	$(say) '==> environment in $(venv)'
	@$(PYTHON) -m venv $(venv) || \
	  { echo 'No environment could be made: install the venv module (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(say) '==> $(torch)'
	@$(pip) install -c constraints.txt $(torch)
	$(say) '==> secateur and its tools'
	@$(pip) install -c constraints.txt -e '.[dev]'
	@touch $@

$(venv)/.docs: $(venv)/.ready
	$(say) '==> site tools'
	@$(pip) install -c constraints.txt -e '.[docs]'
	@touch $@
