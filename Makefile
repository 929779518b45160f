# SPDX-License-Identifier: LGPL-2.1-or-later
# make test    everything, from nothing: needs Python 3.11 or newer, make and a network
# make help    the rest
SHELL := /bin/bash
VENV := .venv
OLDEST := .venv-debian13
PYTEST_ARGS ?=
# Processes that run tests, which mostly wait; more than 8 of them and their daemons reach root's limit of inotify instances.
export JOBS ?= $(shell n=$$((2 * $$(nproc))); echo $$((n < 8 ? n : 8)))
# With bytecode on disk, a process of the tests starts in half of the time.
unexport PYTHONDONTWRITEBYTECODE
# A hang is interrupted, so that what is running is still cleaned up.
LIMIT := timeout --foreground --signal=INT --kill-after=60 45m

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: venv
venv: $(VENV)/.installed ## the virtual environment .venv, from requirements.lock

$(VENV)/.installed: requirements.lock pyproject.toml
	@tests/setup-venv $(VENV) requirements.lock

$(OLDEST)/.installed: requirements-debian13.lock pyproject.toml
	@tests/setup-venv $(OLDEST) requirements-debian13.lock

.PHONY: tools
tools: ## the Debian packages that tests use (installed when root, otherwise named)
	@tests/setup-debian

.PHONY: test
test: venv tools ## lint, types, all tests; as root also on real systemd, and in a virtual machine
	@echo "== lint";  $(MAKE) --no-print-directory lint
	@echo "== types"; $(MAKE) --no-print-directory types
	@echo "== containers"; $(MAKE) --no-print-directory roots
	@echo "== tests"; tests/run-tests $(VENV)/bin/python $(PYTEST_ARGS)

# One file, directory or test, `T=tests/cli/test_cli.py`, or all of that half.
T :=
FAST = $(if $(T),$(T),-n $(JOBS) --dist load --maxschedchunk 1 --ignore=tests/beds --ignore=tests/vm tests)
BEDS = $(if $(T),$(T),-n $(JOBS) --dist worksteal tests/beds)
VM = $(if $(T),$(T),tests/vm)

.PHONY: test-fast
test-fast: venv ## the tests without the containers, or one `make test-fast T=tests/cli/test_cli.py`
	@$(VENV)/bin/python -m pytest -q $(PYTEST_ARGS) $(FAST)

.PHONY: test-beds
test-beds: venv tools ## the tests in the containers, or one `make test-beds T=tests/beds/test_bed.py`
	@$(VENV)/bin/python -m pytest -q $(PYTEST_ARGS) $(BEDS)

.PHONY: screens
screens: venv tools ## write the screens in tests/screens/ anew, for a diff to look at: what the commands print
	@CONFEXT_WATCHER_REWRITE_SCREENS=1 $(VENV)/bin/python -m pytest -q $(PYTEST_ARGS) $$(grep -rl 'support.screens' tests --include='test_*.py')

.PHONY: test-vm
test-vm: venv tools ## the tests on Debian 13's kernel, in a virtual machine, or one of them by `T=`
	@$(VENV)/bin/python -m pytest -q --durations=10 $(PYTEST_ARGS) $(VM)

.PHONY: test-oldest
test-oldest: $(OLDEST)/.installed tools ## the tests without the containers, on Debian 13's versions
	@$(LIMIT) $(OLDEST)/bin/python -m pytest -q $(PYTEST_ARGS) $(FAST)

SECONDS :=
TARGET :=
.PHONY: fuzz
fuzz: ## all parsers under atheris, `make fuzz SECONDS=60 TARGET=superblock`
	@tests/run-fuzz $(if $(SECONDS),--seconds $(SECONDS)) $(if $(KEEP),--keep) $(TARGET)

.PHONY: race
race: venv tools ## for a minute, a drop directory's owner who does all that he can (as root)
	@PYTHONPATH=tests $(VENV)/bin/python -m race $(if $(SECONDS),--seconds $(SECONDS))

.PHONY: lint
lint: venv ## ruff, and who may import whom
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/lint-imports --no-cache --no-logo

.PHONY: types
types: venv ## mypy
	@$(VENV)/bin/mypy

.PHONY: demo
demo: venv tools ## the main job, shown
	@$(VENV)/bin/python contrib/demo.py

.PHONY: bench
bench: venv tools ## the figures, each beside its floor, or one part: `make bench PART=drops`
	@PYTHONPATH=tests $(VENV)/bin/python -m bench $(if $(OUTPUT),--output "$(OUTPUT)") $(PART)

.PHONY: bench-compare
bench-compare: venv tools ## what is slower than in a result of `make bench`: FILE=OLD.json, or also NEW=NEW.json
	@PYTHONPATH=tests $(VENV)/bin/python -m bench --compare "$(FILE)" $(if $(NEW),--new "$(NEW)") $(PART)

.PHONY: oracle
oracle: venv tools ## ask systemd again for the answers kept in tests/
	@PYTHONPATH=tests $(VENV)/bin/python -m oracle

SYSTEMD := 262
.PHONY: bed
bed: venv tools ## a shell in a container with real systemd, `make bed SYSTEMD=257`
	@PYTHONPATH=tests $(VENV)/bin/python -m beds.shell $(SYSTEMD)

.PHONY: vm
vm: venv tools ## a shell in the virtual machine with Debian 13's own kernel
	@PYTHONPATH=tests $(VENV)/bin/python -m vm.shell

.PHONY: roots
roots: venv tools ## build the root file systems of these containers, and the virtual machine
	@PYTHONPATH=tests $(VENV)/bin/python -m beds.roots && PYTHONPATH=tests $(VENV)/bin/python -m vm.machine

.PHONY: lock
lock: venv ## pin the newest versions again (needs uv)
	@compile="env -u PIP_FIND_LINKS uv pip compile --quiet --no-config --universal --upgrade --python-version 3.11 \
	    --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links --extra dev \
	    --custom-compile-command 'make lock' pyproject.toml"; \
	eval "$$compile --output-file requirements.lock" && \
	eval "$$compile --constraint constraints-debian13.txt --output-file requirements-debian13.lock"

.PHONY: clean
clean: ## remove what make made (root file systems of the containers stay in their cache)
	rm -rf $(VENV) $(OLDEST) .venv-fuzz .venv*.lock .fuzz build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

include contrib/packaging/packaging.mk
