"""Masked moments, C++ on a CPU and Triton on a GPU: two `torch.library` operators, to reduce and to normalise.

`torch.compile` traces through both without a graph break. Each is differentiable once and keeps, besides its inputs,
three or four numbers for each column it reduced.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops import native_tokens
from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_estimate import as_bytes, widest


def masked_mean(x: Tensor, mask: Tensor, axis: int | None, *, impl: str) -> Tensor:
    """sum(x m) / sum(m); the gradient is g m / n. Arguments and result are those of `ppo_fast.masked_mean`."""
    return masked_moment(x, _readable(mask, impl), axis, False, 1, impl)[0]


def masked_var(x: Tensor, mask: Tensor, axis: int | None, *, unbiased: bool, impl: str) -> Tensor:
    """sum((x - mean)^2 m) / n, n - 1 when unbiased; the gradient is 2 g (x - mean) m over the same denominator."""
    return masked_moment(x, _readable(mask, impl), axis, unbiased, 2, impl)[0]


def masked_whiten(x: Tensor, mask: Tensor, *, unbiased: bool, impl: str) -> Tensor:
    """(x - mean) r m with r = 1 / sqrt(var + 1e-8), over all that counts.

    The gradient is r m (g - mean g - r^2 (x - mean) sum(g (x - mean) m) / n), with n - 1 when unbiased.
    """
    return masked_normalize(x, _readable(mask, impl), unbiased, False, impl)[0]


def masked_rescale(x: Tensor, mask: Tensor, *, unbiased: bool, impl: str) -> Tensor:
    """((x - mean) r + mean) m; the gradient is that of `masked_whiten`, and mean g m more."""
    return masked_normalize(x, _readable(mask, impl), unbiased, True, impl)[0]


def _readable(mask: Tensor, impl: str) -> Tensor:
    """`mask` in a dtype that the kernels of `impl` compare with 0."""
    return as_bytes(mask) if impl == "cpu" else comparable(mask)


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


def _stats(x: Tensor, columns: int, impl: str) -> Tensor:
    """Shape and dtype of what the backward needs of each column."""
    if impl == "cpu":
        return x.new_empty((columns, native_tokens.MOMENTS), dtype=torch.float64)
    return x.new_empty((4, columns), dtype=torch.float32)


@torch.library.custom_op("ppo_fast::masked_moment", mutates_args=())
def masked_moment(
    x: Tensor, mask: Tensor, axis: int | None, unbiased: bool, order: int, impl: str
) -> tuple[Tensor, Tensor]:
    """Operator behind `masked_mean` (order 1) and `masked_var` (order 2); its second output is for the backward."""
    columns = _columns(x, axis), _columns(_readable(mask, impl), axis)
    if impl == "cpu":
        result, stats = native_tokens.moments_forward(*columns, unbiased=unbiased, order=order)
    else:
        from ppo_fast.kernels import moments

        result, stats = moments.moments_forward(*columns, unbiased=unbiased, order=order)
    return result.view(_reduced_shape(x, axis)), stats


@masked_moment.register_fake
def _(
    x: Tensor, mask: Tensor, axis: int | None, unbiased: bool, order: int, impl: str
) -> tuple[Tensor, Tensor]:
    result = x.new_empty(_reduced_shape(x, axis), dtype=widest(x))
    return result, _stats(x, result.numel(), impl)


@torch.library.custom_op("ppo_fast::masked_moment_backward", mutates_args=())
def masked_moment_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    stats: Tensor,
    axis: int | None,
    unbiased: bool,
    order: int,
    impl: str,
) -> Tensor:
    """Gradient of x, in its dtype, from the gradient of the operator's first output."""
    grad = grad.to(widest(x)).contiguous().view(-1)
    columns = _columns(x, axis), _columns(_readable(mask, impl), axis)
    if impl == "cpu":
        grad_x = native_tokens.moment_backward(grad, *columns, stats, unbiased=unbiased, order=order)
    else:
        from ppo_fast.kernels import moments

        grad_x = moments.moment_backward(grad, *columns, stats.contiguous(), unbiased=unbiased, order=order)
    return grad_x.view(x.shape)


@masked_moment_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    stats: Tensor,
    axis: int | None,
    unbiased: bool,
    order: int,
    impl: str,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ppo_fast::masked_normalize", mutates_args=())
def masked_normalize(
    x: Tensor, mask: Tensor, unbiased: bool, keep_mean: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Operator behind `masked_whiten` and, with `keep_mean`, `masked_rescale`."""
    columns = _columns(x, None), _columns(_readable(mask, impl), None)
    if impl == "cpu":
        out, stats = native_tokens.normalize_forward(*columns, unbiased=unbiased, keep_mean=keep_mean)
    else:
        from ppo_fast.kernels import moments

        out, stats = moments.normalize_forward(*columns, unbiased=unbiased, keep_mean=keep_mean)
    return out.view(x.shape), stats


@masked_normalize.register_fake
def _(x: Tensor, mask: Tensor, unbiased: bool, keep_mean: bool, impl: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=widest(x)), _stats(x, 1, impl)


@torch.library.custom_op("ppo_fast::masked_normalize_backward", mutates_args=())
def masked_normalize_backward(
    grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, unbiased: bool, keep_mean: bool, impl: str
) -> Tensor:
    """Gradient of x, in its dtype, from the gradient of the operator's first output."""
    grad = _columns(grad.to(widest(x)), None)
    columns = _columns(x, None), _columns(_readable(mask, impl), None)
    if impl == "cpu":
        grad_x = native_tokens.normalize_backward(
            grad, *columns, stats, unbiased=unbiased, keep_mean=keep_mean
        )
    else:
        from ppo_fast.kernels import moments

        grad_x = moments.normalize_backward(
            grad, *columns, stats.contiguous(), unbiased=unbiased, keep_mean=keep_mean
        )
    return grad_x.view(x.shape)


@masked_normalize_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, unbiased: bool, keep_mean: bool, impl: str
) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, *ctx.options = inputs
    ctx.save_for_backward(x, mask, output[1])
    ctx.set_materialize_grads(False)


def _moment_backward(ctx: Any, grad: Tensor | None, _grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return masked_moment_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _normalize_backward(
    ctx: Any, grad: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return masked_normalize_backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * 4


masked_moment.register_autograd(_moment_backward, setup_context=_save_for_backward)
masked_normalize.register_autograd(_normalize_backward, setup_context=_save_for_backward)
