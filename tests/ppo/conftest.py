"""A world small enough for a test: 40 words, a random two-layer Llama, a reward that anyone can compute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ppo_fast.ppo import PPOConfig, PPOTrainer, RolloutConfig
from ppo_fast.ppo.config import ObjectiveConfig, OptimizerConfig
from ppo_fast.ppo.models import critic_from_actor, freeze
from ppo_fast.ppo.rewards import FunctionReward
from ppo_fast.ppo.rollout import Prompt, encode_prompts

WORDS = ["good", "bad", "the", "a", "film", "was", *(f"w{number}" for number in range(31))]
VOCABULARY = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
PROMPTS = ["the film was", "a film", "the", "was a w1 w2", "w3 w4 w5", "the bad film was", "w6", "a good"]


def make_tokenizer(words: dict[str, int] = VOCABULARY) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(dict(words), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def llama_config(**changes: Any) -> LlamaConfig:
    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**settings, **changes})


def make_actor(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**changes)).eval()


def make_classifier(seed: int = 1, **changes: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=1, **changes)).eval()


def count_good(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of the word `good` in each response."""
    return [response.split().count("good") / max(1, len(response.split())) for response in responses]


@dataclass
class World:
    """What a trainer is made of; `trainer` makes one."""

    tokenizer: PreTrainedTokenizerFast
    prompts: list[Prompt]

    def trainer(self, config: PPOConfig | None = None, **changes: Any) -> PPOTrainer:
        actor: PreTrainedModel = changes.pop("actor", None) or make_actor()
        parts: dict[str, Any] = {
            "critic": changes.pop("critic", None) or critic_from_actor(actor),
            "reference": freeze(copy.deepcopy(actor)),
            "reward": FunctionReward("count_good", count_good),
            "tokenizer": self.tokenizer,
            "prompts": self.prompts,
        }
        return PPOTrainer(config or small_config(), actor=actor, **{**parts, **changes})


def small_config(**changes: Any) -> PPOConfig:
    settings: dict[str, Any] = {
        "steps": 10,
        "rollout": RolloutConfig(batch_size=8, max_new_tokens=6),
        "objective": ObjectiveConfig(epochs=2, minibatches=2, micro_batch_size=2, kl_coef=0.05),
        "optimizer": OptimizerConfig(actor_lr=1e-3, critic_lr=1e-3, schedule="constant"),
    }
    return PPOConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def world(tokenizer: PreTrainedTokenizerFast) -> World:
    return World(tokenizer, encode_prompts([{"prompt": prompt} for prompt in PROMPTS], tokenizer, "prompts"))


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    """Save a model with a tokenizer; returns the folder."""

    def save(model: PreTrainedModel, name: str, other: PreTrainedTokenizerFast | None = None) -> str:
        model.save_pretrained(tmp_path / name)
        (other or tokenizer).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save
