"""verl.trainer.ppo.core_algos, the losses: aggregation, clipped policy losses and the value loss, on our ops."""

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import contract
from ppo_fast.integrations.verl.torch_functional import fusable, masked_mean, masked_sum

LOG_RATIO_CLAMP = 20.0
SEQUENCE_LOG_RATIO_CLAMP = 10.0
SEQUENCE_MODES = ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """One number from per-token losses [B, T], normalised over the global batch where its totals are given.

    Args:
        loss_mat: [B, T]. What stands in masked slots is not read by the token modes; the sequence modes multiply it
            by 0, so that NaN there is NaN in the loss.
        loss_mask: [B, T], bool or numeric.
        loss_agg_mode: token-mean, token-sum, seq-mean-token-sum, seq-mean-token-sum-norm, seq-mean-token-mean.
        dp_size: data-parallel ranks, whose gradients are averaged.
        batch_num_tokens, global_batch_size: tokens and sequences of the global batch; None: of this one.
        loss_scale_factor: what seq-mean-token-sum-norm divides by; None: T.

    Raises:
        ValueError: an unknown mode, or several ranks and no global total.
    """
    if loss_agg_mode.startswith("seq-mean"):
        totals = (loss_mat * loss_mask).sum(-1)
        lengths = loss_mask.sum(-1)
        if loss_agg_mode == "seq-mean-token-mean":
            totals = totals / (lengths + 1e-8)
        total = masked_sum(totals, (lengths > 0).float())
    elif fusable(loss_mat, loss_mask):
        dtype = contract.promoted(loss_mat, loss_mask)
        total = (ppo_fast.masked_mean(loss_mat, loss_mask) * loss_mask.sum()).to(dtype)
    else:
        total = masked_sum(loss_mat, loss_mask)
    return _normalised(
        total, loss_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )


