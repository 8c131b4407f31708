"""Exact KL of two rows of logits as a `torch.library` operator with both gradients: C++ on a CPU, Triton on a GPU."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops import native_rows
from ppo_fast.ops.fused_estimate import coefficient_dtype, scalar, widest
from ppo_fast.ops.row_grid import RowGrid, gpu_row_grid, row_grid

STATE = {"cpu": native_rows.POLICY_STATE, "triton": 5}  # numbers of a row


def exact_kl(logits: Tensor, ref_logits: Tensor, temperature: float | Tensor, impl: str) -> Tensor:
    """KL(pi || ref) of each row, [...], differentiable in both logits; see `ppo_fast.kl_from_logits`."""
    return kl_rows(logits, ref_logits, scalar(temperature, logits.device, impl), impl)[0]


def rows_of_one_arithmetic(logits: Tensor, ref_logits: Tensor | None) -> tuple[RowGrid, RowGrid | None]:
    """The rows of both, copied to float64 where only the other one is."""
    dtype = widest(logits, ref_logits)
    rows, ref_rows = (
        None if x is None else row_grid(x if dtype == torch.float32 else x.to(dtype))
        for x in (logits, ref_logits)
    )
    assert rows is not None
    return rows, ref_rows


@torch.library.custom_op("ppo_fast::kl_rows", mutates_args=())
def kl_rows(logits: Tensor, ref_logits: Tensor, temperature: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """Operator behind `exact_kl`; its second output is what the backward needs of each row."""
    if impl == "cpu":
        rows, ref_rows = rows_of_one_arithmetic(logits, ref_logits)
        assert ref_rows is not None
        return native_rows.kl_forward(rows, ref_rows, temperature)
    from ppo_fast.kernels import kl

    rows, ref_rows = gpu_row_grid(logits), gpu_row_grid(ref_logits)
    return kl.kl_forward(
        rows.logits, ref_rows.logits, temperature, grid=rows.strides, ref_grid=ref_rows.strides
    )


@kl_rows.register_fake
def _(logits: Tensor, ref_logits: Tensor, temperature: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    kl = logits.new_empty(logits.shape[:-1], dtype=widest(logits, ref_logits))
    return kl, logits.new_empty((kl.numel(), STATE[impl]), dtype=coefficient_dtype(impl))


@torch.library.custom_op("ppo_fast::kl_rows_backward", mutates_args=())
def kl_rows_backward(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    impl: str,
    stats: Tensor,
    grad_kl: Tensor,
    of_logits: bool,
    of_ref_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both logits; the one not asked for is empty."""
    wanted = {"of_logits": of_logits, "of_ref_logits": of_ref_logits}
    if impl == "cpu":
        rows, ref_rows = rows_of_one_arithmetic(logits, ref_logits)
        assert ref_rows is not None
        grads = native_rows.kl_backward(rows, ref_rows, temperature, stats, grad_kl, **wanted)
    else:
        from ppo_fast.kernels import kl

        rows, ref_rows = gpu_row_grid(logits), gpu_row_grid(ref_logits)
        grads = kl.kl_backward(
            rows.logits,
            ref_rows.logits,
            temperature,
            stats,
            grad_kl.to(torch.float32).contiguous(),
            grid=rows.strides,
            ref_grid=ref_rows.strides,
            **wanted,
        )
    first, second = (
        x.new_empty(0) if grad is None else grad.to(x.dtype)
        for grad, x in zip(grads, (logits, ref_logits), strict=True)
    )
    return first, second


@kl_rows_backward.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    impl: str,
    stats: Tensor,
    grad_kl: Tensor,
    of_logits: bool,
    of_ref_logits: bool,
) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty(logits.shape if of_logits else 0),
        ref_logits.new_empty(ref_logits.shape if of_ref_logits else 0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_kl: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    of_logits, of_ref_logits = ctx.needs_input_grad[:2]
    if grad_kl is None:
        return None, None, None, None
    *tensors, stats = ctx.saved_tensors
    grads = kl_rows_backward(*tensors, ctx.impl, stats, grad_kl, of_logits, of_ref_logits)
    return grads[0] if of_logits else None, grads[1] if of_ref_logits else None, None, None


kl_rows.register_autograd(_backward, setup_context=_save_for_backward)
