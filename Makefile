# make demo | test | check | docs | gpu | test-kernels | test-slow | test-gpu | test-browser | test-slurm | test-originals | test-oldest | wheel | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs gpu format test-kernels test-slow test-gpu test-browser test-slurm test-originals test-oldest wheel clean
demo: $(VENV)/ready
	$(BIN)/rome demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not slow and not gpu and not browser"

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-kernels: $(VENV)/ready  # the suite with the kernels of other CPUs and with 2 threads; half an hour
	VENV=$(VENV) .ci/kernels

test-slow: $(VENV)/ready  # the commands of every page, every experiment's memory, runs that are killed: about 40 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m slow

test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -m gpu

DATA ?=
MINUTES ?= 12
gpu: $(VENV)/ready  # DATA=folder of CIFAR-10: what only a GPU shows, in MINUTES=12; the result is the folder gpu
	$(BIN)/python -m benchmarks.gpu --minutes $(MINUTES) $(if $(DATA),--data $(DATA))

test-browser: $(VENV)/ready  # needs chromium (apt install chromium, or its path in CHROMIUM); adds Gradio and Playwright
	@test -n "$(CHROMIUM)" || command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { echo "the page's tests need chromium: apt install chromium, or make test-browser CHROMIUM=/path/to/it"; exit 2; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[browser]"
	CHROMIUM="$(CHROMIUM)" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/report/test_explore_browser.py

test-slurm: $(VENV)/ready  # launchers, also submitit's, on a SLURM that pretends; adds submitit to the environment
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[slurm]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/runs/test_launchers.py

test-originals: $(VENV)/ready  # the unseen attacks beside the packages they were published in
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/originals \
		advex-uar==0.0.6.dev0 perceptual-advex==0.2.6 recoloradv==0.0.1 six==1.17.0 torchattacks==3.5.1
	PYTHONPATH=$(VENV)/originals OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/attacks/test_originals.py

test-oldest:  # the suite with the oldest versions that pyproject.toml allows, in an environment of its own
	@$(PYTHON) -m venv $(VENV)/oldest
	@$(VENV)/oldest/bin/pip install --quiet --disable-pip-version-check uv
	@$(VENV)/oldest/bin/uv pip install --quiet --python $(VENV)/oldest/bin/python --resolution lowest-direct --editable ".[dev]"
	OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -W default -m "not slow and not gpu and not browser"

docs: $(VENV)/docs  # the site, into the folder site: a page for each experiment, the API, notebooks that are run; no network
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs site
	@echo "open site/index.html"

$(VENV)/docs: $(VENV)/ready
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	@touch $@

wheel: $(VENV)/ready  # sdist and wheel into dist, and the wheel alone in an empty folder; WHEEL=full: with the whole demo
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt build twine
	VENV=$(VENV) .ci/wheel $(WHEEL)

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rome needs Python >= 3.11; this is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@echo "making the environment in $(VENV) (a few minutes: torch is large) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
