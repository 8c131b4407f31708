"""TRL 1.12: the globals of `trl.experimental.ppo.ppo_trainer`, and PPO's formulas that its trainer holds inline."""

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.contract import nan_where_impossible
from ppo_fast.integrations.originals import (
    WIDE,
    clipped_policy_loss,
    clipped_value_loss,
    undefined_unless,
    unmasked_gae,
)
from ppo_fast.integrations.trl.rows import entropies, selected

INVALID_LOGPROB = 1.0  # what TRL writes at padding, so that a ratio there is 1


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Replaces `trl.trainer.utils.selective_log_softmax` of TRL 1.12.

    Args:
        logits: [..., V], floating.
        index: [...], or [..., K] for K of each row.

    Returns:
        Shape of `index`, in the dtype of the logits, in half precision bit for bit as TRL rounds it.

    Raises:
        RuntimeError: an index outside the vocabulary, on the CPU; shapes that do not fit; an empty batch.
    """
    return selected(logits, index)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Replaces `trl.trainer.utils.entropy_from_logits` of TRL 1.12.

    Args:
        logits: [..., V], floating.
        chunk_size: rows that are taken at a time in half precision; the fused op takes them one by one.

    Returns:
        [...], in the dtype of the logits; NaN in a row that holds a logit of -inf.
    """
    return entropies(logits, chunk_size)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Replaces `masked_var`: variance over the counted slots, by n - 1 if unbiased.

    NaN for one counted slot if unbiased, for none if not, and for NaN or infinity anywhere, masked slots included.

    Raises:
        ValueError: the mask counts nothing, and `unbiased`.
    """
    count = mask.sum()
    if unbiased and count == 0:
        raise ValueError(
            "masked_var: the sum of `mask` is 0, expected a counted token: "
            "raise `mini_batch_size` or `gradient_accumulation_steps`"
        )
    mean = _masked_mean(values, mask)
    if mask.dtype == torch.bool and values.dtype in WIDE and values.shape == mask.shape:
        variance = ppo_fast.masked_var(values, mask, unbiased=unbiased)
        return undefined_unless(mean.isfinite() & (count > int(unbiased)), variance)
    variance = _masked_mean((values - mean) ** 2, mask)  # a mask of weights
    return variance * (count / (count - 1)) if unbiased else variance


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Replaces `masked_whiten`: (x - mean) / sqrt(var + 1e-8) in every slot, masked ones too; var is unbiased.

    `shift_mean=False` adds the mean back. NaN and errors as in `masked_var`.
    """
    mean = _masked_mean(values, mask)
    whitened = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return whitened if shift_mean else whitened + mean


@dataclass(frozen=True)
class Rollout:
    """What TRL's trainer holds of a batch before it learns. B sequences, R response tokens.

    Padding starts after the first `sequence_lengths` + 1 tokens; TRL counts a value one slot longer.
    """

    logprobs: Tensor  # [B, R], INVALID_LOGPROB at padding
    ref_logprobs: Tensor  # [B, R], INVALID_LOGPROB at padding
    values: Tensor  # [B, R], 0 after the first slot of padding
    scores: Tensor  # [B]
    sequence_lengths: Tensor  # [B] int64, index of the last token that is not padding
    padding: Tensor  # [B, R] bool, True = padding
    value_padding: Tensor  # [B, R] bool, True = padding, but for its first slot


def rollout_of(
    logprobs: Tensor, ref_logprobs: Tensor, values: Tensor, scores: Tensor, sequence_lengths: Tensor
) -> Rollout:
    """Fill what stands at padding, as TRL does."""
    slots = torch.arange(logprobs.shape[1], device=logprobs.device)
    padding = slots > sequence_lengths.unsqueeze(1)
    value_padding = slots > sequence_lengths.unsqueeze(1) + 1
    return Rollout(
        logprobs.masked_fill(padding, INVALID_LOGPROB),
        ref_logprobs.masked_fill(padding, INVALID_LOGPROB),
        values.masked_fill(value_padding, 0),
        scores,
        sequence_lengths,
        padding,
        value_padding,
    )


@dataclass(frozen=True)
class Estimates:
    """What the rollout teaches; [B, R] each."""

    kl: Tensor  # per-token estimate, nats
    non_score_reward: Tensor  # -kl_coef * kl
    advantages: Tensor  # whitened, 0 at padding
    returns: Tensor


