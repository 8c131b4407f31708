"""Exact KL of two rows of logits by the Triton kernels, as a `torch.library` operator with both gradients."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.row_grid import row_grid


def scalar_tensor(value: float | Tensor, device: torch.device) -> Tensor:
    """A number as a float32 0-d tensor, or a float32 tensor of per-row values, contiguous and without gradient.

    By a product under torch.compile, which would compile anew for each value of torch.full's.
    """
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32).contiguous()
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float32, device=device) * value
    return torch.full((), value, dtype=torch.float32, device=device)


def exact_kl(logits: Tensor, ref_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(pi || ref) of each row, float32 [...], differentiable in both logits; see `ppo_fast.kl_from_logits`."""
    return kl_rows(logits, ref_logits, scalar_tensor(temperature, logits.device))[0]


@torch.library.custom_op("ppo_fast::kl_rows", mutates_args=())
def kl_rows(logits: Tensor, ref_logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Operator behind `exact_kl`; its second output [N, 5] is what the backward needs of each row."""
    from ppo_fast.kernels import kl

    rows, ref_rows = row_grid(logits), row_grid(ref_logits)
    return kl.kl_forward(
        rows.logits, ref_rows.logits, temperature, grid=rows.strides, ref_grid=ref_rows.strides
    )


@kl_rows.register_fake
def _(logits: Tensor, ref_logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    kl = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    return kl, logits.new_empty((kl.numel(), 5), dtype=torch.float32)


@torch.library.custom_op("ppo_fast::kl_rows_backward", mutates_args=())
def kl_rows_backward(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    stats: Tensor,
    grad_kl: Tensor,
    of_logits: bool,
    of_ref_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both logits; the one not asked for is empty."""
    from ppo_fast.kernels import kl

    rows, ref_rows = row_grid(logits), row_grid(ref_logits)
    grads = kl.kl_backward(
        rows.logits,
        ref_rows.logits,
        temperature,
        stats,
        grad_kl.to(torch.float32).contiguous(),
        of_logits=of_logits,
        of_ref_logits=of_ref_logits,
        grid=rows.strides,
        ref_grid=ref_rows.strides,
    )
    first, second = (
        x.new_empty(0) if grad is None else grad for grad, x in zip(grads, (logits, ref_logits), strict=True)
    )
    return first, second


@kl_rows_backward.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
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
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_kl: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    of_logits, of_ref_logits = ctx.needs_input_grad[:2]
    if grad_kl is None:
        return None, None, None
    grads = kl_rows_backward(*ctx.saved_tensors, grad_kl, of_logits, of_ref_logits)
    return grads[0] if of_logits else None, grads[1] if of_ref_logits else None, None


kl_rows.register_autograd(_backward, setup_context=_save_for_backward)
