"""Eager, float64-capable twins of every op: the specification, and what `impl="reference"` runs.

Arithmetic is float32 (float64 for float64 inputs); gradients come back in the input's dtype. Tensors named
`old_` or `ref_`, the losses' advantages and returns, and temperatures are constants: they get no gradient.
The functions here trust their inputs; `ppo_fast`'s public ops check them.
"""

from ppo_fast.reference.linear import linear_kl, linear_logprobs, linear_policy_loss
from ppo_fast.reference.logits import (
    entropy_from_logits,
    kl_from_logits,
    logprobs_and_entropy_from_logits,
    logprobs_from_logits,
)
from ppo_fast.reference.losses import policy_loss, policy_loss_from_logits, value_loss
from ppo_fast.reference.moments import masked_mean, masked_rescale, masked_var, masked_whiten
from ppo_fast.reference.tokens import gae, kl_estimate, kl_shaped_rewards, shaped_gae

__all__ = [
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
    "policy_loss",
    "policy_loss_from_logits",
    "shaped_gae",
    "value_loss",
]
