PYTHON ?= python3
VENV := .venv

.PHONY: test demo demo-multiscene
# Two processes with a thread each take two thirds of the time of one process with two threads.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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
