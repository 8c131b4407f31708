"""trlX: PPO's estimates and losses, log-probabilities of labels, and whitening.

Its mask [B, T] holds 0 and 1 and marks response tokens; advantages are whitened over padding too.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.contract import strict
from ppo_fast.integrations.originals import (
    clipped_policy_loss,
    clipped_value_loss,
    log_softmax_of_labels,
    undefined_unless,
    unmasked_gae,
)
from ppo_fast.integrations.patch import Integration, Replacement


def logprobs_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Replaces `trlx.utils.modeling.logprobs_of_labels`: log softmax(logits)[label] in the dtype of the logits.

    Args:
        logits: [..., V], floating, on any strides.
        labels: [...], int64.

    Returns:
        [...]; in half precision the float32 result rounded once, which may be one unit of the last place from torch's.

    Raises:
        RuntimeError: a label outside the vocabulary, on the CPU; shapes that do not fit.
    """
    return log_softmax_of_labels(logits, labels)


def whiten(
    xs: Tensor, shift_mean: bool = True, distributed: bool = True, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Replaces `trlx.utils.modeling.whiten`: (x - mean) / sqrt(var + 1e-8) over all elements, in the dtype of `xs`.

    The variance divides by n - 1 in one process, and NaN comes of one element; over the processes of `group` it
    divides by n. `shift_mean=False` adds the mean back.
    """
    if distributed and dist.is_initialized():
        return _whiten_over(xs, shift_mean, group)
    if xs.numel() < 2 or xs.dim() == 0:
        return xs * (torch.nan if strict() else 0.0)
    everything = torch.ones_like(xs, dtype=torch.bool)
    op = ppo_fast.masked_whiten if shift_mean else ppo_fast.masked_rescale
    return op(xs, everything, unbiased=True).to(xs.dtype)


def _whiten_over(xs: Tensor, shift_mean: bool, group: dist.ProcessGroup | None) -> Tensor:
    """The mean first, then the squares about it: two all-reduces, as in the original."""
    total = torch.stack([xs.sum(), torch.as_tensor(xs.numel(), dtype=xs.dtype, device=xs.device)])
    dist.all_reduce(total, dist.ReduceOp.SUM, group=group)
    mean = total[0] / total[1]
    squares = ((xs - mean) ** 2).sum()
    dist.all_reduce(squares, dist.ReduceOp.SUM, group=group)
    whitened = (xs - mean) * torch.rsqrt(squares / total[1] + 1e-8)
    return whitened if shift_mean else whitened + mean


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, response_length: int, use_whitening: bool | None = True
) -> tuple[Tensor, Tensor]:
    """Replaces `PPOConfig.get_advantages_and_returns`: GAE over the first `response_length` columns, then whitening.

    Returns:
        (advantages, returns) in the dtype of the inputs; the advantages are detached, the returns not whitened.

    Raises:
        RuntimeError: a `response_length` below 1; values of another width.
    """
    if response_length < 1:
        raise RuntimeError(
            f"get_advantages_and_returns: `response_length` is {response_length}, expected 1 or more"
        )
    if values.shape[1] != response_length:
        raise RuntimeError(
            f"get_advantages_and_returns: `values` has {values.shape[1]} columns, expected {response_length}"
        )
    advantages, returns = unmasked_gae(rewards[:, :response_length], values, self.gamma, self.lam)
    if use_whitening:
        advantages = whiten(advantages)
    return advantages.detach(), returns


def loss(
    self: Any,
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> tuple[Tensor, dict[str, Any]]:
    """Replaces `PPOConfig.loss`: policy loss + vf_coef * value loss, and a flat dict of what trlX logs.

    The statistics under `losses` and `policy` are Python floats, the rest 0-d tensors, as there; the floats come in
    one transfer from the device. `policy/approx_kl` is the mean over all slots, padding included. NaN for an empty
    mask and for NaN under a false mask.
    """
    n = mask.sum()
    policy = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, self.cliprange)
    value = clipped_value_loss(values, old_values, returns, mask, self.cliprange_value)
    total = policy.loss + self.vf_coef * value.loss
    with torch.no_grad():
        some = n > 0
        approx_kl = policy.stats["approx_kl"] * n / mask.numel()
        clipped = undefined_unless(some, policy.stats["clip_fraction"])
        floats = torch.stack(
            [x.double() for x in (total, policy.loss, value.loss, approx_kl, clipped)]
        ).tolist()
        error = (values - returns) * mask
        stats = {
            **dict(
                zip(("losses/total_loss", "losses/policy_loss", "losses/value_loss"), floats, strict=False)
            ),
            **_moments("values", values, mask, n),
            "values/values_error": (error**2).sum() / n,
            "values/values_mape_error": (error.abs() / (returns * mask + 1e-2).abs()).sum() / n,
            "values/clipfrac": undefined_unless(some, value.stats["clip_fraction"]),
            **_moments("old_values", old_values, mask, n),
            **_moments("returns", returns, mask, n),
            "policy/approx_kl": floats[3],
            "policy/clipfrac": floats[4],
            "ratio": undefined_unless(some, policy.stats["ratio_mean"]),
            "padding_percentage": 1 - n / mask.numel(),
        }
    return total, stats


def _moments(name: str, xs: Tensor, mask: Tensor, n: Tensor) -> dict[str, Any]:
    """Mean, least, largest and standard deviation over the mask."""
    if xs.numel() == 0:
        return {f"{name}/{moment}": 0 for moment in ("mean", "min", "max", "std")}
    mean, counted = (xs * mask).sum() / n, mask.bool()
    return {
        f"{name}/mean": mean,
        f"{name}/min": torch.where(counted, xs, torch.inf).min(),
        f"{name}/max": torch.where(counted, xs, -torch.inf).max(),
        f"{name}/std": (((xs - mean) * mask) ** 2).sum().div(n).sqrt(),
    }


INTEGRATIONS = (
    Integration(
        trainer="trlx",
        distribution=None,
        versions=(),
        replacements=(
            Replacement(
                "trlx.utils.modeling:logprobs_of_labels", logprobs_of_labels, ops=("logprobs_from_logits",)
            ),
            Replacement("trlx.utils.modeling:whiten", whiten, ops=("masked_whiten", "masked_rescale")),
            Replacement(
                "trlx.models.modeling_ppo:PPOConfig.get_advantages_and_returns",
                get_advantages_and_returns,
                ops=("gae", "masked_whiten"),
            ),
            Replacement("trlx.models.modeling_ppo:PPOConfig.loss", loss, ops=("policy_loss", "value_loss")),
        ),
    ),
)
