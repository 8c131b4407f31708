"""A fused-kernel PPO core for RLHF: ops that a trainer swaps in one by one, and a small four-model trainer.

Importing this package needs torch alone; triton, transformers and the rest are imported when used.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from ppo_fast import reference
from ppo_fast.build import build_info
from ppo_fast.ops.checks import check_inputs
from ppo_fast.ops.dispatch import available_impls
from ppo_fast.ops.linear import linear_kl, linear_logprobs, linear_policy_loss
from ppo_fast.ops.logits import (
    entropy_from_logits,
    kl_from_logits,
    logprobs_and_entropy_from_logits,
    logprobs_from_logits,
)
from ppo_fast.ops.losses import policy_loss, policy_loss_from_logits, value_loss
from ppo_fast.ops.moments import masked_mean, masked_rescale, masked_var, masked_whiten
from ppo_fast.ops.tokens import gae, kl_estimate, kl_shaped_rewards, shaped_gae
from ppo_fast.records import Experience, PolicyLoss, Rollout, ValueLoss

if TYPE_CHECKING:
    from ppo_fast.integrations import patch, unpatch
    from ppo_fast.ppo import PPOConfig, PPOTrainer

__version__ = version("ppo-fast")

__all__ = [
    "Experience",
    "PPOConfig",
    "PPOTrainer",
    "PolicyLoss",
    "Rollout",
    "ValueLoss",
    "available_impls",
    "build_info",
    "check_inputs",
    "entropy_from_logits",
    "gae",
    "kl_estimate",
    "kl_from_logits",
    "kl_shaped_rewards",
    "linear_kl",
    "linear_logprobs",
    "linear_policy_loss",
    "logprobs_and_entropy_from_logits",
    "logprobs_from_logits",
    "masked_mean",
    "masked_rescale",
    "masked_var",
    "masked_whiten",
    "patch",
    "policy_loss",
    "policy_loss_from_logits",
    "reference",
    "shaped_gae",
    "unpatch",
    "value_loss",
]


def __getattr__(name: str) -> object:
    # The trainer brings transformers; the ops must not.
    if name in ("PPOConfig", "PPOTrainer"):
        from ppo_fast import ppo

        return getattr(ppo, name)
    if name in ("patch", "unpatch"):
        from ppo_fast import integrations

        return getattr(integrations, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
