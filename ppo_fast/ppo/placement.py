"""Where each of the four models lives: in this process as it is, or on a DeepSpeed engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PreTrainedModel

from ppo_fast.ppo.config import PPOConfig
from ppo_fast.ppo.engine_config import Which, frozen_settings, learner_settings, uses_deepspeed
from ppo_fast.ppo.models import resolve_device
from ppo_fast.ppo.parallel import share_weights
from ppo_fast.ppo.ranks import Ranks
from ppo_fast.ppo.recompute import recompute_layers
from ppo_fast.ppo.rewards import Reward, TextReward, TokenReward, WeightedReward
from ppo_fast.ppo.update import Learner

if TYPE_CHECKING:
    from ppo_fast.ppo.engines import EngineLearner


class Placed(Protocol):
    """A model that can be asked something, wherever its parameters are."""

    @property
    def model(self) -> PreTrainedModel:
        """The model; its parameters may be shards."""
        ...

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """`function(model, *args, **options)` with every parameter in place."""
        ...


@dataclass(frozen=True)
class Here:
    """A model in this process's own memory."""

    model: PreTrainedModel

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """`function(model, *args, **options)`."""
        return function(self.model, *args, **options)


def place_learner(model: PreTrainedModel, which: Which, config: PPOConfig) -> Learner | EngineLearner:
    """The actor or the critic with its optimiser, by `parallel` and `optimizer`; the same weights on every process."""
    optimizer, steps = config.optimizer, config.optimizer_steps
    rate = optimizer.actor_lr if which == "actor" else optimizer.critic_lr
    if config.models.gradient_checkpointing:
        recompute_layers(model)
    if uses_deepspeed(config):
        from ppo_fast.ppo.engines import EngineLearner

        settings = learner_settings(config, which, Ranks().count)
        device = resolve_device(config.models.device)
        return EngineLearner(model.eval(), which, rate, optimizer, steps, settings=settings, device=device)
    share_weights(model)
    return Learner(model.eval(), which, rate, optimizer, steps)


def place_frozen(model: PreTrainedModel, config: PPOConfig) -> Placed:
    """The reference or a reward model, by `parallel.frozen`."""
    if not uses_deepspeed(config):
        return Here(model)
    from ppo_fast.ppo.engines import FrozenEngine

    return FrozenEngine(model, frozen_settings(config), resolve_device(config.models.device))


def place_reward(reward: Reward, config: PPOConfig) -> Reward:
    """A reward whose models are placed as `place_frozen` does it; one without models comes back as it is."""
    if isinstance(reward, WeightedReward):
        sources = tuple(place_reward(source, config) for source in reward.sources)
        return dataclasses.replace(reward, sources=sources)
    if isinstance(reward, (TokenReward, TextReward)) and uses_deepspeed(config):
        return dataclasses.replace(reward, run=place_frozen(reward.model, config).run)
    return reward
