"""Masked moments in Triton: two `torch.library` operators, one that reduces and one that normalises.

`torch.compile` traces through both without a graph break. Each is differentiable once and keeps, besides its inputs,
four numbers for each column it reduced.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.backends import comparable


def masked_mean(x: Tensor, mask: Tensor, axis: int | None) -> Tensor:
    """sum(x m) / sum(m); the gradient is g m / n. Arguments and result are those of `ppo_fast.masked_mean`."""
    return masked_moment(x, mask, axis, False, 1)[0]


def masked_var(x: Tensor, mask: Tensor, axis: int | None, *, unbiased: bool) -> Tensor:
    """sum((x - mean)^2 m) / n, n - 1 when unbiased; the gradient is 2 g (x - mean) m over the same denominator."""
    return masked_moment(x, mask, axis, unbiased, 2)[0]


def masked_whiten(x: Tensor, mask: Tensor, *, unbiased: bool) -> Tensor:
    """(x - mean) r m with r = 1 / sqrt(var + 1e-8), over all that counts.

    The gradient is r m (g - mean g - r^2 (x - mean) sum(g (x - mean) m) / n), with n - 1 when unbiased.
    """
    return masked_normalize(x, mask, unbiased, False)[0]


def masked_rescale(x: Tensor, mask: Tensor, *, unbiased: bool) -> Tensor:
    """((x - mean) r + mean) m; the gradient is that of `masked_whiten`, and mean g m more."""
    return masked_normalize(x, mask, unbiased, True)[0]


def _reduced_shape(x: Tensor, axis: int | None) -> list[int]:
    if axis is None:
        return []
    axis %= x.dim()
    return [*x.shape[:axis], *x.shape[axis + 1 :]]


def _columns(tensor: Tensor, axis: int | None) -> Tensor:
    """`tensor` as [outer, length, inner], contiguous, with the reduced axis in the middle."""
    shape = tensor.shape
    if axis is None:
        return tensor.reshape(1, tensor.numel(), 1).contiguous()
    axis %= tensor.dim()
    outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    return tensor.reshape(outer, shape[axis], inner).contiguous()


@torch.library.custom_op("ppo_fast::masked_moment", mutates_args=())
def masked_moment(
    x: Tensor, mask: Tensor, axis: int | None, unbiased: bool, order: int
) -> tuple[Tensor, Tensor]:
    """Operator behind `masked_mean` (order 1) and `masked_var` (order 2); its second output is for the backward."""
    from ppo_fast.kernels import moments

    result, stats = moments.moments_forward(
        _columns(x, axis), _columns(comparable(mask), axis), unbiased=unbiased, order=order
    )
    return result.view(_reduced_shape(x, axis)), stats


@masked_moment.register_fake
def _(x: Tensor, mask: Tensor, axis: int | None, unbiased: bool, order: int) -> tuple[Tensor, Tensor]:
    result = x.new_empty(_reduced_shape(x, axis), dtype=torch.float32)
    return result, x.new_empty((4, result.numel()), dtype=torch.float32)


@torch.library.custom_op("ppo_fast::masked_moment_backward", mutates_args=())
def masked_moment_backward(
    grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, axis: int | None, unbiased: bool, order: int
) -> Tensor:
    """Gradient of x, in its dtype, from the gradient of the operator's first output."""
    from ppo_fast.kernels import moments

    grad_x = moments.moment_backward(
        grad.float().contiguous().view(-1),
        _columns(x, axis),
        _columns(comparable(mask), axis),
        stats.contiguous(),
        unbiased=unbiased,
        order=order,
    )
    return grad_x.view(x.shape)


@masked_moment_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, axis: int | None, unbiased: bool, order: int
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ppo_fast::masked_normalize", mutates_args=())
def masked_normalize(x: Tensor, mask: Tensor, unbiased: bool, keep_mean: bool) -> tuple[Tensor, Tensor]:
    """Operator behind `masked_whiten` and, with `keep_mean`, `masked_rescale`."""
    from ppo_fast.kernels import moments

    out, stats = moments.normalize_forward(
        _columns(x, None), _columns(comparable(mask), None), unbiased=unbiased, keep_mean=keep_mean
    )
    return out.view(x.shape), stats


@masked_normalize.register_fake
def _(x: Tensor, mask: Tensor, unbiased: bool, keep_mean: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty((4, 1), dtype=torch.float32)


@torch.library.custom_op("ppo_fast::masked_normalize_backward", mutates_args=())
def masked_normalize_backward(
    grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, unbiased: bool, keep_mean: bool
) -> Tensor:
    """Gradient of x, in its dtype, from the gradient of the operator's first output."""
    from ppo_fast.kernels import moments

    grad_x = moments.normalize_backward(
        _columns(grad.float(), None),
        _columns(x, None),
        _columns(comparable(mask), None),
        stats.contiguous(),
        unbiased=unbiased,
        keep_mean=keep_mean,
    )
    return grad_x.view(x.shape)


@masked_normalize_backward.register_fake
def _(grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, unbiased: bool, keep_mean: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save_moment(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, ctx.axis, ctx.unbiased, ctx.order = inputs
    ctx.save_for_backward(x, mask, output[1])
    ctx.set_materialize_grads(False)


def _moment_backward(
    ctx: Any, grad: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Tensor | None, None, None, None, None]:
    if grad is None:
        return None, None, None, None, None
    x, mask, stats = ctx.saved_tensors
    grad_x = masked_moment_backward(grad, x, mask, stats, ctx.axis, ctx.unbiased, ctx.order)
    return grad_x, None, None, None, None


def _save_normalize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, ctx.unbiased, ctx.keep_mean = inputs
    ctx.save_for_backward(x, mask, output[1])
    ctx.set_materialize_grads(False)


def _normalize_backward(
    ctx: Any, grad: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    if grad is None:
        return None, None, None, None
    x, mask, stats = ctx.saved_tensors
    grad_x = masked_normalize_backward(grad, x, mask, stats, ctx.unbiased, ctx.keep_mean)
    return grad_x, None, None, None


masked_moment.register_autograd(_moment_backward, setup_context=_save_moment)
masked_normalize.register_autograd(_normalize_backward, setup_context=_save_normalize)
