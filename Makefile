# make demo   a silent video gets its sound: demo.mp4, demo.png (about 3 min with the set-up)
# make test   notebooks agree with the modules, all is formatted and clean, every notebook runs, then pytest
#             (16 to 30 min on two cores; it says at the end how long it took)
# make lab    JupyterLab at the root of the repository, so that links between pages work
# make readme README.md from nbs/index.ipynb
# make clean  remove what these commands made
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BEGAN  := $(VENV)/.test_began

.PHONY: demo test lab readme clean
.DEFAULT_GOAL := demo

$(STAMP): $(CONSTRAINTS) settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" if sys.version_info<(3,11) else 0)'
	@echo 'setting up $(VENV); the first time takes some minutes'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,train,data,lora]'
	$(BIN)/python tools/first_import.py
	@touch $@

demo: $(STAMP)
	$(BIN)/smooth-foley demo --overwrite

test: $(STAMP)
	@date +%s > $(BEGAN)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/nbs.py check
	$(BIN)/ruff format --check --quiet . || { echo 'not formatted: run ruff format .'; exit 1; }
	$(BIN)/ruff check --quiet . || { echo 'not clean: run ruff check .'; exit 1; }
	$(BIN)/ruff check --quiet --isolated --select F821 smooth_foley
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/nbs.py test
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --timeout 900 --durations 12 tests
	@seconds=$$(($$(date +%s) - $$(cat $(BEGAN)))); echo "make test took $$((seconds / 60)) min $$((seconds % 60)) s"

lab: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" nbs/index.ipynb

readme: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/nbs.py readme

clean:
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache demo.mp4 demo.png nbs/sample_foley.mp4
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
