# Each target sets up what it needs; a second call costs nothing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: install demo test quick chaos bench gpu lint types check manual pictures clean

install: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip # --group needs pip 25.1
	$(BIN)/python -m pip install --quiet --editable '.[all]' --group dev
	-npm install --silent --ignore-scripts --prefix .venv onnxruntime-node sharp # for one test, if npm is here
	touch $(READY)

demo: install
	$(BIN)/rkd demo --overwrite

# one process a core, each of one thread: in half the time of one process with all of them
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST)

quick: install
	$(PYTEST) -m 'not slow'

chaos: install
	$(BIN)/python tests/chaos.py

# `rkd bench`, then what measures figures of the manual's pages; fidelity trains 16 students, which takes hours
bench: install
	$(BIN)/rkd bench
	for name in teachers embed search serve chunks processes fidelity; do $(BIN)/python tests/bench/$$name.py || exit 1; done

# for a machine with an NVIDIA GPU, cut to nine minutes; with torch there and no network: make gpu READY= BIN=/its/bin
gpu: install
	$(BIN)/python -m pytest -m cuda
	$(BIN)/python -m rkd_cli bench gpu --out gpu.json

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

# the page of every flag, and the README's pictures
manual: install
	$(BIN)/python -m rkd_cli.manual > rkd_cli/manual/flags.md

pictures: install
	$(BIN)/python .github/pictures/make.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
