"""Oracles of the losses: clipped policy loss, from log-probabilities or from logits, and value loss."""

import math

import torch
from torch import Tensor

from ppo_fast.records import PolicyLoss, Reduction, ValueLoss
from ppo_fast.reference.logits import entropy_rows, kl_rows, log_softmax_rows, pick
from ppo_fast.reference.moments import masked_mean, masked_var
from ppo_fast.reference.numerics import keep, mean_where, pad_rows, unpad_rows


def aggregate(x: Tensor, counted: Tensor, reduction: Reduction, normalizer: float | Tensor | None) -> Tensor:
    """One number from per-token terms `x`, which hold 0 where `counted` is False.

    token-mean: sum / tokens. token-sum: sum. seq-mean-token-sum: mean over the sequences of each one's sum.
    seq-mean-token-mean: mean over the sequences of each one's mean. Only sequences with a counted token
    count. `normalizer` stands in for the last denominator.

    Source: the sequence and token forms are compared in DAPO, Yu et al. 2025 (arXiv 2503.14476), section 3.3.
    """
    if reduction.startswith("seq-mean"):
        lengths = counted.sum(-1)
        x = x.sum(-1)
        if reduction == "seq-mean-token-mean":
            x = x / lengths.clamp(min=1)
        denominator: float | Tensor = (lengths > 0).sum().clamp(min=1)
    else:
        denominator = 1.0 if reduction == "token-sum" else counted.sum().clamp(min=1)
    if normalizer is not None:
        denominator = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    return x.sum() / denominator


