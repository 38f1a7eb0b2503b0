# Each target does all of its set-up in .venv from nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow chaos autoscaling lint clean

demo: $(VENV)/ready ## the main job: real text -> proxies -> fit -> choice -> proof -> plan and report
	$(BIN)/rayx run experiments/quickstart.py

test: $(VENV)/ready ## the tests, under 8 minutes on 2 cores
	$(BIN)/python -m pytest -n 2 --dist loadgroup

slow: $(VENV)/ready ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

chaos: $(VENV)/ready ## 200 packs while workers, nodes, the driver and the S3 server are killed
	$(BIN)/python experiments/bench/chaos.py

autoscaling: $(VENV)/ready ## Ray's autoscaler on this machine: nodes come, trials spread, nodes go
	mkdir -p runs
	$(BIN)/python experiments/bench/autoscaling.py --plot runs/autoscaling.png

lint: $(VENV)/ready ## formatter, linter, type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,sample]'
	touch $@

clean:
	rm -rf $(VENV) data runs
