# make demo   a silent video gets its sound (demo.mp4, demo.png)
# make test   notebooks agree with the modules, all is formatted and clean, every notebook runs, then pytest
# make lab    JupyterLab on the notebooks
# make readme README.md from nbs/index.ipynb
# make clean  remove what these commands made
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lab readme clean
.DEFAULT_GOAL := demo

$(STAMP): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" if sys.version_info<(3,11) else 0)'
	@echo 'setting up $(VENV); the first time takes some minutes'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,train,data,lora]'
	@touch $@

demo: $(STAMP)
	$(BIN)/smooth-foley demo --overwrite

test: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/nbs.py check
	$(BIN)/ruff format --check --quiet . || { echo 'not formatted: run ruff format .'; exit 1; }
	$(BIN)/ruff check --quiet . || { echo 'not clean: run ruff check .'; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/nbs.py test
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -q tests

lab: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter lab nbs

readme: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/nbs.py readme

clean:
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache demo.mp4 demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
