# make test   everything a change must pass, from nothing        make demo   a tour of what hubtool does
# make check  the quick part: style and types                    make docs   regenerate the blocks of README.md
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export OMP_NUM_THREADS := 1

.PHONY: test check docs demo wheel clean

test: check
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m tests.readme

demo: $(STAMP)
	$(BIN)/python -m tests.demo

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist

# One environment with exact versions; made anew when the pins or the package's metadata change.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q hubtool  # as pip does with what it copies: start-up is a fifth shorter
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
