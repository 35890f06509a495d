# From a clone to a working policy:  make demo
# Versions are exact (constraints.txt): without a pin, pip may take a newer torch than the one tested.  The simulator's pinned
# version (success rates depend on it) is built for Python 3.11 to 3.13.

PYTHON ?= python3
TASK ?= drawer-open-v3
TEST = .venv/bin/python -m pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install test demo lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/.installed ## create .venv and install wam into it, with the simulator, training, LoRA, DeepSpeed, server and development extras

.venv/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no '$(PYTHON)'; install Python 3.11, 3.12 or 3.13, or name it: make install PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "make: wam needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1); choose another: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) cannot create virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@test -x .venv/bin/pip || $(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --disable-pip-version-check -c constraints.txt -e '.[sim,train,dev,lora,deepspeed,serve]'
	@touch $@

test: install ## run the tests
	$(TEST)

demo: install ## collect, train, drive and report one task: make demo TASK=door-open-v3
	.venv/bin/wam demo --task $(TASK)

lint: install ## check style and types
	.venv/bin/ruff check .
	.venv/bin/mypy

clean: ## remove .venv and caches; runs/ and data/ are kept
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
