"""openrlhf.models.loss: the forward of PolicyLoss and of ValueLoss, on our ops."""

from typing import Any, cast

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import contract

LOG_RATIO_CLAMP = 20.0


def _reduction(token_level_loss: bool) -> dict[str, Any]:
    """The arguments of our losses that give the sum which `_normalised` divides."""
    if token_level_loss:
        return {"reduction": "token-sum"}
    return {"reduction": "seq-mean-token-mean", "normalizer": 1.0}


def _normalised(
    total: Tensor,
    mask: Tensor,
    token_level_loss: bool,
    dp_size: int,
    batch_num_tokens: float | None,
    global_batch_size: float | None,
) -> Tensor:
    """Divide a sum over tokens, or over the means of sequences, by the global count, or by this batch's: 0/0 is NaN."""
    count = batch_num_tokens if token_level_loss else global_batch_size
    if count is None:
        return total / (mask.sum() if token_level_loss else (mask.sum(-1) > 0).float().sum())
    return total / count * dp_size


def _dtype(token_level_loss: bool, *tensors: Tensor) -> torch.dtype:
    """That of the sum; the sequences are counted by a mask of float32."""
    dtype = contract.promoted(*tensors)
    return dtype if token_level_loss else torch.promote_types(dtype, torch.float32)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """sum(x * mask) / sum(mask), 0-d: NaN for an empty mask, and for what is not finite under a mask of 0."""
    return (x * mask).sum() / mask.sum()


def _sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """[B, 1], NaN for an empty row."""
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def _as_mask(op: str, action_mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask, or all true for None."""
    if action_mask is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    contract.require_zero_one(op, "action_mask", action_mask)
    return action_mask


def _leak(mask: Tensor, *tensors: Tensor) -> Tensor | float:
    """NaN where a mask of 0 would be multiplied by something that is not finite; else 0."""
    return contract.poison(mask == 0, *tensors) if contract.strict() else 0.0


def policy_loss_forward(
    self: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """PolicyLoss.forward: PPO's or GSPO's clipped loss, corrected for the mismatch with the rollout's policy.

    Args:
        self: the module, whose settings choose the loss.
        log_probs, old_log_probs, advantages: [B, T]; only `log_probs` gets a gradient.
        action_mask: [B, T], bool or numbers 0 and 1, or None.
        rollout_log_probs: [B, T], of the engine that sampled; needed for a correction.
        dp_size, batch_num_tokens, global_batch_size: the global normalisation, or this batch's for None.

    Returns:
        (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio), 0-d; the last two None without a correction.
    """
    if self.policy_loss_type not in ("ppo", "gspo"):
        raise ValueError(f"Invalid policy loss type: {self.policy_loss_type}")
    if self.is_correction_level != "off" and rollout_log_probs is None:
        raise TypeError("PolicyLoss: `rollout_log_probs` is None, expected a tensor to correct by")
    rollout = cast(Tensor, rollout_log_probs)
    mask = _as_mask("PolicyLoss", action_mask, log_probs)
    log_ratio = log_probs.detach() - old_log_probs
    if self.policy_loss_type == "gspo":
        behaviour = old_log_probs if self.is_correction_level == "off" else rollout
        counts = mask.sum(-1, keepdim=True).clamp(min=1)
        mean = ((log_probs - behaviour) * mask).sum(-1, keepdim=True) / counts
        new, old, clamp = mean.expand_as(log_probs), torch.zeros_like(old_log_probs), None
        spread = mean.detach().exp().expand_as(log_probs)
    else:
        new, old, clamp = log_probs, old_log_probs, LOG_RATIO_CLAMP
        spread = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    weight, vllm_kl, filtered, weighted = None, None, None, advantages
    if self.is_correction_level != "off" and self.policy_loss_type == "ppo":
        weight, vllm_kl, filtered = _correction(self, old_log_probs, rollout, mask)
        weighted = advantages * weight
    out = ppo_fast.policy_loss(
        new,
        old,
        weighted,
        mask,
        clip_low=min(self.clip_eps_low, 1.0),  # the ratio is never below 0
        clip_high=self.clip_eps_high,
        dual_clip=self.dual_clip,
        log_ratio_clamp=clamp,
        **_reduction(self.token_level_loss),
    )
    total = out.loss + _leak(mask, spread, weighted)
    if weight is not None:  # a weight of 0 does not hide a NaN either
        total = total + _leak(torch.zeros_like(mask), spread)
    total = total.to(_dtype(self.token_level_loss, log_probs, old_log_probs, weighted, mask))
    loss = _normalised(total, mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    if weight is None:
        count = mask.sum()
        clip_ratio = out.stats["clip_fraction"] * (count / count)  # NaN for an empty mask
    else:
        clip_ratio = _masked_mean(_clipped(self, log_ratio, advantages), mask)
    return loss, clip_ratio, _masked_mean(-log_ratio, mask), vllm_kl, filtered


def _clipped(module: Any, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """1 for each token whose clipped term is the smaller gain."""
    ratio = log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    clipped = ratio.clamp(1 - module.clip_eps_low, 1 + module.clip_eps_high)
    return (clipped * advantages < ratio * advantages).float()


@torch.no_grad()
def _correction(
    module: Any, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of each token, mean of rollout - old, share of what falls outside of the thresholds)."""
    low, high = module.is_correction_threshold
    by_sequence = module.is_correction_level == "seq"
    log_weight = old_log_probs - rollout_log_probs
    if module.is_correction_gating == "ratio":
        gate = (_sequence_mean(log_weight, mask) if by_sequence else log_weight).exp()
    else:
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout_log_probs, old_log_probs))
        if module.is_correction_gating == "binary_kl":
            gate = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        else:
            gate = (p - q).abs()
        gate = _sequence_mean(gate, mask) if by_sequence else gate
    if module.is_correction_mode == "clip":
        weight = gate.clamp(min=low, max=high)
        outside = (gate < low) | (gate > high)
    else:
        outside = ~((gate >= low) & (gate <= high))
        weight = torch.where(outside, 0.0, log_weight.exp())
    share = outside.float().mean() if by_sequence else _masked_mean(outside.float(), mask)
    return weight, _masked_mean(-log_weight, mask), share


def value_loss_forward(
    self: Any,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    action_mask: Tensor | None = None,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """ValueLoss.forward: half the squared error of the critic, clipped when `clip_eps` is set; 0-d.

    Args:
        self: the module.
        values, old_values, returns: [B, T]; only `values` gets a gradient.
        action_mask: [B, T], bool or numbers 0 and 1, or None.
        dp_size, batch_num_tokens, global_batch_size: as in PolicyLoss.
    """
    mask = _as_mask("ValueLoss", action_mask, values)
    out = ppo_fast.value_loss(
        values, old_values, returns, mask, clip=self.clip_eps, **_reduction(self.token_level_loss)
    )
    read = (values, returns) if self.clip_eps is None else (values, old_values, returns)
    total = (out.loss + _leak(mask, *read)).to(_dtype(self.token_level_loss, *read, mask))
    return _normalised(total, mask, self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
