# `make demo` and `make test` set up everything they need in .venv; nothing has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo

.PHONY: demo test pytest slow docs lint clean release oldest

# torch first and on its own: the pinned build, before anything could ask for another one. Modules are compiled when they are
# imported, most never are.
PIP := -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) torch torchvision
	$(BIN)/python $(PIP) -e ".[dev]"
	touch $@

# The main job on the embedded model, shortened to minutes. z_d starts as the base's own latent, and stage 2 is gentle: it moves
# little from step 0, which is the pretrained model. The polish lets the decoder do with the detail of so short a training.
demo: $(STAMP)
	$(BIN)/davae upgrade micro --out $(OUT) \
		--set stage1.start=unfolded --set stage1.max_steps=130 \
		--set stage1.polish.max_steps=90 --set stage1.polish.lr=1e-3 --set stage1.polish.noise=0.15 --set stage1.polish.detail_noise=1.0 \
		--set stage2.max_steps=60 --set stage2.lr=1e-4 --set stage2.warmup_steps=15 --set stage2.lr_cycles=1 \
		--set stage2.detail_residual=true --set cache.variants=2 --set report.holdout_pictures=48

# Both at once: pyright alone keeps one core for more than a minute.
test: $(STAMP)
	$(MAKE) --no-print-directory -j2 lint pytest

# tiny models gain nothing from threads: one process a core, one thread each
pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# the examples and the notebook, as written, and what needs more packages
slow: $(STAMP)
	$(BIN)/python $(PIP) -e ".[int8]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# the documentation, into build/site
docs: $(STAMP)
	$(BIN)/python $(PIP) -e ".[docs]"
	$(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

# a checked and tagged release in dist/: make release VERSION=0.2.0
release: $(STAMP)
	$(BIN)/python scripts/release.py $(VERSION)

# the oldest versions that pyproject.toml allows, in an environment of their own
oldest:
	$(PYTHON) scripts/oldest.py build/oldest

clean:
	rm -rf $(VENV) runs build src/*.egg-info
