"""Exact KL(pi || ref) of two rows of logits: forward reads both once, backward reads both once and writes once."""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import on_device_of, row_options
from ppo_fast.kernels.rows import ROW_STRIDES, column_gap, distance, online_kl_update, row_origin
from torch import Tensor

KL_STATS = 5  # max x, sum e^d, max r, sum e^d_ref, E_p[d - d_ref]


@triton.jit(do_not_specialize=ROW_STRIDES)
def kl_forward_kernel(
    logits_ptr,
    ref_logits_ptr,
    temperature_ptr,
    kl_ptr,
    stats_ptr,
    temperature_stride,
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    ref_inner_rows,
    ref_outer_stride,
    ref_inner_stride,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write KL = E_p[d - d_ref] - log(total / ref_total) of one row, and what the backward needs of it."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    ref_row = ref_logits_ptr + row_origin(row, ref_inner_rows, ref_outer_stride, ref_inner_stride, ALIGNED)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * temperature_stride)

    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    ref_top = tl.full((), float("-inf"), tl.float32)
    ref_total = tl.full((), 0.0, tl.float32)
    gaps = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        r = tl.load(ref_row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        top, total, ref_top, ref_total, gaps = online_kl_update(
            top, total, ref_top, ref_total, gaps, x, r, inverse_temperature
        )

    mean_gap = gaps / total
    tl.store(kl_ptr + row, mean_gap - tl.log(total / ref_total))
    tl.store(stats_ptr + row * 5, top)
    tl.store(stats_ptr + row * 5 + 1, total)
    tl.store(stats_ptr + row * 5 + 2, ref_top)
    tl.store(stats_ptr + row * 5 + 3, ref_total)
    tl.store(stats_ptr + row * 5 + 4, mean_gap)


@triton.jit(do_not_specialize=ROW_STRIDES)
def kl_backward_kernel(
    logits_ptr,
    ref_logits_ptr,
    temperature_ptr,
    stats_ptr,
    grad_kl_ptr,
    grad_logits_ptr,
    grad_ref_logits_ptr,
    temperature_stride,
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    ref_inner_rows,
    ref_outer_stride,
    ref_inner_stride,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write dx_j = g p_j (d_j - d_ref_j - E_p[d - d_ref]) / T and dr_j = g (q_j - p_j) / T; either may be absent.

    A row with g = 0 is not read and gets zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    ref_row = ref_logits_ptr + row_origin(row, ref_inner_rows, ref_outer_stride, ref_inner_stride, ALIGNED)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * temperature_stride)
    top = tl.load(stats_ptr + row * 5)
    inverse_total = 1.0 / tl.load(stats_ptr + row * 5 + 1)
    ref_top = tl.load(stats_ptr + row * 5 + 2)
    inverse_ref_total = 1.0 / tl.load(stats_ptr + row * 5 + 3)
    mean_gap = tl.load(stats_ptr + row * 5 + 4)
    g = tl.load(grad_kl_ptr + row) * inverse_temperature

    # A weight of 0 adds nothing, but an infinite KL has no gradient: NaN in the whole row shows it.
    negligible = tl.where(mean_gap < float("inf"), 0.0, -1.0)
    columns_read = tl.where(g != 0.0, vocab, 0)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_row + columns, mask=columns < columns_read, other=float("-inf")).to(tl.float32)
        r = tl.load(ref_row + columns, mask=columns < columns_read, other=float("-inf")).to(tl.float32)
        e = tl.exp(distance(x, top, inverse_temperature))
        p = e * inverse_total
        if grad_logits_ptr is not None:
            gap = column_gap(x, r, top, ref_top, inverse_temperature) - mean_gap
            dx = tl.where(e <= negligible, 0.0, p * gap) * g
            dx = tl.where(g != 0.0, dx, 0.0).to(grad_logits_ptr.dtype.element_ty)
            tl.store(grad_logits_ptr + row * vocab + columns, dx, mask=columns < vocab)
        if grad_ref_logits_ptr is not None:
            q = tl.exp(distance(r, ref_top, inverse_temperature)) * inverse_ref_total
            dr = tl.where(g != 0.0, (q - p) * g, 0.0).to(grad_ref_logits_ptr.dtype.element_ty)
            tl.store(grad_ref_logits_ptr + row * vocab + columns, dr, mask=columns < vocab)


def _assert_rows(logits: Tensor, ref_logits: Tensor, temperature: Tensor) -> None:
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        assert x.stride(-1) == 1 or x.shape[-1] == 1, f"rows of {name} are not contiguous: {x.stride()}"
    assert logits.shape == ref_logits.shape, f"shapes {tuple(logits.shape)}, {tuple(ref_logits.shape)}"
    assert temperature.dtype == torch.float32, f"temperature is {temperature.dtype}"
    assert temperature.is_contiguous(), f"temperature has strides {temperature.stride()}"


def kl_forward(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    *,
    grid: tuple[int, int, int],
    ref_grid: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """Launch one program a row; return float32 KL [...] and stats [N, 5] for the backward.

    Both logits are [..., V] with contiguous rows, of any floating dtype; temperature is float32, 0-d or [...]. A grid
    is (inner_rows, outer_stride, inner_stride): row r starts (r // inner_rows) * outer_stride + (r % inner_rows) *
    inner_stride elements after the first.
    """
    _assert_rows(logits, ref_logits, temperature)
    vocab = logits.shape[-1]
    kl = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    stats = torch.empty((kl.numel(), KL_STATS), dtype=torch.float32, device=logits.device)
    if kl.numel() == 0:
        return kl, stats
    with on_device_of(logits):
        kl_forward_kernel[(kl.numel(),)](
            logits_ptr=logits,
            ref_logits_ptr=ref_logits,
            temperature_ptr=temperature,
            kl_ptr=kl,
            stats_ptr=stats,
            temperature_stride=min(1, temperature.dim()),
            vocab=vocab,
            inner_rows=grid[0],
            outer_stride=grid[1],
            inner_stride=grid[2],
            ref_inner_rows=ref_grid[0],
            ref_outer_stride=ref_grid[1],
            ref_inner_stride=ref_grid[2],
            **row_options(vocab),
        )
    return kl, stats


def kl_backward(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: Tensor,
    stats: Tensor,
    grad_kl: Tensor,
    *,
    of_logits: bool,
    of_ref_logits: bool,
    grid: tuple[int, int, int],
    ref_grid: tuple[int, int, int],
) -> tuple[Tensor | None, Tensor | None]:
    """Launch one program a row; return the gradients asked for, contiguous, each in its input's dtype."""
    _assert_rows(logits, ref_logits, temperature)
    assert grad_kl.is_contiguous(), f"grad_kl has strides {grad_kl.stride()}"
    vocab = logits.shape[-1]
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if of_logits else None
    grad_ref = (
        torch.empty(ref_logits.shape, dtype=ref_logits.dtype, device=logits.device) if of_ref_logits else None
    )
    if grad_kl.numel() == 0:
        return grad_logits, grad_ref
    with on_device_of(logits):
        kl_backward_kernel[(grad_kl.numel(),)](
            logits_ptr=logits,
            ref_logits_ptr=ref_logits,
            temperature_ptr=temperature,
            stats_ptr=stats,
            grad_kl_ptr=grad_kl,
            grad_logits_ptr=grad_logits,
            grad_ref_logits_ptr=grad_ref,
            temperature_stride=min(1, temperature.dim()),
            vocab=vocab,
            inner_rows=grid[0],
            outer_stride=grid[1],
            inner_stride=grid[2],
            ref_inner_rows=ref_grid[0],
            ref_outer_stride=ref_grid[1],
            ref_inner_stride=ref_grid[2],
            **row_options(vocab),
        )
    return grad_logits, grad_ref
