"""Formulas that trainers write alike, on our ops, with the results of the originals: dtype, NaN, errors."""

import torch
import torch.nn.functional as F
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.contract import strict

WIDE = (torch.float32, torch.float64)  # what the ops return; with them nothing is rounded on the way


def takes_labels(logits: Tensor, labels: Tensor) -> bool:
    """Whether the fused op can do this call: labels [...] or [..., K], all of them in the vocabulary.

    What it cannot take goes through the original's own formula, and so ends as there, in torch's error too. Labels on
    a GPU are not read, as that would wait for it: an index outside the vocabulary gives NaN there.
    """
    fits = (
        logits.dim() > 1
        and min(logits.numel(), labels.numel()) > 0
        and logits.is_floating_point()
        and logits.shape[:-1] == (labels.shape if labels.dim() < logits.dim() else labels.shape[:-1])
        and labels.dtype in (torch.int32, torch.int64)  # torch.gather takes both
        and labels.device == logits.device
    )
    if not fits or labels.device.type != "cpu" or torch.compiler.is_compiling():
        return fits
    return bool((labels.min() >= 0) & (labels.max() < logits.shape[-1]))


def log_softmax_dtype(logits: Tensor) -> torch.dtype:
    """The dtype that log_softmax gives here: autocast widens it on some devices."""
    if not torch.is_autocast_enabled(logits.device.type):
        return logits.dtype
    return F.log_softmax(logits.new_empty(0), dim=-1).dtype


def log_softmax_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """log_softmax(logits, -1) at `labels`, in log_softmax's dtype, without the [..., V] in between."""
    if labels.dim() == logits.dim() or not takes_labels(logits, labels):
        return F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return ppo_fast.logprobs_from_logits(logits, labels.long()).to(log_softmax_dtype(logits))


class _ValueOf(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: object, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_value(carrier: Tensor, value: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `carrier`, which is the same to rounding."""
    return _ValueOf.apply(value.detach(), carrier.to(value.dtype))


def undefined_unless(defined: Tensor, result: Tensor) -> Tensor:
    """`result`, or NaN with a gradient of NaN where `defined` is False; not strict, `result`."""
    return result * torch.where(defined, 1.0, torch.nan).to(result.dtype) if strict() else result


def _finite_where_masked(counted: Tensor, *tensors: Tensor) -> Tensor:
    """0-d bool: nothing but finite numbers where nothing counts.

    The originals multiply by the mask, and NaN * 0 is NaN, so that there a NaN anywhere is NaN everywhere. Our ops
    never read what the mask leaves out.
    """
    return torch.stack([(counted | x.detach().isfinite()).all() for x in tensors]).all()


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> ppo_fast.PolicyLoss:
    """sum(max(-A r, -A clip(r, 1 - c, 1 + c)) m) / sum(m), r = exp((logprob - old) m), as it is usually written.

    NaN, as there, for an empty mask, for NaN or infinity under a false mask, and where a ratio overflows under an
    advantage of 0. Unlike there, a ratio that overflows in a term that the clip bounds has the gradient 0, not NaN.
    The mask holds 0 and 1.
    """
    policy = ppo_fast.policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=min(clip, 1.0),  # a ratio is never below 0
        clip_high=clip,
        normalizer=mask.sum() if strict() else None,
    )
    if not strict():
        return policy
    with torch.no_grad():
        gain = advantages * torch.exp((logprobs - old_logprobs) * mask)
        defined = torch.where(mask != 0, ~gain.isnan(), gain.isfinite()).all()
    return policy._replace(loss=undefined_unless(defined, policy.loss))


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> ppo_fast.ValueLoss:
    """0.5 sum(max((v - R)^2, (clip(v, old - c, old + c) - R)^2) m) / sum(m), as it is usually written.

    NaN, as there, for an empty mask and for NaN or infinity under a false mask. The mask holds 0 and 1.
    """
    # A range of 0 leaves the old value, which the op does not take for a range.
    op = ppo_fast.value_loss if clip > 0 else ppo_fast.reference.value_loss
    value = op(values, old_values, returns, mask, clip=clip, normalizer=mask.sum() if strict() else None)
    if not strict():
        return value
    defined = _finite_where_masked(mask != 0, values, old_values, returns)
    return value._replace(loss=undefined_unless(defined, value.loss))


def unmasked_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns over every column, in the dtype that the sums of the two have."""
    everything = torch.ones(rewards.shape, dtype=torch.bool, device=rewards.device)
    advantages, returns = ppo_fast.gae(rewards, values, everything, gamma=gamma, lam=lam, mask_rule="none")
    dtype = torch.result_type(rewards, values)
    return advantages.to(dtype), returns.to(dtype)
