"""The clipped value loss over tokens as a `torch.library` operator: C++ on a CPU, Triton on a GPU."""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops import native_tokens
from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_estimate import as_bytes, scalar, widest
from ppo_fast.records import ValueLoss

STATS = ("clip_fraction", "explained_variance", "value_mean", "return_mean")  # in the order of the kernels


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None,
    reduction: str,
    normalizer: float | Tensor | None,
    cu_seqlens: Tensor | None,
    impl: str,
) -> ValueLoss:
    """Run `ppo_fast.value_loss` on `impl`."""
    loss, stats, _, _ = clipped_value_loss(
        values,
        old_values.detach(),
        returns.detach(),
        as_bytes(mask) if impl == "cpu" else comparable(mask),
        scalar(math.inf if clip is None else clip, values.device, impl),
        None if normalizer is None else scalar(normalizer, values.device, impl),
        cu_seqlens,
        reduction,
        impl,
    )
    return ValueLoss(loss, dict(zip(STATS, stats.detach().unbind(), strict=True)))


@torch.library.custom_op("ppo_fast::clipped_value_loss", mutates_args=())
def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], stats [4], lengths [B], divisor []); the last two are what the backward needs."""
    if impl == "cpu":
        return native_tokens.value_forward(
            values, old_values, returns, mask, clip, normalizer, cu_seqlens, reduction=reduction
        )
    from ppo_fast.kernels import value_loss as kernels

    return kernels.value_forward(
        *(x.contiguous() for x in (values, old_values, returns, mask)),
        clip,
        normalizer,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        reduction=reduction,
    )


@clipped_value_loss.register_fake
def _(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = widest(values, old_values, returns)
    return (
        clip.new_empty((), dtype=dtype),
        clip.new_empty(len(STATS), dtype=dtype),
        clip.new_empty(sequences, dtype=torch.int64),
        clip.new_empty(()),
    )


@torch.library.custom_op("ppo_fast::clipped_value_loss_backward", mutates_args=())
def clipped_value_loss_backward(
    grad_loss: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    reduction: str,
    impl: str,
) -> Tensor:
    """Gradient of the values, in their dtype."""
    if impl == "cpu":
        return native_tokens.value_backward(
            grad_loss,
            values,
            old_values,
            returns,
            mask,
            clip,
            cu_seqlens,
            lengths,
            divisor,
            reduction=reduction,
        )
    from ppo_fast.kernels import value_loss as kernels

    return kernels.value_backward(
        grad_loss.to(torch.float32),
        *(x.contiguous() for x in (values, old_values, returns, mask)),
        clip,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        lengths,
        divisor,
        reduction=reduction,
    )


@clipped_value_loss_backward.register_fake
def _(
    grad_loss: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    reduction: str,
    impl: str,
) -> Tensor:
    return values.new_empty(values.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _normalizer, cu_seqlens, ctx.reduction, ctx.impl = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    grad = clipped_value_loss_backward(grad_loss, *ctx.saved_tensors, ctx.reduction, ctx.impl)
    return grad, *(None,) * 8


clipped_value_loss.register_autograd(_backward, setup_context=_save_for_backward)
