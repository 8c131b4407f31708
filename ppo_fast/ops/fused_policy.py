"""The clipped policy loss over tokens as a `torch.library` operator: C++ on a CPU, Triton on a GPU."""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops import native_tokens
from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_estimate import as_bytes, packed, scalar, widest
from ppo_fast.records import PolicyLoss

TOKEN_STATS = ("clip_fraction", "approx_kl", "ratio_mean", "ratio_max")  # in the order of the kernels


def pack_coefficients(
    device: torch.device,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float | None,
    normalizer: float | Tensor | None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    impl: str,
) -> tuple[Tensor, Tensor | None]:
    """The numbers of a call as one tensor, see `packed`, and the normalizer, a 0-d tensor, if there is one.

    Read at run time, so that another value compiles nothing anew, and a CUDA graph may be captured.
    """
    own = 1.0 if normalizer is None or isinstance(normalizer, Tensor) else normalizer
    values = (
        1 - clip_low,
        1 + clip_high,
        math.inf if dual_clip is None else dual_clip,
        math.inf if log_ratio_clamp is None else log_ratio_clamp,
        entropy_coef,
        kl_coef,
        own,
    )
    coefficients = packed(values, device, impl)
    if normalizer is None:
        return coefficients, None
    if isinstance(normalizer, Tensor):
        return coefficients, scalar(normalizer, device, impl)
    return coefficients, coefficients[-1].clone()


def contiguous(*tensors: Tensor) -> list[Tensor]:
    """Each tensor on contiguous storage."""
    return [x.contiguous() for x in tensors]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reduction: str,
    cu_seqlens: Tensor | None,
    impl: str,
    **numbers: Any,
) -> PolicyLoss:
    """Run `ppo_fast.policy_loss` on `impl`."""
    coefficients, normalizer = pack_coefficients(logprobs.device, impl=impl, **numbers)
    loss, stats, kept, _, _ = clipped_policy_loss(
        logprobs,
        old_logprobs.detach(),
        advantages.detach(),
        as_bytes(mask) if impl == "cpu" else comparable(mask),
        coefficients,
        normalizer,
        cu_seqlens,
        reduction,
        impl,
    )
    named = dict(zip(TOKEN_STATS, stats.detach().unbind(), strict=False))
    return PolicyLoss(loss, kept.detach(), None, named)


@torch.library.custom_op("ppo_fast::clipped_policy_loss", mutates_args=())
def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], stats [6], logprobs, lengths [B], divisor []); the last two are what the backward needs."""
    if impl == "cpu":
        return native_tokens.policy_forward(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            coefficients,
            normalizer,
            cu_seqlens,
            reduction=reduction,
        )
    from ppo_fast.kernels import tokens

    return tokens.policy_forward(
        *contiguous(logprobs, old_logprobs, advantages, mask),
        coefficients,
        normalizer,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        reduction=reduction,
    )


@clipped_policy_loss.register_fake
def _(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = widest(logprobs, old_logprobs, advantages)
    return (
        coefficients.new_empty((), dtype=dtype),
        coefficients.new_empty(6, dtype=dtype),
        coefficients.new_empty(logprobs.shape, dtype=dtype),
        coefficients.new_empty(sequences, dtype=torch.int64),
        coefficients.new_empty(()),
    )


@torch.library.custom_op("ppo_fast::clipped_policy_loss_backward", mutates_args=())
def clipped_policy_loss_backward(
    grad_loss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    reduction: str,
    impl: str,
) -> Tensor:
    """Gradient of the log-probabilities, in their dtype."""
    if impl == "cpu":
        return native_tokens.policy_backward(
            grad_loss,
            logprobs,
            old_logprobs,
            advantages,
            mask,
            coefficients,
            cu_seqlens,
            lengths,
            divisor,
            reduction=reduction,
        )
    from ppo_fast.kernels import tokens

    return tokens.policy_backward(
        grad_loss.to(torch.float32),
        *contiguous(logprobs, old_logprobs, advantages, mask),
        coefficients,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        lengths,
        divisor,
        reduction=reduction,
    )


@clipped_policy_loss_backward.register_fake
def _(
    grad_loss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    reduction: str,
    impl: str,
) -> Tensor:
    return logprobs.new_empty(logprobs.shape)


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _normalizer, cu_seqlens, ctx.reduction, ctx.impl = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[3:])
    ctx.set_materialize_grads(False)


def _tokens_backward(
    ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    grad = clipped_policy_loss_backward(grad_loss, *ctx.saved_tensors, ctx.reduction, ctx.impl)
    return grad, *(None,) * 8


clipped_policy_loss.register_autograd(_tokens_backward, setup_context=_save_tokens)
