# `make demo` and `make test` install all they need into .venv; nothing else on the machine changes.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test lint clean

demo: $(VENV)/ready
	$(VENV)/bin/python examples/demo.py

# Threads of two processes on a few cores wait for each other at every small product: many times as long as one thread.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/ready: pyproject.toml setup.py tools/make_venv.py
	$(PYTHON) tools/make_venv.py $(VENV) --extra test
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
