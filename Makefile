# On a fresh clone, `make quickstart` and `make test` install what they need.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TEST_WORKERS ?= 2
PARALLEL := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install install-te quickstart test test-long coverage mutants faults gpu gpu-wheels lint docs release clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

install: $(VENV)/.installed  ## create .venv and install; PyTorch for the NVIDIA driver, or for CPU without one

install-te: $(VENV)/.installed  ## build Transformer Engine for the PyTorch in .venv; needs the CUDA toolkit
	@PYTHON=$(PYTHON) tools/install.sh $(VENV) te

quickstart: $(VENV)/.installed  ## run the whole chain on a small corpus, from raw text to generated text
	@$(RUN) examples/quickstart/run.py $(QUICKSTART_FLAGS)

test: $(VENV)/.installed-dev  ## run the tests, except the long ones
	@$(RUN) -m pytest -m "not long" $(PARALLEL) $(PYTEST_FLAGS)

test-long: $(VENV)/.installed-dev  ## run the long tests: Slurm clusters, injected faults, layouts on many processes
	@$(RUN) -m pytest -m long $(PARALLEL) $(PYTEST_FLAGS)

coverage: $(VENV)/.installed-dev  ## run these tests and the injected faults, and print the coverage of each file
	@$(RUN) -m pytest -m "not long or fault" $(PARALLEL) --cov --cov-branch --cov-report=term $(PYTEST_FLAGS); \
		code=$$?; rm -f .coverage.*; exit $$code  # files of processes that end after the report

mutants: $(VENV)/.installed-dev  ## change the source in 300 small ways, and list those that no test notices
	@$(RUN) -m tools.mutants $(MUTANTS_FLAGS)

faults: $(VENV)/.installed-dev  ## run the long fault suite and write its counts to docs/reliability.md
	@FAULT_KILLS=$${FAULT_KILLS:-200} FAULT_RESULTS=fault_results.json $(RUN) -m pytest \
		-m fault -p tests.support.fault_results $(PYTEST_FLAGS)
	@$(RUN) -m tests.faults.report fault_results.json docs/reliability.md

gpu:  ## measure on one GPU, in under 9 minutes: losses, speed, memory, saves (docs/performance.md)
ifneq ($(wildcard wheels/*.whl),)
	@$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade \
		--target .gpu_packages wheels/*.whl
	@PYTHONPATH=.gpu_packages $(PYTHON) -m benchmarks.gpu $(GPU_FLAGS)
else
	@$(MAKE) --no-print-directory $(VENV)/.installed
	@$(RUN) -m benchmarks.gpu $(GPU_FLAGS)
endif

gpu-wheels: $(VENV)/.installed  ## download what `make gpu` needs on a machine without a network
	@$(RUN) -m benchmarks.gpu.wheels wheels $(GPU_WHEELS_FLAGS)

lint: $(VENV)/.installed-dev  ## check style and types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

release:  ## build wheel and sdist of HEAD, install each in a clean environment and run the quickstart
	@$(PYTHON) -m tools.release $(RELEASE_FLAGS)

docs: $(VENV)/.installed-dev  ## build the site of the documentation into site/, and fail on any warning
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --site-dir site

clean:  ## remove the output of the quickstart (keeps .venv)
	rm -rf quickstart_output

$(VENV)/.installed: pyproject.toml setup.py tools/install.sh
	@PYTHON=$(PYTHON) tools/install.sh $(VENV)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@PYTHON=$(PYTHON) tools/install.sh $(VENV) dev
	@touch $@
