"""Logprob of a label and entropy of each row of logits: forward in one read, backward in one read and one write."""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import on_device_of, row_options
from ppo_fast.kernels.rows import ROW_STRIDES, online_softmax_update, row_gradient, row_origin
from torch import Tensor

STATS = 3  # float32 numbers kept for each row: max x, sum exp(d), sum p d


@triton.jit(do_not_specialize=ROW_STRIDES)
def logprob_forward_kernel(
    logits_ptr,
    labels_ptr,
    temperature_ptr,
    logprobs_ptr,
    entropy_ptr,
    stats_ptr,
    temperature_stride,
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write logprob = d_label - log sum exp(d) (NaN for a label outside [0, V)), entropy = log sum exp(d) - sum p d."""
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * temperature_stride)

    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_row + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32)
        top, total, weighted = online_softmax_update(top, total, weighted, x, inverse_temperature)

    label = tl.load(labels_ptr + row)
    in_range = (label >= 0) & (label < vocab)
    target = tl.load(logits_row + tl.where(in_range, label, 0)).to(tl.float32)
    log_total = tl.log(total)
    logprob = (target - top) * inverse_temperature - log_total
    tl.store(logprobs_ptr + row, tl.where(in_range, logprob, float("nan")))
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(stats_ptr + row * 3, top)
    tl.store(stats_ptr + row * 3 + 1, total)
    tl.store(stats_ptr + row * 3 + 2, weighted / total)


@triton.jit(do_not_specialize=ROW_STRIDES)
def logprob_backward_kernel(
    logits_ptr,
    labels_ptr,
    temperature_ptr,
    stats_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,
    grad_logits_ptr,
    temperature_stride,
    vocab,
    inner_rows,
    outer_stride,
    inner_stride,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write dx_j = (p_j (a + b d_j) + c [j = label]) / T.

    a = g_entropy sum p d - g_logprob, b = -g_entropy, c = g_logprob. A row whose two upstream gradients are 0 is not
    read and gets zeros; a predicate does it, since leaving early costs registers.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * temperature_stride)

    g_logprob = 0.0
    if grad_logprobs_ptr is not None:
        g_logprob = tl.load(grad_logprobs_ptr + row)
    g_entropy = 0.0
    if grad_entropy_ptr is not None:
        g_entropy = tl.load(grad_entropy_ptr + row)
    active = (g_logprob != 0.0) | (g_entropy != 0.0)
    label = tl.load(labels_ptr + row)
    lost = (g_logprob != 0.0) & ((label < 0) | (label >= vocab))
    c = tl.where(lost, float("nan"), g_logprob)
    top = tl.load(stats_ptr + row * 3)
    inverse_total = 1.0 / tl.load(stats_ptr + row * 3 + 1)
    a = g_entropy * tl.load(stats_ptr + row * 3 + 2) - c

    columns_read = tl.where(active, vocab, 0)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits_row + columns, mask=columns < columns_read, other=float("-inf")).to(tl.float32)
        dx = row_gradient(x, columns, label, top, inverse_total, inverse_temperature, a, -g_entropy, c)
        dx = tl.where(active, dx, 0.0).to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_logits_ptr + row * vocab + columns, dx, mask=columns < vocab)


def _assert_layout(logits: Tensor, labels: Tensor, temperature: Tensor) -> None:
    assert logits.stride(-1) == 1 or logits.shape[-1] == 1, (
        f"rows are not contiguous: strides {logits.stride()}"
    )
    assert labels.dtype == torch.int64, f"labels are {labels.dtype}"
    assert labels.is_contiguous(), f"labels have strides {labels.stride()}"
    assert temperature.dtype == torch.float32, f"temperature is {temperature.dtype}"
    assert temperature.is_contiguous(), f"temperature has strides {temperature.stride()}"
    assert temperature.shape in ((), labels.shape), f"temperature has shape {tuple(temperature.shape)}"


def logprob_forward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    *,
    inner_rows: int,
    outer_stride: int,
    inner_stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch one program a row; return float32 logprobs [...], entropy [...] and stats [N, 3] for the backward.

    logits [..., V] float32, bfloat16 or float16 with contiguous rows; labels int64 [...], contiguous; temperature
    float32, 0-d or [...], read on the device so that its value never recompiles; row r of N
    starts (r // inner_rows) * outer_stride + (r % inner_rows) * inner_stride elements after the first row.
    """
    _assert_layout(logits, labels, temperature)
    rows, vocab = labels.numel(), logits.shape[-1]
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs)
    stats = torch.empty((rows, STATS), dtype=torch.float32, device=logits.device)
    if rows == 0:
        return logprobs, entropy, stats
    with on_device_of(logits):
        logprob_forward_kernel[(rows,)](
            logits_ptr=logits,
            labels_ptr=labels,
            temperature_ptr=temperature,
            logprobs_ptr=logprobs,
            entropy_ptr=entropy,
            stats_ptr=stats,
            temperature_stride=min(1, temperature.dim()),
            vocab=vocab,
            inner_rows=inner_rows,
            outer_stride=outer_stride,
            inner_stride=inner_stride,
            **row_options(vocab),
        )
    return logprobs, entropy, stats


def logprob_backward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    inner_rows: int,
    outer_stride: int,
    inner_stride: int,
) -> Tensor:
    """Launch one program a row; return the gradient [..., V], contiguous, in the dtype of the logits.

    Arguments of the forward, its stats, and the upstream gradients: float32 [...], contiguous, None for zeros.
    """
    _assert_layout(logits, labels, temperature)
    for name, grad in (("grad_logprobs", grad_logprobs), ("grad_entropy", grad_entropy)):
        assert grad is None or grad.is_contiguous(), f"{name} is not contiguous"
    rows, vocab = labels.numel(), logits.shape[-1]
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return grad_logits
    with on_device_of(logits):
        logprob_backward_kernel[(rows,)](
            logits_ptr=logits,
            labels_ptr=labels,
            temperature_ptr=temperature,
            stats_ptr=stats,
            grad_logprobs_ptr=grad_logprobs,
            grad_entropy_ptr=grad_entropy,
            grad_logits_ptr=grad_logits,
            temperature_stride=min(1, temperature.dim()),
            vocab=vocab,
            inner_rows=inner_rows,
            outer_stride=outer_stride,
            inner_stride=inner_stride,
            **row_options(vocab),
        )
    return grad_logits
