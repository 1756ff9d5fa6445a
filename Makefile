# Everything happens in .venv with plain pip; torch is the exact version of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs schema clean
demo: .venv/installed
	$(BIN)/tokenbound demo --output runs/demo

test: .venv/installed-test
	$(BIN)/python -m pytest

check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict -d site

schema: .venv/installed
	$(BIN)/python -c 'import json; from tokenbound import Certificate; print(json.dumps(Certificate.model_json_schema(), indent=1))' > tokenbound/data/certificate.schema.json

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokenbound needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# torch first and by exact version: a range may pull in gigabytes of CUDA libraries.
.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info runs