def estimate(
    rollout: Rollout, *, kl_coef: float, kl_estimator: str, gamma: float, lam: float, whiten_rewards: bool
) -> Estimates:
    """KL-shaped rewards with the score one slot after the last token, GAE over all slots, whitened advantages.

    Source: what `PPOTrainer.train` of TRL 1.12 does inline, between its comments 4 and 6.
    """
    kl = ppo_fast.kl_estimate(rollout.logprobs, rollout.ref_logprobs, kind=kl_estimator)  # type: ignore[arg-type]
    kl = kl.to(torch.result_type(rollout.logprobs, rollout.ref_logprobs))
    non_score_reward = -kl_coef * kl
    after = rollout.sequence_lengths + 1
    pays = torch.where(after < kl.shape[1], after, rollout.sequence_lengths)
    sequence = torch.arange(len(kl), device=kl.device)
    rewards = non_score_reward.clone()
    rewards[sequence, pays] += rollout.scores
    if whiten_rewards:
        rewards = masked_whiten(rewards, ~rollout.value_padding, shift_mean=False)
        rewards = rewards.masked_fill(rollout.value_padding, 0)
    advantages, returns = unmasked_gae(rewards, rollout.values, gamma, lam)
    advantages = masked_whiten(advantages, ~rollout.padding).masked_fill(rollout.padding, 0)
    return Estimates(kl, non_score_reward, advantages, returns)


Record = TypeVar("Record", Rollout, Estimates)


@dataclass(frozen=True)
class Losses:
    """One micro-batch; 0-d each. Only `loss` has a gradient."""

    loss: Tensor  # policy + vf_coef * value
    policy: Tensor
    value: Tensor
    policy_clip_fraction: Tensor
    value_clip_fraction: Tensor
    approx_kl: Tensor  # (log ratio)^2 / 2, mean over all slots, padding included
    ratio: Tensor  # mean over all slots, padding included
    entropy: Tensor  # mean over all slots, padding included


def losses(
    logits: Tensor,
    values: Tensor,
    responses: Tensor,
    old: Rollout,
    learned: Estimates,
    *,
    temperature: float,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
) -> Losses:
    """Policy and value loss of a micro-batch with what TRL logs, from logits [b, R, V] and values [b, R].

    Source: what `PPOTrainer.train` of TRL 1.12 does inline, under its comment on multiple epochs.
    """
    logprobs, entropy = _logprobs_and_entropy(logits, responses, temperature)
    logprobs = logprobs.masked_fill(old.padding, INVALID_LOGPROB)
    values = values.masked_fill(old.value_padding, 0)
    token, valued = ~old.padding, ~old.value_padding
    value = clipped_value_loss(values, old.values, learned.returns, valued, cliprange_value)
    policy = clipped_policy_loss(logprobs, old.logprobs, learned.advantages, token, cliprange)
    with torch.no_grad():
        log_ratio = logprobs - old.logprobs
        statistics = {
            "policy": policy.loss.detach(),
            "value": value.loss.detach(),
            "policy_clip_fraction": undefined_unless(token.any(), policy.stats["clip_fraction"]),
            "value_clip_fraction": undefined_unless(valued.any(), value.stats["clip_fraction"]),
            "approx_kl": 0.5 * (log_ratio**2).mean(),
            "ratio": log_ratio.exp().mean(),
            "entropy": entropy.mean(),
        }
    return Losses(policy.loss + vf_coef * value.loss, **statistics)


def _logprobs_and_entropy(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One pass over the logits; the entropy is only logged."""
    if logits.dtype in WIDE:
        logprobs, entropy = ppo_fast.logprobs_and_entropy_from_logits(logits, labels, temperature=temperature)
        return logprobs, nan_where_impossible(entropy.detach(), logits)
    with torch.no_grad():
        scaled = logits / temperature
        probabilities = scaled.softmax(-1)
        entropy = scaled.logsumexp(-1) - (probabilities * scaled).sum(-1)
    return selected(logits, labels, temperature), entropy


def rows_of(record: Record, chosen: object) -> Record:
    """The record of some of its sequences."""
    return replace(record, **{each.name: getattr(record, each.name)[chosen] for each in fields(record)})
