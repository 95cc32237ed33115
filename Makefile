# Two commands matter: `make quickstart` and `make test`. Both create .venv first and can be run again at any time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/quickstart
# a CUDA build of torch brings the Triton it was made for; beside a CPU build the tests of the kernels need this one
TRITON := triton==3.6.0

.PHONY: install quickstart test test-kernels test-rooms test-walk lint format walk clean

install: $(STAMP)

# torch comes first: packages that depend on it must not choose another build
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; give another with PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --disable-pip-version-check $(TRITON)
	touch $(STAMP)

quickstart: install
	$(BIN)/dig-scale run quickstart --out $(RUN)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

# two cores busy for about as long: the rooms beside the kernels in Triton's interpreter and then the walk
test: install
	$(MAKE) -j2 -k --output-sync test-rooms test-kernels test-walk

test-kernels:
	$(PYTEST) tests/dig_kernels

test-rooms:
	$(PYTEST) tests --ignore=tests/dig_kernels --ignore=tests/walk --ignore=tests/truth

test-walk:
	$(PYTEST) tests/walk tests/truth

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

walk: install
	$(BIN)/python benchmarks/walk.py --json benchmarks/results/walk-$$(date +%F).json

clean:
	rm -rf $(VENV) runs dist build
