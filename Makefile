PYTHON ?= python

.PHONY: check format lint types cpp-format tests build

check: lint types cpp-format tests

build:
	$(PYTHON) setup.py build_ext --inplace

format:
	ruff format .
	ruff check --fix .
	clang-format -i $$(git ls-files '*.cpp' '*.h')

lint:
	ruff format --check .
	ruff check .

types:
	mypy

cpp-format:
	clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

tests:
	$(PYTHON) -m pytest
