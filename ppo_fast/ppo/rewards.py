"""What pays: frozen reward models and Python functions, weighted and added.

A reward function has the form ``(prompts: list[str], responses: list[str]) -> list[float]``. What it returns is
checked before anything learns from it: the length, and that every number is finite.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

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
        """One float32 score a row, [B], on the rollout's device; NaN: the sample is to be dropped."""
        ...


OnError = Literal["stop", "drop"]


class RewardError(ValueError):
    """A reward source failed; the message names the source and, where one is to blame, the sample."""


@dataclass(frozen=True)
class FunctionReward:
    """A user's function on the decoded text."""

    name: str
    function: RewardFunction
    on_error: OnError = "stop"

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores [B] float32; RewardError where the function raises or returns anything but B finite numbers.

        With `on_error="drop"` a sample that it raises for, or scores NaN or infinite, gets NaN.
        """
        what = f"reward function {self.name}"
        scores = call_reward_function(
            self.function, what, rollout.prompts, rollout.responses, on_error=self.on_error
        )
        return torch.tensor(scores, dtype=torch.float32, device=rollout.response_ids.device)


@dataclass(frozen=True)
class TokenReward:
    """A frozen classifier that reads the actor's own tokens; its score is its head at the last real token."""

    name: str
    model: PreTrainedModel
    batch_size: int
    bf16: bool = False
    on_error: OnError = "stop"
    run: Callable[..., Any] | None = None
    """Runs a function of the model where its parameters are elsewhere. None: the model is called as it is."""

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores [B] float32."""
        ids, mask = rollout.sequences
        rows = range(0, ids.shape[0], self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in rows]
        run = self.run or partial(_run, self.model)
        scores = torch.cat([run(last_token_scores, ids[p], mask[p], bf16=self.bf16) for p in parts])
        return _finite(scores, self.name, rollout, self.on_error)


@dataclass(frozen=True)
class TextReward:
    """A frozen classifier with a tokenizer of its own: prompt and response are decoded and encoded again."""

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    batch_size: int
    on_error: OnError = "stop"
    run: Callable[..., Any] | None = None
    """As `TokenReward.run`."""

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
            scores.append((self.run or partial(_run, self.model))(_label_scores, **batch))
        bias = getattr(self.model.config, "score_bias", 0.0)
        return _finite(torch.cat(scores) - bias, self.name, rollout, self.on_error)


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
    function: RewardFunction,
    name: str,
    prompts: list[str],
    responses: list[str],
    *,
    on_error: OnError = "stop",
) -> list[float]:
    """Call a user's function (a reward or a judge; `name` is what an error calls it) and check what it returns.

    Where it raises for the batch it is asked again for one sample at a time, to find those that it raises for. With
    `on_error="drop"` these, and samples scored NaN or infinite, get NaN and a warning.

    Raises RewardError, with the user's own exception as its cause, where the function raises; where it returns
    another number of scores than prompts; and where a score is no finite number. The message names the sample.
    """
    try:
        scores = _call(function, name, prompts, responses)
    except RewardError as error:
        if error.__cause__ is None:  # it returned, but not what it must
            raise
        return _one_by_one(function, name, prompts, responses, on_error, error)
    samples = enumerate(zip(scores, prompts, responses, strict=True))
    return [
        _score(score, name, _sample(row, prompt, text), on_error) for row, (score, prompt, text) in samples
    ]


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
        return FunctionReward(
            source.function, load_function(source.function, "rewards.function"), source.on_error
        )
    assert source.model is not None  # RewardSource has checked it
    model = freeze(load_classifier(source.model, "rewards.model", models))
    own = load_tokenizer(source.model, "rewards.model", trust_remote_code=models.trust_remote_code)
    if source.input == "text":
        return TextReward(source.model, model, own, batch_size, source.on_error)
    check_same_tokenizer(tokenizer, own, source.model, "rewards.model")
    return TokenReward(source.model, model, batch_size, models.autocast, source.on_error)


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


def _run(model: PreTrainedModel, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(model, *args, **options)


def _label_scores(model: PreTrainedModel, **batch: Tensor) -> Tensor:
    return model(**batch).logits.squeeze(-1).float()


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


def _call(function: RewardFunction, name: str, prompts: list[str], responses: list[str]) -> Sequence[Any]:
    with _blame(name):
        scores = function(prompts, responses)
    values = scores.tolist() if isinstance(scores, Tensor) else scores
    if not isinstance(values, (list, tuple)) and not hasattr(values, "__len__"):
        raise RewardError(f"{name} returned {type(values).__name__}, expected a list of floats")
    if len(values) != len(prompts):
        raise RewardError(f"{name} returned {len(values)} scores for {len(prompts)} prompts")
    return values


def _one_by_one(
    function: RewardFunction,
    name: str,
    prompts: list[str],
    responses: list[str],
    on_error: OnError,
    error: RewardError,
) -> list[float]:
    """Scores of a batch that the function raised `error` for, a sample at a time; RewardError names the culprit."""
    scores = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        sample = _sample(row, prompt, response)
        try:
            (score,) = _call(function, name, [prompt], [response])
            scores.append(_score(score, name, sample, on_error))
        except RewardError as own:
            if on_error == "stop" or own.__cause__ is None:
                raise RewardError(f"{own} for {sample}") from own.__cause__
            _warn_dropped(f"{own} for {sample}")
            scores.append(math.nan)
    if on_error == "stop":
        raise RewardError(
            f"{error} for a batch of {len(prompts)} samples, though for none of them alone"
        ) from error
    return scores


def _sample(row: int, prompt: str, response: str) -> str:
    """How an error names a sample."""
    return f"sample {row}, prompt {prompt[:60]!r}, response {response[:60]!r}"


def _score(value: Any, name: str, sample: str, on_error: OnError) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise RewardError(f"{name} returned {value!r}, expected a float, for {sample}") from error
    if math.isfinite(score):
        return score
    told = f"{name} returned {score}, expected a finite number, for {sample}"
    if on_error == "stop":
        raise RewardError(told)
    _warn_dropped(told)
    return math.nan


def _finite(scores: Tensor, name: str, rollout: Rollout, on_error: OnError) -> Tensor:
    """The scores of a reward model, NaN for those that are dropped; RewardError where they may not be."""
    bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
    for row in bad:
        sample = _sample(row, rollout.prompts[row], rollout.responses[row])
        told = f"reward model {name} gave {float(scores[row])}, expected a finite number, for {sample}"
        if on_error == "stop":
            raise RewardError(told)
        _warn_dropped(told)
    return scores.masked_fill(~torch.isfinite(scores), math.nan) if bad else scores


def _warn_dropped(told: str) -> None:
    warnings.warn(f"sample dropped: {told}", stacklevel=4)
