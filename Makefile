# Every target sets up what it needs; VENV may name an environment that exists already, and TRACE a CSV file for
# bench/engine_trace.py.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cksum < pyproject.toml | cut -d' ' -f1)

.PHONY: install demo demo-chat test test-faults soak test-clients test-ray check lint bench audit clean

install: $(STAMP)

$(STAMP): pyproject.toml
	PYTHON=$(PYTHON) VENV=$(VENV) sh scripts/install.sh
	@rm -f $(VENV)/.installed-* && touch $@

demo: install
	$(BIN)/tpserve demo

# A small instruct model, through its own chat template: a question, an answer. TP=3, FRONT=serve.
demo-chat: install
	$(BIN)/tpserve demo_chat --tensor_parallel_size $(or $(TP),2) --front $(or $(FRONT),torchserve)

# Three at a time, also on two cores: much of the suite's time is waiting for processes. One thread each: teams of several would spend
# the cores on waiting for each other.
test: install $(VENV)/interpreted
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3

$(VENV)/interpreted: scripts/triton.sh | $(STAMP)
	VENV=$(VENV) sh scripts/triton.sh

# What `make test` has no time for: every fault on both fronts (it has a few), every TP size up to 8, `demo-chat`; `soak`: half an hour
# of faults, FRONT=torchserve, MINUTES=10.
test-faults: install
	$(BIN)/python -m pytest -m faults

soak: install
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),30) --clients 16 --front $(or $(FRONT),serve)

# Other people's clients against both fronts: npm, Chromium (apt-get install chromium) and ten minutes; see docs/clients.md.
test-clients: install
	$(BIN)/python -m tests.clients.run $(CLIENTS)

# deploy/ray_serve.py: two groups on this machine, one of which dies. Ray gets an environment of its own.
test-ray: install
	test -x $(VENV)/ray/bin/serve || VENV=$(VENV) sh scripts/ray-env.sh
	$(VENV)/ray/bin/python -m pytest tests/deploy/test_ray_serve.py

check: install lint
	sh scripts/typecheck.sh $(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python -m tpserve.bench.convert_memory
	$(BIN)/python -m tpserve.bench.load_bytes
	$(BIN)/python -m tpserve.bench.engine_overhead
	$(BIN)/python -m tpserve.bench.chunked_prefill
	$(BIN)/python -m tpserve.bench.prefix_cache
	$(if $(TRACE),$(BIN)/python -m tpserve.bench.engine_trace --trace $(TRACE))

# Needs a network; SERVICE=osv asks osv.dev instead of PyPI. What is ignored, and why: scripts/audit-ignored.txt.
audit: install
	$(BIN)/python scripts/audit.py $(BIN)/python $(SERVICE)

clean:
	rm -rf $(VENV) build
