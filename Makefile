# Everything sets itself up in .venv; a second run finds it done.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || command -v python)
BIN := .venv/bin
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)  # as in a container

.PHONY: lab run test lint page browser release slides grade clean

# the student version, in release/; what has been worked on there is kept
lab: release
	$(BIN)/jupyter lab $(ROOT) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/release/00_lora_in_thirty_minutes.ipynb

run: .venv/.base
	$(BIN)/python tools/run_notebooks.py

# Two workers of one thread each, a whole file each at a time: what its tests share is made once, and a notebook stays
# in its kernel. A home that can be written to whoever calls, in which matplotlib's fonts are listed beforehand: what it
# says while it lists them, and what it says where it may not, would stand in a notebook's outputs.
SCRATCH := $(or $(TMPDIR),/tmp)/minilora-$(shell id -u)
TESTED := HOME=$(SCRATCH) MPLCONFIGDIR=$(SCRATCH) HYPOTHESIS_STORAGE_DIRECTORY=$(SCRATCH)/hypothesis OMP_NUM_THREADS=1
PYTEST := $(TESTED) $(BIN)/python -m pytest -p no:cacheprovider -n 2 --dist loadfile --durations 15

test: .venv/.dev lint browser
	mkdir -p -m 700 $(SCRATCH)
	$(TESTED) $(BIN)/python -c "import matplotlib.font_manager"
	$(PYTEST) tests
	$(PYTEST) --nbval --nbval-current-env notebooks

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright --project pyproject.toml --pythonpath $(BIN)/python

# the calculator as a folder of static files, site/, for any web server
page: .venv/.base node_modules/.done
	$(BIN)/python tools/page_site.py

# Python for the browser, and the check of accessibility: where npm cannot bring them, the tests that need them are skipped
browser:
	@$(MAKE) --no-print-directory node_modules/.done || echo "npm brings nothing here: the page is not tested in Pyodide"

node_modules/.done: package.json package-lock.json
	npm ci --no-audit --no-fund --fetch-retries 1
	touch $@

release: .venv/.base
	$(BIN)/python -m minilora.release notebooks release

# slides of all notebooks, with the lesson plans as speaker notes, in slides/
slides: .venv/.base
	$(BIN)/python tools/slides.py slides

# make grade DIR=submissions
grade: .venv/.base
	$(BIN)/python -m minilora.grade $(if $(DIR),"$(DIR)",$(error make grade DIR=FOLDER, the folder of the submissions))

clean:
	rm -rf .venv

.venv/.base: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

.venv/.dev: .venv/.base requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
