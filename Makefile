# make serve   set everything up, then serve the embedded model with PSA on 127.0.0.1:$(PORT)
# make test    set everything up, then pass the tests (and the linters)
# make bench-ops   time of every op against torch and the machine's bandwidth: out/bench_ops.json,
#              out/bench_ops.md, out/bench_ops.png; some 10 minutes; QUICK=1: under a minute
# make bench-serving   whole engines, side by side: out/bench_serving.json, about 40 minutes;
#              VLLM_PYTHON=FILE: the Python of an environment with vLLM's CPU build (.venv-vllm);
#              QUICK=1: a few minutes; FULL=1: 32k tokens of a larger model too, many hours;
#              RESUME=1: keeps the finished cases of an earlier run
# make bench-memory   servers with KV on two tiers against all-resident ones: out/bench_memory.json,
#              out/bench_memory.md, residency by layer in out/bench_memory.png; about half an hour;
#              QUICK=1: short prompts; RESUME=1: keeps the finished servers of an earlier run
# make soak MINUTES=30   random load on a server with KV on two tiers; fails on a leak or a wrong
#              answer; SEED=N: another load
# make vllm-env   an environment for vLLM's CPU build, in .venv-vllm
# make audit   requested against achieved coverage, to out/audit.json (QUICK=1: under a minute)
# make calibrate MODEL=DIR   the prior of the budget prediction, to out/budget_prior.json
# make lint    ruff and mypy
# make eval    accuracy against bytes read of the embedded model: out/eval.json, out/report.html;
#              resumable, about an hour on 2 cores; QUICK=1: a few minutes
SHELL := /bin/bash
PORT ?= 30000
WORKERS ?= 2
MINUTES ?= 30
SEED ?= 0
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
VENV := .venv
VLLM_VENV := .venv-vllm
VLLM_PYTHON ?= $(wildcard $(VLLM_VENV)/bin/python)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UV_VERSION := 0.13.8
# Byte code is kept in the environment: a server imports 5,000 modules in each of its processes.
unexport PYTHONDONTWRITEBYTECODE
LINTED := sgl_psa python kernels test benchmark setup.py

.PHONY: setup serve test test-fast test-server eval audit calibrate bench-ops bench-serving \
	bench-memory soak vllm-env lint format clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: install it, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m sgl_psa_kernels._native.build
	touch $(READY)

serve: $(READY)
	@exec $(BIN)/python -m sglang_psa.serve --port $(PORT)

test: lint
	$(BIN)/python -m pytest test -n $(WORKERS) --dist loadgroup --durations 20

test-fast: $(READY)
	$(BIN)/python -m pytest test -m "not server"

test-server: $(READY)
	$(BIN)/python -m pytest test -m server

audit: $(READY)
	$(BIN)/python -m sgl_psa.audit --out out $(if $(filter-out 0,$(QUICK)),--quick)

calibrate: $(READY)
	$(BIN)/python -m sgl_psa.calibrate --out out/budget_prior.json $(if $(MODEL),--model $(MODEL))

eval: $(READY)
	$(BIN)/python -m sgl_psa.evaluate --out out $(if $(filter-out 0,$(QUICK)),--quick)

bench-ops: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmark.ops --out out $(if $(filter-out 0,$(QUICK)),--quick)

bench-serving: $(READY)
	$(BIN)/python -m benchmark.serving --out out --vllm-python $(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python) \
		$(if $(filter-out 0,$(RESUME)),--resume) \
		$(if $(filter-out 0,$(QUICK)),--quick,$(if $(filter-out 0,$(FULL)),--full))

bench-memory: $(READY)
	$(BIN)/python -m benchmark.memory --out out $(if $(filter-out 0,$(RESUME)),--resume) \
		$(if $(filter-out 0,$(QUICK)),--quick)

soak: $(READY)
	$(BIN)/python -m benchmark.soak --out out --minutes $(MINUTES) --seed $(SEED)

vllm-env: $(READY)
	$(BIN)/uv venv --allow-existing --python $(PYTHON) $(VLLM_VENV)
	$(BIN)/uv pip install --python $(VLLM_VENV)/bin/python \
		--override benchmark/serving/vllm_env/overrides.txt \
		--requirement benchmark/serving/vllm_env/requirements.txt
	$(VLLM_VENV)/bin/python -c 'import vllm; print("vLLM", vllm.__version__)'

lint: $(READY)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

clean:
	rm -rf $(VENV) $(VLLM_VENV) *.egg-info build dist