def _normalised(
    total: Tensor,
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """Divide the sum of `mode` by what it is a mean over."""
    if mode == "token-sum":
        return total * dp_size
    count: Tensor | int | None
    if mode == "token-mean":
        name, count = "(global) batch_num_tokens", batch_num_tokens
    elif mode in SEQUENCE_MODES:
        name, count = "global_batch_size", global_batch_size
    else:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    if count is None:
        if dp_size > 1:
            raise ValueError(f"{name} is required when dp_size > 1")
        count = mask.sum() if mode == "token-mean" else (mask.sum(-1) > 0).float().sum()
    mean = total / count * dp_size
    if mode == "seq-mean-token-sum-norm":
        mean = mean / (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return mean


def _reduction(mode: str) -> dict[str, Any]:
    """The arguments of our losses that give the sum which `_normalised` divides."""
    if mode == "seq-mean-token-mean":
        return {"reduction": "seq-mean-token-mean", "normalizer": 1.0}
    return {"reduction": "token-sum"}


def _leak(mode: str, mask: Tensor, *tensors: Tensor) -> Tensor | float:
    """NaN where a sequence mode would multiply it by a mask of 0, in a sequence that counts; else 0."""
    if not contract.strict() or not mode.startswith("seq-mean"):
        return 0.0
    counted = mask != 0
    return contract.poison(~counted & counted.any(-1, keepdim=True), *tensors)


def _dtype(mode: str, *tensors: Tensor) -> torch.dtype:
    """That of the sum of `mode`; the sequences are counted by a mask of float32."""
    dtype = contract.promoted(*tensors)
    return torch.promote_types(dtype, torch.float32) if mode.startswith("seq-mean") else dtype


def _clip_range(config: Any) -> tuple[float, float]:
    """How far the ratio may fall below 1 and rise above; below 0 it never is."""
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return min(low, 1.0), high


def _is_a(config: Any, name: str) -> bool:
    """isinstance by name, since verl may not be installed."""
    return any(base.__name__ == name for base in type(config).__mro__)


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped loss with dual clip, log-ratio clamped at 20, and verl's three metrics.

    Args:
        old_log_prob, log_prob, advantages: [B, T]; only `log_prob` gets a gradient.
        response_mask: [B, T], bool or numbers 0 and 1.
        loss_agg_mode: as in `agg_loss`.
        config: verl's ActorConfig: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c, global_batch_info.
        rollout_is_weights: [B, T], at least 0, multiplies each token's loss; or None.

    Returns:
        (loss, metrics), the metrics being floats.
    """
    assert config is not None
    assert not _is_a(config, "AlgoConfig")
    low, high = _clip_range(config)
    dual_clip = config.get("clip_ratio_c", 3.0)
    assert dual_clip > 1.0, (
        f"clip_ratio_c of dual-clip PPO should be greater than 1.0, but get the value: {dual_clip}."
    )
    contract.require_zero_one("compute_policy_loss_vanilla", "response_mask", response_mask)
    weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    out = ppo_fast.policy_loss(
        log_prob,
        old_log_prob,
        weighted,
        response_mask,
        clip_low=low,
        clip_high=high,
        dual_clip=dual_clip,
        log_ratio_clamp=LOG_RATIO_CLAMP,
        **_reduction(loss_agg_mode),
    )
    with torch.no_grad():
        log_ratio = (log_prob - old_log_prob).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
        ratio = log_ratio.exp()
        falls = advantages < 0
        metrics = {
            "actor/pg_clipfrac": out.stats["clip_fraction"].item()
            if rollout_is_weights is None
            else masked_mean(_clipped(ratio, advantages, low, high), response_mask).item(),
            "actor/ppo_kl": masked_mean(-log_ratio, response_mask).item(),
            "actor/pg_clipfrac_lower": masked_mean(
                (falls & (ratio > dual_clip)).float(), response_mask
            ).item(),
        }
    total = out.loss + _leak(loss_agg_mode, response_mask, log_ratio, weighted)
    if rollout_is_weights is not None and contract.strict():  # a weight of 0 does not hide a NaN
        total = total + contract.poison(response_mask != 0, log_ratio)
    total = total.to(_dtype(loss_agg_mode, log_prob, old_log_prob, weighted, response_mask))
    return _normalised(total, response_mask, loss_agg_mode, **config.global_batch_info), metrics


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """1 for each token whose clipped term is the larger."""
    return (-advantages * ratio.clamp(1 - low, 1 + high) > -advantages * ratio).float()


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped loss of GSPO (Zheng et al. 2025, arXiv 2507.18071): one ratio a sequence, its gradient a token's.

    Arguments and results as `compute_policy_loss_vanilla`; no dual clip, and the log-ratio clamped at 10 from above.
    """
    assert config is not None
    assert _is_a(config, "ActorConfig")
    low, high = _clip_range(config)
    contract.require_zero_one("compute_policy_loss_gspo", "response_mask", response_mask)
    with torch.no_grad():
        log_ratio = log_prob - old_log_prob
        lengths = response_mask.sum(-1).clamp(min=1)
        of_sequence = ((log_ratio * response_mask).sum(-1) / lengths).unsqueeze(-1).expand_as(log_ratio)
        weighted = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    moving = log_prob - log_prob.detach()  # 0 in value
    moving = torch.where(of_sequence > SEQUENCE_LOG_RATIO_CLAMP, moving.detach(), moving)
    out = ppo_fast.policy_loss(
        moving,
        -of_sequence.clamp(max=SEQUENCE_LOG_RATIO_CLAMP),
        weighted,
        response_mask,
        clip_low=low,
        clip_high=high,
        **_reduction(loss_agg_mode),
    )
    with torch.no_grad():
        ratio = (moving + of_sequence).clamp(max=SEQUENCE_LOG_RATIO_CLAMP).exp()
        metrics = {
            "actor/pg_clipfrac": masked_mean(_clipped(ratio, advantages, low, high), response_mask).item(),
            "actor/ppo_kl": masked_mean(-log_ratio, response_mask).item(),
            "actor/pg_clipfrac_lower": 0.0,
        }
    total = out.loss + _leak(loss_agg_mode, response_mask, ratio, weighted)
    if rollout_is_weights is not None and contract.strict():
        total = total + contract.poison(response_mask != 0, ratio)
    total = total.to(_dtype(loss_agg_mode, log_prob, old_log_prob, weighted, response_mask))
    return _normalised(total, response_mask, loss_agg_mode, **config.global_batch_info), metrics


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Half the clipped squared error of the critic, and the share of tokens whose clipped error is the larger.

    Args:
        vpreds, returns, values: [B, T]: new prediction, target, old prediction, in this order; only `vpreds` gets a
            gradient.
        response_mask: [B, T], bool or numbers 0 and 1.
        cliprange_value: above 0, how far from `values` the clipped prediction may lie.
        loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor: as in `agg_loss`.
    """
    contract.require_zero_one("compute_value_loss", "response_mask", response_mask)
    out = ppo_fast.value_loss(
        _tied_at_the_clip(vpreds, values, cliprange_value),
        values,
        returns,
        response_mask,
        clip=cliprange_value,
        **_reduction(loss_agg_mode),
    )
    total = out.loss + _leak(loss_agg_mode, response_mask, vpreds, returns, values)
    total = total.to(_dtype(loss_agg_mode, vpreds, returns, values, response_mask))
    loss = _normalised(
        total, response_mask, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    return loss, out.stats["clip_fraction"]


def _tied_at_the_clip(vpreds: Tensor, values: Tensor, clip: float) -> Tensor:
    """`vpreds`, of whose gradient a quarter is lost exactly at the clip.

    verl clips by min and max with tensors, which halve the gradient of a tie, where clamp passes all of it; and there
    the two errors tie as well, so that only half of the gradient comes by way of the clip.
    """
    with torch.no_grad():
        tied = (vpreds == values - clip) | (vpreds == values + clip)
    if vpreds.device.type == "cpu" and not tied.any():
        return vpreds
    still = vpreds.detach()
    return torch.where(tied, still + 0.75 * (vpreds - still), vpreds)
