# Two commands for a fresh machine: `make demo` and `make test`. Each sets up everything it needs in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := outputs/$(if $(DATA),own,demo)
# Pins first, so that a CPU-only machine takes the torch it was told to.
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow lint bench venv clean

venv: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	$(PY) -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

# `make demo DATA=folder`: the same on your own DICOM or NIfTI; DEMO=folder: results there, for a second set of data
demo: $(STAMP)
	$(PY) demo.py --output $(DEMO) $(if $(DATA),--data "$(DATA)")

# one thread each: two workers share the cores, and threads that wait for a core spin
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not slow' -n 2 --durations=5

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -n 2 --durations=10

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)
	$(PY) benchmarks/vqgan.py --json outputs/bench_vqgan.json
	$(PY) benchmarks/patches.py --json outputs/bench_patches.json
	$(PY) benchmarks/dicom.py --json outputs/bench_dicom.json
	$(PY) benchmarks/stitch.py --json outputs/bench_stitch.json
	$(PY) benchmarks/seams.py --json outputs/bench_seams.json
	$(PY) benchmarks/full_resolution.py --json outputs/bench_full_resolution.json
	$(PY) benchmarks/ddpm.py --json outputs/bench_ddpm.json
	$(PY) benchmarks/inference.py --json outputs/bench_inference.json

clean:
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache
