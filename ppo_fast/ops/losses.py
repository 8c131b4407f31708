"""Public ops for the losses: clipped policy loss, from log-probabilities or from logits, and value loss."""

from typing import Any, get_args

from torch import Tensor

from ppo_fast import reference
from ppo_fast.ops import dispatch
from ppo_fast.ops.checks import Checker, tokens
from ppo_fast.ops.dispatch import Impl
from ppo_fast.records import PolicyLoss, Reduction, ValueLoss


def check_policy(
    check: Checker,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    shape: tuple[int, ...],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    reduction: str,
    normalizer: float | Tensor | None,
    log_ratio_clamp: float | None,
) -> None:
    """The arguments that every policy loss shares; `shape` is that of its tokens."""
    why = f"the tokens of {check.anchor_name}"
    check.floats(shape, why, old_logprobs=old_logprobs, advantages=advantages)
    check.mask(mask, shape, why)
    check.number("clip_low", clip_low, at_least=0.0, at_most=1.0)
    check.number("clip_high", clip_high, at_least=0.0)
    check.optional_number("dual_clip", dual_clip, above=1.0)
    check.choice("reduction", reduction, get_args(Reduction))
    check.normalizer(normalizer)
    check.optional_number("log_ratio_clamp", log_ratio_clamp)
    check.finite(mask, old_logprobs=old_logprobs, advantages=advantages)


def check_objective(
    check: Checker,
    labels: Tensor,
    mask: Tensor,
    vocab: int | None,
    entropy_coef: float,
    kl_coef: float,
    temperature: float | Tensor,
) -> None:
    """The arguments that the policy losses with a vocabulary share."""
    check.labels(labels, mask.shape, f"{check.anchor_name} without its last axis", vocab, mask)
    check.number("entropy_coef", entropy_coef)
    check.number("kl_coef", kl_coef)
    check.temperature(temperature, mask.shape, mask)


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
    impl: Impl = "auto",
) -> PolicyLoss:
    """PPO's clipped policy loss, to be minimised.

    ratio = exp(logprob - old_logprob);  term = max(-A ratio, -A clip(ratio, 1 - low, 1 + high));
    with a dual clip c, where A < 0: term = min(term, -c A);  loss = sum(term mask) / sum(mask).
    A tie of max or min splits the gradient in halves; clip passes it at its bound.

    Args:
        logprobs: [B, T], floating, nats (packed [total] with `cu_seqlens`).
        old_logprobs: [B, T], of the policy that sampled; gets no gradient.
        advantages: [B, T]; gets no gradient.
        mask: [B, T], bool or numeric, nonzero = the token counts.
        clip_low: how far the ratio may fall below 1, in [0, 1].
        clip_high: how far it may rise above 1, at least 0.
        dual_clip: c > 1, or None.
        reduction: token-mean, token-sum, seq-mean-token-sum or seq-mean-token-mean; the seq-means are over
            the sequences with a counted token.
        normalizer: number or 0-d tensor that replaces the reduction's denominator (divides token-sum).
        log_ratio_clamp: c > 0 clamps logprob - old_logprob to [-c, c]; verl and OpenRLHF have 20.
        cu_seqlens: [B + 1], int, where each sequence starts in packed tensors, or None.
        impl: auto, reference, cpu or triton.

    Returns:
        PolicyLoss, entropy None. Stats: clip_fraction (share of counted tokens whose clipped term is the
        larger), approx_kl (mean of ratio - 1 - log ratio, nats), ratio_mean, ratio_max. An empty mask gives
        loss 0, gradient 0, stats 0.

    Raises:
        ValueError: wrong shape, device, name or coefficient.
        TypeError: wrong dtype.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7; dual clip: Ye et al. 2020 (arXiv 1912.09729).
    """
    check, _ = tokens("policy_loss", "logprobs", logprobs, cu_seqlens)
    surrogate: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "reduction": reduction,
        "normalizer": normalizer,
        "log_ratio_clamp": log_ratio_clamp,
    }
    check_policy(check, old_logprobs, advantages, mask, logprobs.shape, **surrogate)
    check.finite(mask, logprobs=logprobs)
    tokens_of = (logprobs, old_logprobs, advantages, mask)
    runs = dispatch.resolve("policy_loss", impl, logprobs, old_logprobs, advantages)
    if runs == "reference":
        return reference.policy_loss(*tokens_of, cu_seqlens=cu_seqlens, **surrogate)
    from ppo_fast.ops import fused_policy

    return fused_policy.policy_loss(*tokens_of, cu_seqlens=cu_seqlens, impl=runs, **surrogate)


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
    impl: Impl = "auto",
) -> PolicyLoss:
    """loss = clipped policy loss - entropy_coef * entropy + kl_coef * KL(pi || ref), each reduced alike.

    Equivalent to `policy_loss` of `logprobs_from_logits`, minus the reduced `entropy_from_logits`, plus the
    reduced `kl_from_logits`, in one call.

    Args:
        logits: [B, T, V], floating. Rows whose mask is 0 are never read.
        labels: [B, T], int64 in [0, V); anything where the mask is 0.
        old_logprobs, advantages, mask: [B, T], as in `policy_loss`.
        clip_low, clip_high, dual_clip, reduction, normalizer, log_ratio_clamp: as in `policy_loss`.
        entropy_coef: weight of the entropy bonus, loss per nat.
        ref_logits: [B, T, V] of the reference, or None; gets no gradient.
        kl_coef: weight of the exact KL to the reference, loss per nat; needs `ref_logits` unless 0.
        temperature: a float above 0, or a tensor [B, T]; it gets no gradient.
        inplace_backward: allow the gradient to be written over the storage of `logits`. A permission: an
            implementation may leave it unused, and nothing else may read `logits` after it was given. bfloat16 is
            rounded before the gradient of the loss multiplies it, and once more after; float16 only after.
        impl: auto, reference, cpu, triton, or without `ref_logits` cuda.

    Returns:
        PolicyLoss; only its loss is differentiable, in `logits`. Stats as in `policy_loss`, plus entropy and
        kl: means over the counted tokens in nats (kl is 0 without a reference).

    Raises:
        ValueError: wrong shape, device, name or coefficient; on the CPU also a label outside [0, V) under a
            true mask (on a GPU that makes the loss NaN unless `check_inputs(True)`).
        TypeError: wrong dtype.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 (clip), 8 (KL), 9 (entropy).
    """
    check = Checker("policy_loss_from_logits", "logits", logits, dims=3)
    vocab = check.vocabulary(logits)
    surrogate: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "reduction": reduction,
        "normalizer": normalizer,
        "log_ratio_clamp": log_ratio_clamp,
    }
    check_policy(check, old_logprobs, advantages, mask, logits.shape[:-1], **surrogate)
    check_objective(check, labels, mask, vocab, entropy_coef, kl_coef, temperature)
    check.optional_floats(logits.shape, "shape of logits", ref_logits=ref_logits)
    if (
        ref_logits is None and kl_coef != 0
    ):  # in this order: torch.compile would compile anew for a coefficient of 0
        check.fail("ref_logits", "is None", f"a tensor, since `kl_coef` is {kl_coef}")
    check.flag("inplace_backward", inplace_backward)
    check.logits(mask, logits=logits, ref_logits=ref_logits)
    tokens_of = (logits, labels, old_logprobs, advantages, mask)
    surrogate |= {
        "entropy_coef": entropy_coef,
        "ref_logits": ref_logits,
        "kl_coef": kl_coef,
        "temperature": temperature,
        "inplace_backward": inplace_backward,
    }
    runs = dispatch.resolve("policy_loss_from_logits", impl, logits, ref_logits)
    if runs == "cuda" and ref_logits is not None:
        check.fail("impl", "is 'cuda', which has no exact KL", "'triton', since `ref_logits` is given")
    if runs == "reference":
        return reference.policy_loss_from_logits(*tokens_of, **surrogate)
    from ppo_fast.ops import fused_policy_rows

    return fused_policy_rows.policy_loss_from_logits(*tokens_of, impl=runs, **surrogate)


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
    impl: Impl = "auto",
) -> ValueLoss:
    """Clipped squared error of the critic, to be minimised.

    v_clip = clip(v, v_old - c, v_old + c);  loss = 0.5 sum(max((v - R)^2, (v_clip - R)^2) mask) / sum(mask).

    Args:
        values: [B, T], floating (packed [total] with `cu_seqlens`).
        old_values: [B, T], the critic when it sampled; gets no gradient.
        returns: [B, T]; gets no gradient.
        mask: [B, T], bool or numeric, nonzero = the token counts.
        clip: c > 0, in units of value; None for the plain squared error.
        reduction, normalizer: as in `policy_loss`.
        cu_seqlens: [B + 1], int, where each sequence starts in packed tensors, or None.
        impl: auto, reference, cpu or triton.

    Returns:
        ValueLoss. Stats: clip_fraction (share of counted tokens whose clipped error is the larger),
        explained_variance (1 - var(R - v) / var(R); 0 when the returns do not vary), value_mean, return_mean.
        An empty mask gives loss 0, gradient 0, stats 0.

    Raises:
        ValueError: wrong shape, device, name or coefficient.
        TypeError: wrong dtype.

    Source: OpenAI baselines' PPO2; Engstrom et al. 2020 (arXiv 2005.12729), section 3.
    """
    check, _ = tokens("value_loss", "values", values, cu_seqlens)
    check.floats(values.shape, "shape of values", old_values=old_values, returns=returns)
    check.mask(mask, values.shape, "shape of values")
    check.optional_number("clip", clip)
    check.choice("reduction", reduction, get_args(Reduction))
    check.normalizer(normalizer)
    check.finite(mask, values=values, old_values=old_values, returns=returns)
    options: dict[str, Any] = {
        "clip": clip,
        "reduction": reduction,
        "normalizer": normalizer,
        "cu_seqlens": cu_seqlens,
    }
    runs = dispatch.resolve("value_loss", impl, values, old_values, returns)
    if runs == "reference":
        return reference.value_loss(values, old_values, returns, mask, **options)
    from ppo_fast.ops import fused_value

    return fused_value.value_loss(values, old_values, returns, mask, impl=runs, **options)
