"""The four-model PPO trainer: actor and critic learn, reward and reference are frozen."""

from typing import TYPE_CHECKING

from ppo_fast.ppo.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PPOConfig,
    RewardSource,
    RolloutConfig,
)

if TYPE_CHECKING:
    from ppo_fast.ppo.trainer import PPOTrainer

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "ModelsConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOTrainer",
    "RewardSource",
    "RolloutConfig",
]


def __getattr__(name: str) -> object:
    # The trainer brings transformers, which takes seconds to import; a config does not need it.
    if name == "PPOTrainer":
        from ppo_fast.ppo.trainer import PPOTrainer

        return PPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
