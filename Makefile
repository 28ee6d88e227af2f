PYTHON ?= python3
VENV := .venv

.PHONY: test
test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@
