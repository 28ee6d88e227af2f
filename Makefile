PYTHON ?= python3
VENV := .venv

.PHONY: test soak lint gpu demo demo-multiscene
# Two processes with a thread each take two thirds of the time of one process with two threads.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Long tests: kills, damaged files, many steps. Fewer of them: make soak SOAK_KILLS=1 SOAK_DAMAGE=24 SOAK_STEPS=200
soak: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -s tests/soak

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports

# Whether everything works on a GPU, and how fast: at most 25 minutes.
gpu: $(VENV)/installed
	$(VENV)/bin/python -m bench.gpu

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py

demo-multiscene: $(VENV)/installed
	$(VENV)/bin/python demo.py --multiscene

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(VENV)/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
