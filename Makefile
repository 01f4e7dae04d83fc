# Every target sets itself up: the first one to run makes .venv with the versions in constraints.txt, and later ones find it ready.
# Needs Python 3.11, 3.12 or 3.13 (PYTHON=... picks one) and nothing else.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CANDIDATES := $(PYTHON) python3.11 python3.12 python3.13 python3
USABLE := import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
FIND_PYTHON = for p in $(CANDIDATES); do if $$p -c "$(USABLE)" > /dev/null 2>&1; then echo $$p; break; fi; done
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PEERS := .venv-peers .venv-peers-ppo .venv-peers-lf .venv-peers-lf-ppo

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint frozen parity bench bench-peers

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

setup: $(READY) ## make .venv with pinned versions

$(READY): pyproject.toml constraints.txt
	@set -e; \
	if ! $(BIN)/python -c "$(USABLE)" > /dev/null 2>&1; then \
		python=$$($(FIND_PYTHON)); \
		if [ -z "$$python" ]; then \
			echo "trueline needs Python 3.11, 3.12 or 3.13 with its venv module; install it, or name one: make PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$($$python --version)"; \
		$$python -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## fine-tune, reward model, PPO and DPO on data it writes itself; results in demo/
	$(BIN)/trueline demo --out demo

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## lint, then every fast test
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: $(READY) ## the tests that take minutes
	$(ONE_THREAD) $(BIN)/python -m pytest -q -m slow

frozen: $(READY) ## rewrite what the structure tests hold frozen: tests/structure/surface.txt, docs/configuration.md
	$(BIN)/python -m tests.structure.refresh

parity: $(READY) ## run the parity tests and write docs/parity.md from what they measured
	$(ONE_THREAD) $(BIN)/python -m tests.parity.page

# few rounds, so that all of it takes minutes: a figure that is quoted comes from the script itself. bench/gpu_*.py want a GPU to themselves
bench: $(READY) ## measure trueline in some minutes; JSON lines
	$(BIN)/python bench/startup.py --rounds 3
	$(BIN)/python bench/check.py --records 100000
	$(BIN)/python bench/cache.py --sizes 1000,10000
	$(BIN)/python bench/growth.py --rounds 3 --sizes 1000,100000
	$(BIN)/python bench/loss.py --rounds 1 --hidden 64
	$(BIN)/python bench/rounding.py --only merge --rates 1e-5
	$(BIN)/python bench/prefix.py --rounds 2 --case "long prompts"
	$(BIN)/python bench/packing.py --rounds 1 --batches 8
	$(BIN)/python bench/train.py --rounds 1
	$(BIN)/python bench/rollout.py --rounds 1 --models qwen2 --cases 0 2

bench-peers: $(READY) ## measure trueline beside TRL, transformers and LLaMA-Factory; JSON lines and a table (ARGS=--write puts it into the docs)
	-$(MAKE) --keep-going $(PEERS:=/.ready)
	$(BIN)/python bench/peers/compare.py $(ARGS)

# a peer that cannot be installed is left out, and the table says so
.venv-peers/.ready: bench/peers/requirements.txt
.venv-peers-ppo/.ready: bench/peers/requirements-ppo.txt
.venv-peers-lf/.ready: bench/peers/requirements-lf.txt
.venv-peers-lf-ppo/.ready: bench/peers/requirements-lf-ppo.txt
$(PEERS:=/.ready): $(READY)
	$(BIN)/python -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-input --disable-pip-version-check --requirement $(filter %.txt,$^) \
		|| { rm -rf $(@D); exit 1; }
	@touch $@
