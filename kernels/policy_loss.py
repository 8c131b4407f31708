"""Logits to the clipped policy loss and its gradient: one launch over the logits, or one each way.

A row's gradient is dx_j = (p_j (a + b d_j + k (d_j - d_ref_j)) + c [j = label]) / T. With w the token's weight in the
loss: c = w d term / d logprob, b = w entropy_coef, k = w kl_coef, a = -c - b E_p[d] - k E_p[d - d_ref].
"""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import on_device_of, row_options
from ppo_fast.kernels.rows import (
    ROW_STRIDES,
    column_gap,
    distance,
    online_kl_update,
    online_softmax_update,
    row_origin,
)
from ppo_fast.kernels.surrogate import surrogate
from torch import Tensor

ROW_STATE = 7  # max x, 1 / sum e^d, max r, a, b, c, k
Grid = tuple[int, int, int]


@triton.jit
def write_gradient(
    logits_row,
    ref_row,
    grad_row,
    label,
    vocab,
    inverse_temperature,
    top,
    inverse_total,
    ref_top,
    a,
    b,
    c,
    k,
    BLOCK: tl.constexpr,
):
    """Write one row's gradient, its last tile first: what a pass before left in the cache is read there.

    A row whose b, c and k are 0 is not read and gets zeros; a predicate does it, since leaving early costs registers.
    """
    active = (b != 0.0) | (c != 0.0) | (k != 0.0)
    columns_read = tl.where(active, vocab, 0)
    ref_columns_read = tl.where(k != 0.0, vocab, 0)
    last = (vocab - 1) // BLOCK * BLOCK
    for back in range(0, vocab, BLOCK):
        columns = last - back + tl.arange(0, BLOCK)
        x = tl.load(logits_row + columns, mask=columns < columns_read, other=float("-inf")).to(tl.float32)
        d = distance(x, top, inverse_temperature)
        e = tl.exp(d)
        slope = a + b * d
        if ref_row is not None:
            r = tl.load(ref_row + columns, mask=columns < ref_columns_read, other=float("-inf")).to(
                tl.float32
            )
            gap = tl.where(k != 0.0, column_gap(x, r, top, ref_top, inverse_temperature), 0.0)
            slope += tl.where(e == 0.0, 0.0, k * gap)
        dx = (e * inverse_total * slope + tl.where(columns == label, c, 0.0)) * inverse_temperature
        dx = tl.where(active, dx, 0.0).to(grad_row.dtype.element_ty)
        tl.store(grad_row + columns, dx, mask=columns < vocab)


