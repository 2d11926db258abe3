# The commands of this repository; `make` alone lists them. PYTHON and EXTRAS choose what .venv is made of,
# AUTOGLM_HOME where models, studies and databases are kept. A .venv made for a GPU is renewed for a GPU: the
# extras `cpu` and `gpu` must never meet in it.
PYTHON ?= python3.11
MADE_FOR_GPU := $(wildcard .venv/lib/python*/site-packages/onnxruntime_gpu-*.dist-info)
EXTRAS ?= $(if $(MADE_FOR_GPU),gpu,cpu,openvino),trt-rtx,dev
export AUTOGLM_HOME ?= $(CURDIR)/.autoglm

BIN   := .venv/bin
READY := .venv/.ready
DEMO  := $(AUTOGLM_HOME)/demo-glm
WHEELS := $(AUTOGLM_HOME)/wheels
# Files of tests that run side by side: most of a test is waiting for some process to start.
TEST_PROCESSES ?= 2
PACK   ?= wheels-pack
PART_MIB ?= 1900

.PHONY: clients help demo up up-monitoring down venv setup-gpu pack-wheels unpack-wheels llamacpp test check fmt clean bench bench-trust bench-processes bench-parallel bench-race bench-peers bench-growth carry-gpu bench-export bench-gpu bench-speculation bench-serve bench-soak bench-watch llama-server peers

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Optimise a small real GLM from start to end; leaves the servers up
	$(BIN)/open-autoglm demo-model $(DEMO)
	$(BIN)/python infra/stack.py up
	$(BIN)/open-autoglm optimize --model-path $(DEMO) --input-shape 1,512 --output-tokens 64 --max-latency 2s
	@echo "Prefect and MLflow stay up for you to look around; make down stops them."

up: $(READY) ## Start Prefect, MLflow and a worker on this machine, and deploy prefect.yaml
	@$(BIN)/python infra/stack.py up

up-monitoring: $(READY) ## Start Prometheus, Alertmanager and the bridge to Prefect beside it (needs Debian's binaries)
	@$(BIN)/python infra/stack.py up-monitoring

down: $(READY) ## Stop what `make up`, `make up-monitoring` or `make demo` started
	@$(BIN)/python infra/stack.py down

venv: $(READY) ## Create .venv, or renew it if the pins have changed (about 2 minutes, 2.6 GB)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { \
	  echo "error: $(PYTHON) is not installed: install Python 3.11, or say where it is: make venv PYTHON=..."; exit 2; }
	@echo "installing into .venv: about 2 minutes, 2.6 GB (more for a GPU)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# TensorRT is apart, since its libraries come from NVIDIA's own package index: without it the rest still works.
setup-gpu: ## Make .venv anew for an NVIDIA GPU (docs/gpu.md); says what works, and what could not be fetched
	@$(PYTHON) -m venv --clear .venv
	@$(MAKE) --no-print-directory venv EXTRAS=gpu,trt-rtx,dev
	@$(BIN)/pip install --quiet -c constraints.txt -e '.[gpu,tensorrt]' || \
	  echo "TensorRT could not be fetched: the engines tensorrt and onnxruntime-tensorrt stay vetoed"
	@$(BIN)/open-autoglm doctor

pack-wheels: ## Fetch the wheels of EXTRAS into PACK, in parts of PART_MIB, for a machine without a network
	@$(PYTHON) infra/wheels.py pack --extras '$(EXTRAS)' --output '$(PACK)' --part-mib $(PART_MIB)

unpack-wheels: ## Check the parts in PACK and make .venv of them; needs no network
	@$(PYTHON) infra/wheels.py unpack --source '$(PACK)' --wheels '$(AUTOGLM_HOME)/packed-wheels' --venv .venv
	@touch $(READY)

# llama.cpp is compiled for the CPU it is compiled on, so the wheel is kept with the machine's other data.
# With --find-links, pip takes the kept wheel for the source package of the same version.
llamacpp: $(READY) ## Add the llama.cpp engine to .venv; compiled once (5 minutes on 2 cores, needs g++ and cmake)
	@mkdir -p $(WHEELS)
	@$(BIN)/pip wheel --quiet --no-deps --find-links $(WHEELS) --wheel-dir $(WHEELS) llama-cpp-python==0.3.36
	@$(BIN)/pip install --quiet --find-links $(WHEELS) -c constraints.txt -e '.[$(EXTRAS),llamacpp]'

peers: llamacpp ## Add what bench-peers compares with, besides the engines, to .venv
	@$(BIN)/pip install --quiet --find-links $(WHEELS) -c constraints.txt -e '.[$(EXTRAS),llamacpp,openvino,peers]'

clients: .venv-clients/.ready ## Add OpenAI's client and a load generator, in .venv-clients, for the tests (0.9 GB)