def _clipped_terms(
    log_ratio: Tensor,
    advantages: Tensor,
    counted: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-token clipped loss and its statistics; every input holds 0 where `counted` is False."""
    # Where another branch bounds the term the ratio may overflow harmlessly: keep exp finite there, since
    # its gradient would be 0 * inf. A zero advantage drops out before exp for the same reason.
    limit = math.log(torch.finfo(log_ratio.dtype).max) - 1
    bounded = torch.full_like(counted, True) if dual_clip is not None else advantages > 0
    tame = torch.where(bounded, log_ratio.clamp(max=limit), log_ratio)
    ratio = torch.exp(torch.where(advantages != 0, tame, 0.0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    terms = torch.maximum(plain, clipped)
    if dual_clip is not None:
        terms = torch.where(advantages < 0, torch.minimum(terms, -dual_clip * advantages), terms)
    with torch.no_grad():
        true_ratio = torch.where(counted, log_ratio.exp(), 0.0)
        stats = {
            "clip_fraction": mean_where((clipped > plain).to(plain.dtype), counted),
            "approx_kl": mean_where(torch.expm1(log_ratio) - log_ratio, counted),
            "ratio_mean": mean_where(true_ratio, counted),
            "ratio_max": true_ratio.max() if true_ratio.numel() else true_ratio.sum(),
        }
    return terms, stats


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    log_ratio_clamp: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped policy loss, to be minimised.

    ratio = exp(logprob - old_logprob);  term = max(-A ratio, -A clip(ratio, 1 - low, 1 + high));
    with a dual clip c, where A < 0: term = min(term, -c A);  loss = sum(term mask) / sum(mask).

    Args:
        logprobs: [B, T], floating, nats (packed [total] with `cu_seqlens`).
        old_logprobs: [B, T], of the policy that sampled; gets no gradient.
        advantages: [B, T]; gets no gradient.
        mask: [B, T], nonzero = the token counts.
        clip_low, clip_high: how far the ratio may fall below and rise above 1.
        dual_clip: c > 1, or None.
        reduction: token-mean, token-sum, seq-mean-token-sum or seq-mean-token-mean.
        normalizer: number or 0-d tensor that replaces the reduction's denominator (divides token-sum).
        log_ratio_clamp: c > 0 clamps logprob - old_logprob to [-c, c]; verl and OpenRLHF have 20.
        cu_seqlens: [B + 1], int, where each sequence starts, or None.

    Returns:
        PolicyLoss, entropy None. Stats: clip_fraction (share of counted tokens whose clipped term is the
        larger), approx_kl (mean of ratio - 1 - log ratio, nats), ratio_mean, ratio_max.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv 1912.09729).
    """
    if cu_seqlens is not None:
        padded = policy_loss(
            *(pad_rows(x, cu_seqlens) for x in (logprobs, old_logprobs, advantages, mask)),
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            reduction=reduction,
            normalizer=normalizer,
            log_ratio_clamp=log_ratio_clamp,
        )
        return padded._replace(logprobs=unpad_rows(padded.logprobs, cu_seqlens, logprobs.shape[0]))
    counted = mask != 0
    new = keep(logprobs, counted)
    log_ratio = new - keep(old_logprobs, counted).detach()
    if log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
    terms, stats = _clipped_terms(
        log_ratio, keep(advantages, counted).detach(), counted, clip_low, clip_high, dual_clip
    )
    return PolicyLoss(aggregate(terms, counted, reduction, normalizer), new.detach(), None, stats)


def policy_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_logits: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    log_ratio_clamp: float | None = None,
    inplace_backward: bool = False,
) -> PolicyLoss:
    """loss = clipped policy loss - entropy_coef * entropy + kl_coef * KL(pi || ref), each reduced alike.

    Args:
        logits: [B, T, V], floating. Rows whose mask is 0 are never read.
        labels: [B, T], int64 in [0, V); anything where the mask is 0.
        old_logprobs, advantages, mask: [B, T], as in `policy_loss`.
        clip_low, clip_high, dual_clip, reduction, normalizer, log_ratio_clamp: as in `policy_loss`.
        entropy_coef: weight of the entropy bonus, loss per nat.
        ref_logits: [B, T, V] of the reference, or None; gets no gradient.
        kl_coef: weight of the exact KL to the reference, loss per nat; needs `ref_logits`.
        temperature: tau > 0, a float or a tensor [B, T]; it gets no gradient.
        inplace_backward: a permission to write the gradient over the logits; here it is not used.

    Returns:
        PolicyLoss; stats as in `policy_loss`, plus entropy and kl, both means over the counted tokens in
        nats (kl is 0 without a reference). Row gradient: dz_j = p_j (a + b z_j) - c 1[j = label] + KL term.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 (clip), 8 (KL), 9 (entropy).
    """
    counted = mask != 0
    rows = counted.unsqueeze(-1)
    tau = torch.where(counted, temperature, 1.0) if isinstance(temperature, Tensor) else temperature
    logp = log_softmax_rows(keep(logits, rows), tau)
    out = policy_loss(
        pick(logp, labels),
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        reduction=reduction,
        normalizer=normalizer,
        log_ratio_clamp=log_ratio_clamp,
    )
    entropy = keep(entropy_rows(logp), counted)
    loss, kl = out.loss, torch.zeros_like(entropy)
    if entropy_coef != 0:
        loss = loss - entropy_coef * aggregate(entropy, counted, reduction, normalizer)
    if ref_logits is not None:
        kl = keep(kl_rows(logp, log_softmax_rows(keep(ref_logits, rows).detach(), tau)), counted)
        if kl_coef != 0:
            loss = loss + kl_coef * aggregate(kl, counted, reduction, normalizer)
    means = {"entropy": mean_where(entropy, counted).detach(), "kl": mean_where(kl, counted).detach()}
    return PolicyLoss(loss, out.logprobs, entropy.detach(), {**out.stats, **means})


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> ValueLoss:
    """Clipped squared error of the critic, to be minimised.

    v_clip = clip(v, v_old - c, v_old + c);  loss = 0.5 sum(max((v - R)^2, (v_clip - R)^2) mask) / sum(mask).

    Args:
        values: [B, T], floating (packed [total] with `cu_seqlens`).
        old_values: [B, T], the critic when it sampled; gets no gradient.
        returns: [B, T]; gets no gradient.
        mask: [B, T], nonzero = the token counts.
        clip: c > 0, in units of value; None for the plain squared error.
        reduction, normalizer: as in `policy_loss`.
        cu_seqlens: [B + 1], int, where each sequence starts, or None.

    Returns:
        ValueLoss. Stats: clip_fraction (share of counted tokens whose clipped error is the larger),
        explained_variance (1 - var(R - v) / var(R); 0 when the returns do not vary), value_mean, return_mean.

    Source: OpenAI baselines' PPO2; Engstrom et al. 2020 (arXiv 2005.12729), section 3.
    """
    if cu_seqlens is not None:
        return value_loss(
            *(pad_rows(x, cu_seqlens) for x in (values, old_values, returns, mask)),
            clip=clip,
            reduction=reduction,
            normalizer=normalizer,
        )
    counted = mask != 0
    v, target = keep(values, counted), keep(returns, counted).detach()
    old = keep(old_values, counted).detach()
    plain = (v - target).square()
    clipped = plain if clip is None else (v.clamp(old - clip, old + clip) - target).square()
    terms = plain if clip is None else torch.maximum(plain, clipped)
    with torch.no_grad():
        spread = masked_var(target, counted)
        unexplained = masked_var(target - v, counted) / torch.where(spread > 0, spread, 1.0)
        stats = {
            "clip_fraction": mean_where((clipped > plain).to(v.dtype), counted),
            "explained_variance": torch.where(spread > 0, 1 - unexplained, 0.0),
            "value_mean": masked_mean(v, counted),
            "return_mean": masked_mean(target, counted),
        }
    return ValueLoss(0.5 * aggregate(terms, counted, reduction, normalizer), stats)