@triton.jit(do_not_specialize=ROW_STRIDES)
def policy_rows_kernel(
    logits_ptr,
    labels_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    weights_ptr,
    temperature_ptr,
    ref_logits_ptr,
    coefficients_ptr,
    logprobs_ptr,
    entropy_ptr,
    kl_ptr,
    state_ptr,
    grad_logits_ptr,
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
    """Read a row once; write logprob, entropy and KL, and either the row's state or its gradient over the logits.

    A row whose weight is -inf (a false mask) is not read: its numbers are 0.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    weight = tl.load(weights_ptr + row)
    counted = weight != float("-inf")
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    inverse_temperature = 1.0 / tl.where(counted, temperature, 1.0)
    columns_read = tl.where(counted, vocab, 0)
    # Before the first pass, whose reductions are barriers: a fast warp may later write over the label's logit.
    label = tl.load(labels_ptr + row)
    in_range = (label >= 0) & (label < vocab)
    target = tl.load(logits_row + tl.where(in_range, label, 0), mask=counted, other=0.0).to(tl.float32)

    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    ref_top = tl.full((), float("-inf"), tl.float32)
    ref_total = tl.full((), 0.0, tl.float32)
    gaps = tl.full((), 0.0, tl.float32)
    if ref_logits_ptr is not None:
        ref_row = ref_logits_ptr + row_origin(
            row, ref_inner_rows, ref_outer_stride, ref_inner_stride, ALIGNED
        )
    else:
        ref_row = None
    for start in range(0, columns_read, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        if ref_row is not None:
            r = tl.load(ref_row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
            _, _, ref_top, ref_total, gaps = online_kl_update(
                top, total, ref_top, ref_total, gaps, x, r, inverse_temperature
            )
        top, total, weighted = online_softmax_update(top, total, weighted, x, inverse_temperature)

    total = tl.where(counted, total, 1.0)
    top = tl.where(counted, top, 0.0)
    log_total = tl.log(total)
    logprob = tl.where(in_range, (target - top) * inverse_temperature - log_total, float("nan"))
    mean_distance = weighted / total
    tl.store(logprobs_ptr + row, tl.where(counted, logprob, 0.0))
    tl.store(entropy_ptr + row, tl.where(counted, log_total - mean_distance, 0.0))
    mean_gap = gaps / total
    if kl_ptr is not None:
        kl = mean_gap - tl.log(total / tl.where(counted, ref_total, 1.0))
        tl.store(kl_ptr + row, tl.where(counted, kl, 0.0))

    old = tl.load(old_logprobs_ptr + row, mask=counted, other=0.0).to(tl.float32)
    advantage = tl.load(advantages_ptr + row, mask=counted, other=0.0).to(tl.float32)
    low = tl.load(coefficients_ptr)
    high = tl.load(coefficients_ptr + 1)
    dual_clip = tl.load(coefficients_ptr + 2)
    clamp = tl.load(coefficients_ptr + 3)
    _, slope, _ = surrogate(logprob - old, advantage, low, high, dual_clip, clamp)
    c = tl.where(counted, weight * slope, 0.0)
    b = tl.where(counted, weight * tl.load(coefficients_ptr + 4), 0.0)
    k = 0.0
    if ref_row is not None:
        k = tl.where(counted, weight * tl.load(coefficients_ptr + 5), 0.0)
    a = -c - b * mean_distance - tl.where(k == 0.0, 0.0, k * mean_gap)
    inverse_total = 1.0 / total
    if state_ptr is not None:
        state = state_ptr + row * 7
        tl.store(state, top)
        tl.store(state + 1, inverse_total)
        tl.store(state + 2, ref_top)
        tl.store(state + 3, a)
        tl.store(state + 4, b)
        tl.store(state + 5, c)
        tl.store(state + 6, k)
    if grad_logits_ptr is not None:
        grad_row = grad_logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
        # What is written has no order: a tile of its own, since with a reference the common one spills on sm_90.
        WRITTEN: tl.constexpr = BLOCK if ref_logits_ptr is None else BLOCK // 2
        write_gradient(
            logits_row, ref_row, grad_row, label, vocab, inverse_temperature, top, inverse_total, ref_top,
            a, b, c, k, WRITTEN,
        )  # fmt: skip


@triton.jit
def times(g, x):
    """g x, and 0 for an x of 0 under any g: a row without a gradient stays without one."""
    return tl.where(x == 0.0, 0.0, g * x)


@triton.jit(do_not_specialize=ROW_STRIDES)
def policy_gradient_kernel(
    grad_loss_ptr,
    logits_ptr,
    labels_ptr,
    temperature_ptr,
    ref_logits_ptr,
    state_ptr,
    grad_logits_ptr,
    temperature_stride,
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    ref_inner_rows,
    ref_outer_stride,
    ref_inner_stride,
    INPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the gradient of one row from its state, times the gradient of the loss; INPLACE over the logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    if ref_logits_ptr is not None:
        ref_row = ref_logits_ptr + row_origin(
            row, ref_inner_rows, ref_outer_stride, ref_inner_stride, ALIGNED
        )
    else:
        ref_row = None
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * temperature_stride)
    g = tl.load(grad_loss_ptr)
    state = state_ptr + row * 7
    top = tl.load(state)
    inverse_total = tl.load(state + 1)
    ref_top = tl.load(state + 2)
    a = times(g, tl.load(state + 3))
    b = times(g, tl.load(state + 4))
    c = times(g, tl.load(state + 5))
    k = times(g, tl.load(state + 6))
    if INPLACE:
        grad_row = grad_logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    else:
        grad_row = grad_logits_ptr + row * vocab
    write_gradient(
        logits_row, ref_row, grad_row, tl.load(labels_ptr + row), vocab, inverse_temperature, top, inverse_total,
        ref_top, a, b, c, k, BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=ROW_STRIDES)
def scale_rows_kernel(
    grad_loss_ptr,
    rows_ptr,
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Multiply a row in place by the gradient of the loss; nothing is read or written where that is 1."""
    row = tl.program_id(0).to(tl.int64)
    values = rows_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    g = tl.load(grad_loss_ptr)
    columns_scaled = tl.where(g != 1.0, vocab, 0)
    for start in range(0, columns_scaled, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(values + columns, mask=columns < vocab, other=0.0).to(tl.float32)
        tl.store(values + columns, times(g, x).to(rows_ptr.dtype.element_ty), mask=columns < vocab)


def _assert_rows(logits: Tensor, labels: Tensor, ref_logits: Tensor | None) -> None:
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        assert x is None or x.stride(-1) == 1 or x.shape[-1] == 1, f"rows of {name} are not contiguous"
    assert labels.dtype == torch.int64, f"labels are {labels.dtype}"
    assert labels.is_contiguous(), f"labels have strides {labels.stride()}"


def policy_rows(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    coefficients: Tensor,
    *,
    grid: Grid,
    ref_grid: Grid,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Launch one program a row; return float32 logprobs, entropy, KL (None without a reference) and the state [N, 7].

    With `inplace` the gradient of the loss takes the place of the logits in the same launch, and there is no state.
    Token tensors are contiguous; `weights` is float32, -inf in masked slots; a grid is (inner_rows, outer_stride,
    inner_stride), as in `kl_forward`.
    """
    _assert_rows(logits, labels, ref_logits)
    vocab, device = logits.shape[-1], logits.device
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=device)
    entropy = torch.empty(labels.shape, dtype=torch.float32, device=device)
    kl = None if ref_logits is None else torch.empty(labels.shape, dtype=torch.float32, device=device)
    state = None if inplace else torch.empty((labels.numel(), ROW_STATE), dtype=torch.float32, device=device)
    if labels.numel() == 0:
        return logprobs, entropy, kl, state
    with on_device_of(logits):
        policy_rows_kernel[(labels.numel(),)](
            logits_ptr=logits,
            labels_ptr=labels,
            old_logprobs_ptr=old_logprobs,
            advantages_ptr=advantages,
            weights_ptr=weights,
            temperature_ptr=temperature,
            ref_logits_ptr=ref_logits,
            coefficients_ptr=coefficients,
            logprobs_ptr=logprobs,
            entropy_ptr=entropy,
            kl_ptr=kl,
            state_ptr=state,
            grad_logits_ptr=logits if inplace else None,
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
    return logprobs, entropy, kl, state


def policy_gradient(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    state: Tensor,
    *,
    grid: Grid,
    ref_grid: Grid,
    inplace: bool = False,
) -> Tensor:
    """Return the gradient [..., V] of the logits, contiguous or `inplace`, in their dtype.

    `grad_loss` is a float32 0-d tensor.
    """
    _assert_rows(logits, labels, ref_logits)
    vocab = logits.shape[-1]
    grad_logits = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if labels.numel() == 0:
        return grad_logits
    with on_device_of(logits):
        policy_gradient_kernel[(labels.numel(),)](
            grad_loss_ptr=grad_loss,
            logits_ptr=logits,
            labels_ptr=labels,
            temperature_ptr=temperature,
            ref_logits_ptr=ref_logits,
            state_ptr=state,
            grad_logits_ptr=grad_logits,
            temperature_stride=min(1, temperature.dim()),
            vocab=vocab,
            inner_rows=grid[0],
            outer_stride=grid[1],
            inner_stride=grid[2],
            ref_inner_rows=ref_grid[0],
            ref_outer_stride=ref_grid[1],
            ref_inner_stride=ref_grid[2],
            INPLACE=inplace,
            **row_options(vocab),
        )
    return grad_logits


def scale_rows(grad_loss: Tensor, rows: Tensor, *, grid: Grid) -> None:
    """Multiply the gradient that stands in `rows` [..., V] by `grad_loss`, float32 0-d, in place."""
    count, vocab = rows.shape[:-1].numel(), rows.shape[-1]
    if count == 0:
        return
    with on_device_of(rows):
        scale_rows_kernel[(count,)](
            grad_loss_ptr=grad_loss,
            rows_ptr=rows,
            vocab=vocab,
            inner_rows=grid[0],
            outer_stride=grid[1],
            inner_stride=grid[2],
            **row_options(vocab),
        )
