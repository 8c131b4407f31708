"""A world small enough for a test: 40 words, a random two-layer Llama, a reward that anyone can compute."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ppo_fast.ppo import PPOConfig, PPOTrainer, RolloutConfig
from ppo_fast.ppo.config import (
    DataConfig,
    EvaluationConfig,
    ModelsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardSource,
)
from ppo_fast.ppo.models import critic_from_actor, freeze
from ppo_fast.ppo.rewards import FunctionReward
from ppo_fast.ppo.rollout import Prompt, encode_prompts

WORDS = ["good", "bad", "the", "a", "film", "was", *(f"w{number}" for number in range(31))]
VOCABULARY = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
ENDS = [1, 13, 23, 33, 38]  # <eos> and four words: an untrained model then ends one token in eight
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
    model = LlamaForCausalLM(llama_config(**changes)).eval()
    model.generation_config.eos_token_id = ENDS
    return model


def make_classifier(seed: int = 1, **changes: Any) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(num_labels=1, **changes)).eval()


def even_words(prompts: list[str], responses: list[str]) -> list[float]:
    """Share of each response's words that are w0, w2, w4, ...: about 0.4 for an untrained model."""
    even = {f"w{number}" for number in range(0, 31, 2)}
    return [sum(word in even for word in text.split()) / max(1, len(text.split())) for text in responses]


JUDGE = "def judge(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"


@dataclass
class World:
    """What a trainer is made of, and the makers of its parts."""

    tokenizer: PreTrainedTokenizerFast
    prompts: list[Prompt]
    actor = staticmethod(make_actor)
    classifier = staticmethod(make_classifier)
    other_tokenizer = staticmethod(make_tokenizer)

    def config(self, *, objective: dict[str, Any] | None = None, **changes: Any) -> PPOConfig:
        """A small config; `objective` overrides fields of that section."""
        shaping: dict[str, Any] = {"epochs": 2, "minibatches": 2, "micro_batch_size": 2, "kl_coef": 0.05}
        settings: dict[str, Any] = {
            "steps": 10,
            "rollout": RolloutConfig(batch_size=8, max_new_tokens=6),
            "objective": ObjectiveConfig(**{**shaping, **(objective or {})}),
            "optimizer": OptimizerConfig(actor_lr=1e-3, critic_lr=1e-3, schedule="constant"),
        }
        return PPOConfig(**{**settings, **changes})

    def trainer(self, config: PPOConfig | None = None, **parts: Any) -> PPOTrainer:
        """A trainer of fresh random models; any part can be given."""
        actor: PreTrainedModel = parts.pop("actor", None) or make_actor()
        made: dict[str, Any] = {
            "critic": critic_from_actor(actor),
            "reference": freeze(copy.deepcopy(actor)),
            "reward": FunctionReward("even_words", even_words),
            "tokenizer": self.tokenizer,
            "prompts": self.prompts,
        }
        return PPOTrainer(config or self.config(), actor=actor, **{**made, **parts})


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


@pytest.fixture
def settings(world: Any, saved: Callable[..., str], tmp_path: Path) -> Callable[..., PPOConfig]:
    """A config over saved models; keyword arguments replace fields."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in world.prompts))
    (tmp_path / "judge.py").write_text(JUDGE)
    actor, reward = saved(world.actor(), "lm"), saved(world.classifier(), "rm")

    def make(**changes: Any) -> PPOConfig:
        fields: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "steps": 4,
            "models": ModelsConfig(actor=actor, device="cpu"),
            "rewards": [RewardSource(model=reward)],
            "data": DataConfig(prompts=str(prompts), eval_prompts=str(prompts)),
            "evaluation": EvaluationConfig(max_prompts=4, judges={"words": f"{tmp_path / 'judge.py'}:judge"}),
            "tensorboard": False,
        }
        return world.config(**{**fields, **changes})

    return make


CLOCK = ("time/", "throughput/")  # the only metrics in which two equal runs differ


def left_behind(run: Path) -> tuple[list[dict[str, Any]], str, dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if not key.startswith(CLOCK)} for line in lines]
    weights = {
        f"{name}.{key}": value
        for name in ("actor", "critic")
        for key, value in load_file(run / name / "model.safetensors").items()
    }
    return metrics, (run / "samples.jsonl").read_text(), weights


@pytest.fixture
def same_runs() -> Callable[[Path, Path], None]:
    """Assert that two finished runs left the same metrics, samples and weights, bit for bit."""

    def check(ours: Path, theirs: Path) -> None:
        (metrics, samples, weights), expected = left_behind(ours), left_behind(theirs)
        assert metrics == expected[0]
        assert samples == expected[1]
        assert weights.keys() == expected[2].keys()
        assert all(torch.equal(value, expected[2][name]) for name, value in weights.items())

    return check
