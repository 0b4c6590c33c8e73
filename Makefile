# Each target sets up what it needs in .venv, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := groupvit_common groupvit_torch groupvit_tf conversion benchmarks docs/figures.py examples tests

# Those over all backends that ask nothing of TensorFlow itself.
JAX_TESTS := tests/groupvit_tf/test_jax.py tests/segmentation/test_segmenter.py \
  $(patsubst %,tests/model/test_%.py,parity model parameters outputs checkpoint)

.PHONY: help demo browser chromium test test-slow test-jax test-peers bench bench-peers bench-gpu bench-growth serve docs figures release-check lint format train-demo parity clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/torch.stamp ## Segment two fresh pictures with the bundled model; needs no network after the set-up.
	@$(BIN)/groupvit demo --out demo_output

# Tests of pages need these beyond Python, and are skipped without. Of onnxruntime-web, the files that a page loads.
ORT_WEB := 1.30.0
ORT_WEB_FILES := ort.wasm.bundle.min.mjs ort-wasm-simd-threaded.wasm
browser: chromium $(VENV)/web/$(ORT_WEB).stamp ## Get Chromium (root, apt-get) and onnxruntime-web (npm), for tests of pages.

chromium:
	@for name in "$$GROUPVIT_CHROMIUM" chromium chromium-browser google-chrome google-chrome-stable chrome; do \
	  if [ -n "$$name" ] && command -v "$$name" > /dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" != 0 ]; then echo "no Chromium: install your system's (Debian: apt-get install chromium)"; exit 1; fi; \
	export DEBIAN_FRONTEND=noninteractive; timeouts="-o Acquire::Retries=1 -o Acquire::http::Timeout=20"; \
	apt-get $$timeouts -qq update && apt-get $$timeouts -qq install --yes --no-install-recommends chromium > /dev/null

$(VENV)/web/$(ORT_WEB).stamp: | $(BIN)/python
	@rm -rf $(VENV)/web && mkdir -p $(VENV)/web
	@cd $(VENV)/web && npm pack --silent --fetch-timeout=60000 --fetch-retries=1 onnxruntime-web@$(ORT_WEB) > /dev/null
	@cd $(VENV)/web && tar --extract --gzip --strip-components=2 --file onnxruntime-web-$(ORT_WEB).tgz $(ORT_WEB_FILES:%=package/dist/%)
	@rm $(VENV)/web/*.tgz && touch $@

# Beside each other: the type checker takes most of a minute the first time, on one core. What pytest does for assertions
# to show their values takes ten seconds of each process: those that fail run once more, with it.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/dev.stamp ## Lint, type check, and run every test but the slow ones.
	@$(MAKE) --no-print-directory lint & \
	  $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --assert=plain; tests=$$?; \
	  [ $$tests -ne 1 ] || $(BIN)/python -m pytest -m "not slow" --last-failed; \
	  wait $$! || { echo "make lint found faults: see above"; exit 1; }; exit $$tests

test-slow: $(VENV)/dev.stamp ## Run the tests that take minutes.
	@$(BIN)/python -m pytest -m slow

# JAX compiles each operation for each shape: what it has compiled is kept.
test-jax: $(VENV)/jax.stamp ## Run the tests of all backends with Keras on JAX (minutes, the first time).
	@KERAS_BACKEND=jax JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/$(VENV)/jax-cache \
	  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 \
	  $(BIN)/python -m pytest -k "jax or not torch" $(JAX_TESTS)

test-peers: $(VENV)/dev.stamp ## Run programs written for transformers with transformers 4.49, 5.24 and groupvit, and compare.
	@$(BIN)/python -m tests.support.peers

bench-peers: $(VENV)/dev.stamp ## Make the environments of the programs that `make bench` compares with.
	@$(BIN)/python -c "from tests.support.peers import environment; [environment(peer) for peer in ('4', '5', 'exports')]"

bench: bench-peers ## Measure speed beside transformers, OpenVINO and onnxruntime; writes docs/benchmarks.md (some 20 minutes).
	@$(BIN)/python -m benchmarks.speed --write

bench-gpu: bench-peers ## Measure a GPU, if there is one, beside transformers (some 10 minutes).
	@$(BIN)/python -m benchmarks.gpu

bench-growth: $(VENV)/dev.stamp ## Measure the cost of more images, more labels and larger images.
	@$(BIN)/python -m benchmarks.growth

lint: $(VENV)/dev.stamp ## Check style, types and which way imports point.
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --check --quiet $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo > $(VENV)/imports.txt || { cat $(VENV)/imports.txt; exit 1; }

format: $(VENV)/dev.stamp ## Rewrite the sources in the project's style.
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

train-demo: $(VENV)/torch.stamp ## Train the bundled model again (some 40 minutes on 2 cores) into runs/scenes-demo-fine.
	@$(BIN)/groupvit train scenes-demo --out runs/scenes-demo --resume auto
	@$(BIN)/groupvit train scenes-demo-fine --out runs/scenes-demo-fine --resume auto

serve: $(VENV)/serve.stamp ## Serve the page and the API with the bundled model on this machine.
	@$(BIN)/groupvit serve

docs: $(VENV)/docs.stamp ## Build the documentation's site into build/site; a warning is an error.
	@$(BIN)/zensical build --clean --strict

figures: $(VENV)/torch.stamp ## Draw the figures of the README and the documentation again.
	@$(BIN)/python -m docs.figures

release-check: $(VENV)/dev.stamp ## Build the wheel and try it in empty environments, each extra alone (minutes).
	@$(PIP) install --quiet build --constraint constraints.txt
	@$(BIN)/python -m tests.support.release

parity: $(VENV)/dev.stamp ## Compare PyTorch and Keras on random models and write docs/parity.md (some 10 minutes).
	@$(BIN)/python -m tests.support.parity

clean: ## Remove the environment and everything generated.
	rm -rf $(VENV) demo_output runs build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	  || { echo "groupvit needs Python 3.11 to 3.13; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "could not make $(VENV): install your system's venv package (Debian: apt-get install python3-venv)"; exit 1; }

$(VENV)/torch.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) (once) ..."
	@$(PIP) install --quiet --editable '.[torch]' --constraint constraints.txt
	@touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for development (once) ..."
	@$(PIP) install --quiet --editable '.[torch,tf,dev]' --constraint constraints.txt
	@touch $@ $(VENV)/torch.stamp

$(VENV)/serve.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for the server (once) ..."
	@$(PIP) install --quiet --editable '.[torch,serve]' --constraint constraints.txt
	@touch $@ $(VENV)/torch.stamp

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for the documentation (once) ..."
	@$(PIP) install --quiet --editable '.[docs]' --constraint constraints.txt
	@touch $@

$(VENV)/jax.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) for development with JAX (once) ..."
	@$(PIP) install --quiet --editable '.[torch,tf,jax,dev]' --constraint constraints.txt
	@touch $@ $(VENV)/dev.stamp $(VENV)/torch.stamp
