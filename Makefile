# ProCLIP for Transformers. `make help` lists the targets; `make quickstart` and `make test` need no preparation.
#
# Variables, from the environment or the command line:
#   PYTHON  the Python for the environments, 3.10 or newer                   PYTHON=python3.12 make test
#   TORCH   the version of torch; without +cpu it carries CUDA on Linux      TORCH=2.13.0 make quickstart
#   VENV    the folder of the environments                                   VENV=/tmp/environments make test
#   ARGS    passed on to `proclip quickstart` or to pytest                   ARGS="--size small" make quickstart

PYTHON ?= python3
TORCH ?= 2.13.0+cpu
VENV ?= .venv
ARGS ?=

# Exact releases with hashes, so that what works today works in a year. `make lock` renews them.
LOCKS_quickstart := locks/quickstart.txt locks/language_models.txt
LOCKS_test := locks/test.txt locks/language_models.txt
LOCKS_oldest := locks/oldest.txt
LOCKS_docs := locks/docs.txt

# What the oldest supported releases have to pass: loading, encoding, publishing, remote code.
TESTS_oldest := tests/test_clean_environment.py tests/trainers/base/test_publishing.py \
  $(patsubst %,tests/modeling_proclip/test_%.py,attention_proof configuration eva_clip \
    lean lean_saving modeling modeling_saving processing processing_images)

# An environment is complete when its stamp is there. The name holds the torch, so that another TORCH starts anew.
STAMP := .installed-torch-$(TORCH)

# Nothing is fetched from the Hugging Face Hub: the models come in packages.
RUN := HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-oldest test-newest lint docs lock clean
.NOTPARALLEL: # two editable installs at once would write the same egg-info
.SECONDARY: # keep the stamps

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1	/p' $(MAKEFILE_LIST)

quickstart: $(VENV)/quickstart/$(STAMP) ## align a language model with a CLIP and print the table (writes quickstart-output/)
	@$(RUN) $(VENV)/quickstart/bin/proclip quickstart --output-dir quickstart-output $(ARGS)

test: $(VENV)/test/$(STAMP) ## run the tests
	@$(RUN) $(VENV)/test/bin/python -m pytest --timeout 900 --numprocesses 2 --dist loadfile $(ARGS)

test-oldest: $(VENV)/oldest/$(STAMP) ## run the tests of loading and remote code with the oldest supported releases
	@$(RUN) $(VENV)/oldest/bin/python -m pytest --timeout 900 $(TESTS_oldest) $(ARGS)

test-newest: ## run the tests with the newest release of everything but torch, to see what is coming
	@echo "the newest releases into $(VENV)/newest"
	@rm -rf $(VENV)/newest
	@$(PYTHON) -m venv $(VENV)/newest
	@$(VENV)/newest/bin/python -m pip install -qq "torch===$(TORCH)"
	@$(VENV)/newest/bin/python -m pip install -qq --editable ".[dev]"
	@$(VENV)/newest/bin/python -m pip install -qq --no-deps -r locks/language_models.in
	@$(VENV)/newest/bin/python -m pip install -qq --upgrade transformers # past the bounds of our extras
	@$(RUN) $(VENV)/newest/bin/python -m pytest --timeout 900 $(ARGS)

lint: $(VENV)/test/$(STAMP) ## check style and types
	@bad=0; for check in "ruff check" "ruff format --check" mypy; do $(VENV)/test/bin/$$check || bad=1; done; exit $$bad

docs: $(VENV)/docs/$(STAMP) ## build the documentation site into site/ and check its links
	@NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict $(ARGS)
	@echo "site/index.html is there; with search: python -m http.server --directory site"

lock: ## renew the lock files with the newest releases that pyproject.toml admits (needs uv)
	@locks/renew.sh $(TORCH:+cpu=)

clean: ## remove the environments, build leftovers and caches (quickstart-output/ stays)
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/docs/$(STAMP): override TORCH := none

.SECONDEXPANSION:
$(VENV)/%/$(STAMP): pyproject.toml setup.cfg locks/install.sh $$(LOCKS_$$*)
	@locks/install.sh $(PYTHON) $(@D) $(TORCH) $(LOCKS_$*)
	@touch $@
