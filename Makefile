# Two commands do everything on a fresh machine with Python 3.11 to 3.13: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export MPLBACKEND = Agg

.PHONY: demo test test-slow test-parity lint format smoke setup clean

## Set up, train three arms of one small model, compare them, write runs/demo/report.html. Run again to resume.
demo: $(VENV)/.core
	$(BIN)/python demo.py

## Set up, lint, check import contracts, run all tests but the slow ones.
test: lint
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not parity"

## The tests that take minutes each, those of the TPU compiler included (installs libtpu into the same environment).
test-slow: $(VENV)/.tpu
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

## Against the transformers library itself (installs torch, for CPU, into the same environment).
test-parity: $(VENV)/.parity
	$(BIN)/python -m pytest -m parity

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## The core install alone trains, resumes, evaluates and compares a few steps: what CI runs on a second Python.
smoke: $(VENV)/.core
	rm -rf runs/smoke
	$(BIN)/python train.py --config=configs/tiny.py:residual=block $(SMOKE) --workdir=runs/smoke/block
	$(BIN)/python train.py --config=configs/tiny.py:residual=block $(SMOKE) --workdir=runs/smoke/block
	$(BIN)/python train.py --config=configs/tiny.py:residual=residual $(SMOKE) --workdir=runs/smoke/residual
	$(BIN)/python eval.py --workdir=runs/smoke/block
	$(BIN)/python compare.py runs/smoke/residual runs/smoke/block --report=runs/smoke/report.html
SMOKE = --config.training.steps=6 --config.optimizer.warmup_steps=2 --config.training.eval_every=3 \
	--config.training.eval_sequences=8 --config.model.num_layers=2 --config.model.width=32 --config.model.mlp_width=64 \
	--config.model.depth.block_size=2 --config.data.sequence_length=64

setup: $(VENV)/.dev

clean:
	rm -rf $(VENV) .cache runs build *.egg-info

$(VENV)/.core: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  f"Python 3.11 to 3.13 is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(VENV)/.tpu: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[tpu]"
	touch $@

$(VENV)/.parity: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 "transformers==5.23.*"
	touch $@
