"""The clipped value loss over tokens by the Triton kernels, as a `torch.library` operator."""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_kl import scalar_tensor
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
) -> ValueLoss:
    """Run `ppo_fast.value_loss` in two launches, and one for the gradient."""
    loss, stats, _, _ = clipped_value_loss(
        values,
        old_values.detach(),
        returns.detach(),
        comparable(mask),
        scalar_tensor(math.inf if clip is None else clip, values.device),
        None if normalizer is None else scalar_tensor(normalizer, values.device),
        cu_seqlens,
        reduction,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], stats [4], lengths [B], divisor []); the last two are what the backward needs."""
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    lengths = clip.new_empty(sequences, dtype=torch.int64)
    return clip.new_empty(()), clip.new_empty(len(STATS)), lengths, clip.new_empty(())


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
) -> Tensor:
    """Gradient of the values, in their dtype."""
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
) -> Tensor:
    return values.new_empty(values.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _normalizer, cu_seqlens, ctx.reduction = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    return clipped_value_loss_backward(grad_loss, *ctx.saved_tensors, ctx.reduction), *(None,) * 7


clipped_value_loss.register_autograd(_backward, setup_context=_save_for_backward)
