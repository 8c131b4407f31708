"""Clipped value loss over tokens: value, statistics and gradient, in two stages of fixed order, as in `tokens.py`."""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import TOKEN_OPTIONS, on_device_of
from ppo_fast.kernels.sequences import REDUCTIONS, SEQUENCE_SIZES, divisor, sequence_bounds
from torch import Tensor

VALUE_STATS = ("clip_fraction", "explained_variance", "value_mean", "return_mean")
VALUE_SUMS = 7  # terms, clipped, values; mean and M2 of the returns; mean and M2 of their errors


@triton.jit
def squared_errors(value, old, target, clip):
    """(plain, clipped, v_clip, whether v lies inside the clip); without a clip (inf) `old` is not looked at."""
    low = tl.where(clip == float("inf"), float("-inf"), old - clip)
    high = tl.where(clip == float("inf"), float("inf"), old + clip)
    held = tl.where(value < low, low, tl.where(value > high, high, value))
    held = tl.where(low == low, held, low)  # a clip about NaN is NaN
    return (
        (value - target) * (value - target),
        (held - target) * (held - target),
        held,
        (value >= low) & (value <= high),
    )


@triton.jit
def take_tile(count, mean, m2, x, counted):
    """Merge a tile's counted slots into (count, mean, sum of centred squares); Chan, Golub and LeVeque 1983."""
    n = tl.sum(counted.to(tl.float32), axis=0)
    tile_mean = tl.sum(tl.where(counted, x, 0.0), axis=0) / tl.maximum(n, 1.0)
    centred = tl.where(counted, x - tile_mean, 0.0)
    total = tl.maximum(count + n, 1.0)
    delta = tile_mean - mean
    m2 += tl.sum(centred * centred, axis=0) + delta * delta * (count * n / total)
    return count + n, mean + delta * (n / total), m2


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def value_sums_kernel(
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,
    clip_ptr,
    cu_seqlens_ptr,
    sums_ptr,
    lengths_ptr,
    tokens,
    sequences,
    BLOCK: tl.constexpr,
):
    """One sequence's sums and moments, and its counted tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, cu_seqlens_ptr)
    clip = tl.load(clip_ptr)
    zero = tl.full((), 0.0, tl.float32)
    terms, clips, total = zero, zero, zero
    count, return_mean, return_m2 = zero, zero, zero
    same_count, error_mean, error_m2 = zero, zero, zero
    length = tl.full((), 0, tl.int64)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at = first + columns
        counted = tl.load(mask_ptr + at, mask=columns < size, other=0) != 0
        value = tl.load(values_ptr + at, mask=counted, other=0.0).to(tl.float32)
        old = tl.load(old_values_ptr + at, mask=counted, other=0.0).to(tl.float32)
        target = tl.load(returns_ptr + at, mask=counted, other=0.0).to(tl.float32)
        plain, clipped, _, _ = squared_errors(value, old, target, clip)
        is_clipped = clipped > plain
        term = tl.where(is_clipped | (clipped != clipped), clipped, plain)
        terms += tl.sum(tl.where(counted, term, 0.0), axis=0)
        clips += tl.sum((counted & is_clipped).to(tl.float32), axis=0)
        total += tl.sum(value, axis=0)
        count, return_mean, return_m2 = take_tile(count, return_mean, return_m2, target, counted)
        same_count, error_mean, error_m2 = take_tile(
            same_count, error_mean, error_m2, target - value, counted
        )
        length += tl.sum(counted.to(tl.int64), axis=0)

    tl.store(lengths_ptr + sequence, length)
    sums = sums_ptr + sequence
    tl.store(sums, terms)
    tl.store(sums + sequences, clips)
    tl.store(sums + 2 * sequences, total)
    tl.store(sums + 3 * sequences, return_mean)
    tl.store(sums + 4 * sequences, return_m2)
    tl.store(sums + 5 * sequences, error_mean)
    tl.store(sums + 6 * sequences, error_m2)


@triton.jit
def value_finish_kernel(
    sums_ptr,
    lengths_ptr,
    normalizer_ptr,
    loss_ptr,
    stats_ptr,
    divisor_ptr,
    sequences,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the sequences up: loss, the four statistics and the reduction's last denominator."""
    zero = tl.full((), 0.0, tl.float32)
    loss, clips, total, returns, errors = zero, zero, zero, zero, zero
    counted = tl.full((), 0, tl.int64)
    nonempty = tl.full((), 0, tl.int64)
    for start in range(0, sequences, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < sequences
        lengths = tl.load(lengths_ptr + rows, mask=inside, other=0)
        n = lengths.to(tl.float32)
        terms = tl.load(sums_ptr + rows, mask=inside, other=0.0)
        if REDUCTION == 3:
            terms = terms / tl.maximum(n, 1.0)
        loss += tl.sum(terms, axis=0)
        clips += tl.sum(tl.load(sums_ptr + sequences + rows, mask=inside, other=0.0), axis=0)
        total += tl.sum(tl.load(sums_ptr + 2 * sequences + rows, mask=inside, other=0.0), axis=0)
        returns += tl.sum(n * tl.load(sums_ptr + 3 * sequences + rows, mask=inside, other=0.0), axis=0)
        errors += tl.sum(n * tl.load(sums_ptr + 5 * sequences + rows, mask=inside, other=0.0), axis=0)
        counted += tl.sum(lengths, axis=0)
        nonempty += tl.sum((lengths > 0).to(tl.int64), axis=0)

    tokens = tl.maximum(counted, 1).to(tl.float32)
    return_mean, error_mean = returns / tokens, errors / tokens
    return_m2, error_m2 = zero, zero
    for start in range(0, sequences, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < sequences
        n = tl.load(lengths_ptr + rows, mask=inside, other=0).to(tl.float32)
        away = tl.load(sums_ptr + 3 * sequences + rows, mask=inside, other=0.0) - return_mean
        return_m2 += tl.sum(
            tl.load(sums_ptr + 4 * sequences + rows, mask=inside, other=0.0) + n * away * away, axis=0
        )
        away = tl.load(sums_ptr + 5 * sequences + rows, mask=inside, other=0.0) - error_mean
        error_m2 += tl.sum(
            tl.load(sums_ptr + 6 * sequences + rows, mask=inside, other=0.0) + n * away * away, axis=0
        )

    denominator = divisor(counted, nonempty, normalizer_ptr, REDUCTION)
    tl.store(divisor_ptr, denominator)
    tl.store(loss_ptr, 0.5 * loss / denominator)
    tl.store(stats_ptr, clips / tokens)
    explained = 1.0 - error_m2 / tl.where(return_m2 > 0.0, return_m2, 1.0)
    tl.store(stats_ptr + 1, tl.where(return_m2 > 0.0, explained, 0.0))
    tl.store(stats_ptr + 2, total / tokens)
    tl.store(stats_ptr + 3, return_mean)


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def value_backward_kernel(
    grad_loss_ptr,
    values_ptr,
    old_values_ptr,
    returns_ptr,
    mask_ptr,
    clip_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
    divisor_ptr,
    grad_values_ptr,
    tokens,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write g (v - R) / divisor where the plain error is the larger; a tie of the two splits in halves."""
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, cu_seqlens_ptr)
    clip = tl.load(clip_ptr)
    weight = tl.load(grad_loss_ptr) / tl.load(divisor_ptr)
    if REDUCTION == 3:
        weight = weight / tl.maximum(tl.load(lengths_ptr + sequence), 1).to(tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at = first + columns
        counted = tl.load(mask_ptr + at, mask=columns < size, other=0) != 0
        value = tl.load(values_ptr + at, mask=counted, other=0.0).to(tl.float32)
        old = tl.load(old_values_ptr + at, mask=counted, other=0.0).to(tl.float32)
        target = tl.load(returns_ptr + at, mask=counted, other=0.0).to(tl.float32)
        plain, clipped, held, passes = squared_errors(value, old, target, clip)
        of_plain = tl.where(clipped > plain, 0.0, tl.where(plain == clipped, 0.5, 1.0))
        slope = of_plain * (value - target) + tl.where(passes, (1.0 - of_plain) * (held - target), 0.0)
        slope = tl.where(clipped == clipped, slope, clipped)
        grad = tl.where(counted, weight * slope, 0.0)
        tl.store(grad_values_ptr + at, grad.to(grad_values_ptr.dtype.element_ty), mask=columns < size)


def value_forward(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss [], stats [4], lengths [B] int64 and the divisor []; clip is float32 0-d, +inf for none."""
    for name, x in (("values", values), ("old_values", old_values), ("returns", returns), ("mask", mask)):
        assert x.is_contiguous(), f"{name} has strides {x.stride()}"
    sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    loss = torch.zeros((), dtype=torch.float32, device=values.device)
    stats = torch.zeros(len(VALUE_STATS), dtype=torch.float32, device=values.device)
    lengths = torch.zeros(sequences, dtype=torch.int64, device=values.device)
    denominator = torch.ones((), dtype=torch.float32, device=values.device)
    if values.numel() == 0:
        return loss, stats, lengths, denominator
    sums = torch.empty((VALUE_SUMS, sequences), dtype=torch.float32, device=values.device)
    with on_device_of(values):
        value_sums_kernel[(sequences,)](
            values_ptr=values,
            old_values_ptr=old_values,
            returns_ptr=returns,
            mask_ptr=mask,
            clip_ptr=clip,
            cu_seqlens_ptr=cu_seqlens,
            sums_ptr=sums,
            lengths_ptr=lengths,
            tokens=values.shape[1] if cu_seqlens is None else 0,
            sequences=sequences,
            **TOKEN_OPTIONS,
        )
        value_finish_kernel[(1,)](
            sums_ptr=sums,
            lengths_ptr=lengths,
            normalizer_ptr=normalizer,
            loss_ptr=loss,
            stats_ptr=stats,
            divisor_ptr=denominator,
            sequences=sequences,
            REDUCTION=REDUCTIONS[reduction],
            **TOKEN_OPTIONS,
        )
    return loss, stats, lengths, denominator


def value_backward(
    grad_loss: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    denominator: Tensor,
    *,
    reduction: str,
) -> Tensor:
    """Return the gradient of `values`, in their dtype; `grad_loss` is a float32 0-d tensor."""
    grad_values = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if values.numel() == 0:
        return grad_values
    with on_device_of(values):
        value_backward_kernel[(lengths.shape[0],)](
            grad_loss_ptr=grad_loss,
            values_ptr=values,
            old_values_ptr=old_values,
            returns_ptr=returns,
            mask_ptr=mask,
            clip_ptr=clip,
            cu_seqlens_ptr=cu_seqlens,
            lengths_ptr=lengths,
            divisor_ptr=denominator,
            grad_values_ptr=grad_values,
            tokens=values.shape[1] if cu_seqlens is None else 0,
            REDUCTION=REDUCTIONS[reduction],
            **TOKEN_OPTIONS,
        )
    return grad_values
