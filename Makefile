# Every target is enough on its own on a fresh clone: it creates .venv first (a second time that takes no time).
# Variables of scripts/setup_env.sh work here: make setup PYTHON=python3.12 TORCH=cpu EXTRAS=dev

VENV_PYTHON := .venv/bin/python

# The tests need no model hub and leave the user's own caches alone.
TEST_ENVIRONMENT = HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$(CURDIR)/.cache/huggingface" \
	TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
PYTEST = $(TEST_ENVIRONMENT) $(VENV_PYTHON) -m pytest
# Most tests keep one core busy at a time. A file's tests stay on one worker: they share what its fixtures built.
WORKERS ?= 2
SHELL_SCRIPTS = $(wildcard scripts/*.sh bench/*.sh) .ci/run

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-chat test lint format types pytest test-gpu test-slow test-faults bench wheel clean clean-env

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## create .venv and install everything (PYTHON=, TORCH= and EXTRAS= choose)
	@bash scripts/setup_env.sh

demo: setup ## train a real encoder in three locales with LoRA, merged every epoch, and compare: on this machine
	@bash scripts/demo.sh

demo-chat: setup ## train a real 135 M language model with LoRA on real conversations, on this machine
	@bash scripts/demo_chat.sh

test: lint types pytest ## lint, types and the tests (all but slow and gpu)

lint: setup ## ruff and shellcheck
	$(VENV_PYTHON) -m ruff check --output-format concise .
	$(VENV_PYTHON) -m ruff format --check --output-format concise .
	.venv/bin/shellcheck $(SHELL_SCRIPTS)

format: setup ## let ruff rewrite what it can
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

types: setup ## pyright
	$(VENV_PYTHON) -m pyright

pytest: setup
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow and not gpu"

test-gpu: setup ## the tests that need a CUDA device
	$(PYTEST) -m gpu

test-slow: setup ## the tests that take long
	$(PYTEST) -m "slow and not gpu"

test-faults: setup ## the tests that kill, corrupt or starve a run on purpose
	$(PYTEST) -m "faults and not gpu"

bench: setup ## list the benchmarks; make bench RUN=NAME runs one
ifdef RUN
	$(VENV_PYTHON) bench/$(RUN).py
else
	@$(VENV_PYTHON) -c 'import ast, pathlib; [print(p.stem.ljust(24), (ast.get_docstring(ast.parse(p.read_text())) or "").partition("\n")[0]) for p in sorted(pathlib.Path("bench").glob("*.py"))]'
endif

wheel: setup ## build dist/meldkit-*.whl
	$(VENV_PYTHON) -m build --wheel --no-isolation

clean: ## delete build outputs and tool caches (not .venv, .cache and runs)
	rm -rf build dist meldkit.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

clean-env: ## delete .venv
	rm -rf .venv
