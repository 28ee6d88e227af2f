PYTHON ?= python3
VENV := .venv

.PHONY: test demo demo-multiscene
test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py

demo-multiscene: $(VENV)/installed
	$(VENV)/bin/python demo.py --multiscene

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@