.venv-clients/.ready: tests/clients/requirements.txt
	@$(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/pip install --quiet -r tests/clients/requirements.txt
	@touch $@

test: $(READY) ## Run the tests; they need no server and leave none
	env -u PREFECT_API_URL -u MLFLOW_TRACKING_URI $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

check: $(READY) ## Lint, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy infra

fmt: $(READY) ## Format, and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: bench-trust bench-processes bench-parallel bench-race ## All benchmarks, one after the other: leave the machine alone meanwhile

bench-trust: $(READY) ## How often the method errs, with simulated engines (2 minutes)
	$(BIN)/python -m benchmarks.trust --repeats 1000 --json benchmarks/results/trust.json

bench-watch: $(READY) ## Does the watch call a breach in time, and never without one? on simulated traffic; are causes named right? (10 minutes)
	$(BIN)/python -m benchmarks.watch

bench-processes: $(READY) $(DEMO)/config.json ## How much processes of one candidate differ here (3 minutes)
	$(BIN)/python -m benchmarks.processes $(DEMO)

bench-parallel: $(READY) $(DEMO)/config.json ## Are figures taken beside another study those taken alone? (10 minutes or more)
	$(BIN)/python -m benchmarks.parallel $(DEMO)

bench-race: $(READY) $(DEMO)/config.json ## The race against the exhaustive grid (25 minutes)
	$(BIN)/python -m benchmarks.race_vs_grid $(DEMO)

bench-peers: $(READY) $(DEMO)/config.json ## The newest study's champion against other runtimes (20 minutes; first: make peers)
	$(BIN)/python -m benchmarks.peers $(DEMO)

bench-growth: $(READY) $(DEMO)/config.json ## Time and memory over prompt, batch and layers, beside the roofline (8 minutes)
	$(BIN)/python -m benchmarks.growth $(DEMO)

bench-export: $(READY) ## Memory of each export of a GLM of 1.5 billion random weights (10 minutes, 20 GB of disk)
	$(BIN)/python -m benchmarks.export_memory

# What a GPU host without a network may lack beside torch, onnx, transformers and numpy: bench-gpu looks in carry/.
CARRIED = pydantic pydantic_core annotated-types typing_extensions typing-inspection pytest pluggy iniconfig packaging pygments
CARRY_PYTHON ?= 3.12

carry-gpu: $(READY) ## Pack into carry/ what bench-gpu needs on a bare GPU host with Python CARRY_PYTHON (3.12)
	@rm -rf carry
	@$(BIN)/pip install --quiet --no-deps --only-binary :all: --python-version $(CARRY_PYTHON) --target carry \
	  -c constraints.txt $(CARRIED)
	@echo "carry/ is packed: bring it along with this checkout"

# No .venv and no network: whatever Python has torch, onnx, transformers, numpy and pydantic will do. Tests that
# fail or hang must not cost the figures: they are stopped after GPU_TESTS_S, the benchmark gets the rest of
# GPU_S, and the target fails at its end.
GPU_PYTHON  ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
GPU_S       ?= 560
GPU_TESTS_S ?= 180

bench-gpu: export PYTHONPATH := $(PYTHONPATH):$(CURDIR)/carry
bench-gpu: ## On a GPU host: its tests, then all engines for GPUs on 1.5 and 9 billion random weights (10 minutes)
	@$(GPU_PYTHON) -c 'import pydantic' 2> /dev/null || { \
	  echo "error: $(GPU_PYTHON) has no pydantic: run make carry-gpu where there is a network, and bring carry/ along"; exit 2; }
	@begin=$$(date +%s); tests=0; \
	if $(GPU_PYTHON) -c 'import pytest' 2> /dev/null; then \
	  timeout --signal=INT --kill-after=10 $(GPU_TESTS_S) \
	    $(GPU_PYTHON) -m pytest --noconftest -m gpu tests/test_gpu.py || tests=$$?; \
	else echo "pytest is not installed: the GPU tests are left out"; fi; \
	$(GPU_PYTHON) -m benchmarks.gpu --budget-s $$(($(GPU_S) - $$(date +%s) + begin)) || exit $$?; \
	[ $$tests -eq 0 ] || [ $$tests -eq 5 ] || { echo "the GPU tests failed, or were stopped: see above"; exit 1; }

bench-speculation: $(READY) $(DEMO)/config.json ## Drafts by prompt lookup, by the kind of text (4 minutes)
	$(BIN)/python -m benchmarks.speculation $(DEMO)

# llama.cpp's sources come with llama-cpp-python's source package, whose wheel holds the libraries only.
LLAMA_SERVER := $(AUTOGLM_HOME)/peers/llama-server
LLAMA_SOURCE := $(AUTOGLM_HOME)/peers/llama_cpp_python-0.3.36

llama-server: llamacpp $(LLAMA_SERVER) ## Compile llama.cpp's own server for bench-serve (10 minutes on 2 cores, needs g++ and cmake)

$(LLAMA_SERVER):
	@mkdir -p $(@D)
	@$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(@D) llama-cpp-python==0.3.36
	@tar -xzf $(LLAMA_SOURCE).tar.gz -C $(@D)
	@cmake -S $(LLAMA_SOURCE)/vendor/llama.cpp -B $(LLAMA_SOURCE)/build -DCMAKE_BUILD_TYPE=Release \
	  -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
	  -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF > $(@D)/llama-server.log
	@cmake --build $(LLAMA_SOURCE)/build --target llama-server --parallel $$(nproc) >> $(@D)/llama-server.log
	@cp $(LLAMA_SOURCE)/build/bin/llama-server $@

CANDIDATE ?=
HEATS ?=
bench-serve: $(READY) $(DEMO)/config.json ## The endpoint against llama.cpp's server and hand-tuned torch (8 minutes, 16 with HEATS=12; first: make peers llama-server)
	$(BIN)/python -m benchmarks.serve $(DEMO) $(if $(CANDIDATE),--candidate $(CANDIDATE)) $(if $(HEATS),--heats $(HEATS))

BUNDLE ?= $(lastword $(sort $(wildcard $(AUTOGLM_HOME)/studies/*/bundle)))
bench-soak: $(READY) ## 10,000 requests to the endpoint of BUNDLE (default: the newest study's) at twice its capacity
	$(BIN)/python -m benchmarks.soak $(BUNDLE)

$(DEMO)/config.json: $(READY)
	$(BIN)/open-autoglm demo-model $(DEMO)

clean: ## Remove .venv and caches; what is under AUTOGLM_HOME stays
	rm -rf .venv .venv-clients .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
