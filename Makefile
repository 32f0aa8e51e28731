# Two commands: `make run` sets everything up and runs the demo; `make test` sets everything up and runs every check.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: run test lint types house pytest gpu clean

run: $(VENV)/.run
	$(BIN)/mmpipe run quickstart --mode overwrite

test: $(VENV)/.test
	$(MAKE) --no-print-directory lint house pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Static checks read the wheel as a user gets it: no tool follows the mapping of an editable install.
house: $(VENV)/.test
	$(BIN)/python tests/house.py build/house
	cd build/house && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p mmpipe
	cd build/house && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --no-cache

# OpenVINO's tests in a process of their own: with its threads loaded, a pytest-xdist worker does not outlive the signals
# that tests/jobs send it (a job does: it ends with 130 and keeps its shards).
pytest: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/graphs/test_openvino.py
	$(BIN)/python -m pytest tests/graphs/test_openvino.py

# What no CPU can show.
gpu: $(VENV)/.test
	@$(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" \
		|| { echo "torch sees no NVIDIA GPU here: nothing was run"; exit 1; }
	$(BIN)/python -m pytest -m gpu

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing mmpipe and torch into $(VENV): about a minute and 5 GB on Linux"
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "installing what the checks need into $(VENV)"
	$(PIP) -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
