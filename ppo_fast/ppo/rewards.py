"""What pays: frozen reward models and Python functions, weighted and added.

A reward function has the form ``(prompts: list[str], responses: list[str]) -> list[float]``. What it returns is
checked before anything learns from it: the length, and that every number is finite.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ppo_fast.ppo.config import ModelsConfig, RewardSource
from ppo_fast.ppo.models import (
    check_same_tokenizer,
    freeze,
    last_token_scores,
    load_classifier,
    load_tokenizer,
)
from ppo_fast.records import Rollout

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


class Reward(Protocol):
    """Scores of a batch of rollouts."""

    @property
    def name(self) -> str:
        """What an error calls this source."""
        ...

    def __call__(self, rollout: Rollout) -> Tensor:
        """One float32 score a row, [B], on the rollout's device."""
        ...


class RewardError(ValueError):
    """A reward source failed; the message names the source and, where one is to blame, the sample."""


@dataclass(frozen=True)
class FunctionReward:
    """A user's function on the decoded text."""

    name: str
    function: RewardFunction

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores [B] float32; RewardError where the function raises or returns anything but B finite numbers."""
        what = f"reward function {self.name}"
        scores = call_reward_function(self.function, what, rollout.prompts, rollout.responses)
        return torch.tensor(scores, dtype=torch.float32, device=rollout.response_ids.device)


@dataclass(frozen=True)
class TokenReward:
    """A frozen classifier that reads the actor's own tokens; its score is its head at the last real token."""

    name: str
    model: PreTrainedModel
    batch_size: int
    bf16: bool = False

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores [B] float32."""
        ids, mask = rollout.sequences
        rows = range(0, ids.shape[0], self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in rows]
        scores = torch.cat([last_token_scores(self.model, ids[p], mask[p], bf16=self.bf16) for p in parts])
        return _finite(scores, self.name, rollout)


@dataclass(frozen=True)
class TextReward:
    """A frozen classifier with a tokenizer of its own: prompt and response are decoded and encoded again."""

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    batch_size: int

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores [B] float32."""
        texts = [
            prompt + response for prompt, response in zip(rollout.prompts, rollout.responses, strict=True)
        ]
        scores = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                texts[start : start + self.batch_size], padding=True, truncation=True, return_tensors="pt"
            ).to(self.model.device)
            scores.append(self.model(**batch).logits.squeeze(-1).float())
        bias = getattr(self.model.config, "score_bias", 0.0)
        return _finite(torch.cat(scores) - bias, self.name, rollout)


@dataclass(frozen=True)
class WeightedReward:
    """Sum of sources, each times its weight."""

    sources: tuple[Reward, ...]
    weights: tuple[float, ...]
    name: str = "reward"

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores [B] float32."""
        parts = [weight * source(rollout) for source, weight in zip(self.sources, self.weights, strict=True)]
        return torch.stack(parts).sum(0)


def call_reward_function(
    function: RewardFunction, name: str, prompts: list[str], responses: list[str]
) -> list[float]:
    """Call a user's function (a reward or a judge; `name` is what an error calls it) and check what it returns.

    Raises RewardError, with the user's own exception as its cause, where the function raises; where it returns
    another number of scores than prompts; and where a score is no finite number (the sample is named).
    """
    with _blame(name):
        scores = function(prompts, responses)
    values = scores.tolist() if isinstance(scores, Tensor) else scores
    if not isinstance(values, (list, tuple)) and not hasattr(values, "__len__"):
        raise RewardError(f"{name} returned {type(values).__name__}, expected a list of floats")
    if len(values) != len(prompts):
        raise RewardError(f"{name} returned {len(values)} scores for {len(prompts)} prompts")
    return [_score(value, name, row, responses[row]) for row, value in enumerate(values)]


def load_function(spec: str, field: str) -> RewardFunction:
    """The function that `package.module:name` or `path/to/file.py:name` names; ValueError naming `field` if none."""
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise ValueError(f"{field} is {spec!r}, expected `package.module:name` or `path/to/file.py:name`")
    module = _module_from_file(place, field) if place.endswith(".py") else _module(place, field)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{field}: {place!r} has no function {name!r}")
    return function


def load_reward(
    sources: Sequence[RewardSource], tokenizer: Tokenizer, models: ModelsConfig, batch_size: int
) -> WeightedReward:
    """Load every source of a config, reward models frozen and checked against the actor's tokenizer."""
    if not sources:
        raise ValueError("rewards is empty, expected at least one `model` or `function`")
    loaded = tuple(_load_source(source, tokenizer, models, batch_size) for source in sources)
    return WeightedReward(loaded, tuple(source.weight for source in sources))


def token_models(reward: Reward) -> list[PreTrainedModel]:
    """The models among the sources that read the actor's tokens; a critic may start from the first."""
    sources = reward.sources if isinstance(reward, WeightedReward) else (reward,)
    return [source.model for source in sources if isinstance(source, TokenReward)]


def _load_source(source: RewardSource, tokenizer: Tokenizer, models: ModelsConfig, batch_size: int) -> Reward:
    if source.function is not None:
        return FunctionReward(source.function, load_function(source.function, "rewards.function"))
    assert source.model is not None  # RewardSource has checked it
    model = freeze(load_classifier(source.model, "rewards.model", models))
    own = load_tokenizer(source.model, "rewards.model", trust_remote_code=models.trust_remote_code)
    if source.input == "text":
        return TextReward(source.model, model, own, batch_size)
    check_same_tokenizer(tokenizer, own, source.model, "rewards.model")
    return TokenReward(source.model, model, batch_size, models.autocast)


def _module(name: str, field: str) -> ModuleType:
    with _blame(f"{field}: importing {name!r}"):
        module = importlib.import_module(name)
    return module


def _module_from_file(path: str, field: str) -> ModuleType:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"{field}: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(f"ppo_fast_user_{file.stem}", file)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _blame(f"{field}: importing {path!r}"):
        spec.loader.exec_module(module)
    return module


class _blame:
    """Report whatever a user's code raises as that code's error, with the original as its cause."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A user's sys.exit would otherwise end the run as if it were done.
        if isinstance(error, Exception | SystemExit):
            raise RewardError(f"{self.what} raised {type(error).__name__}: {error}") from error


def _score(value: Any, name: str, row: int, response: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} returned {value!r} for sample {row}, expected a float") from error
    if not math.isfinite(score):
        raise RewardError(
            f"{name} returned {score} for sample {row}, expected a finite number; "
            f"its response was {response[:80]!r}"
        )
    return score


def _finite(scores: Tensor, name: str, rollout: Rollout) -> Tensor:
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise RewardError(
            f"reward model {name} scored sample {row} as {float(scores[row])}, expected a finite number; "
            f"its response was {rollout.responses[row][:80]!r}"
        )
    return scores
