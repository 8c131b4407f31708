"""Clipped policy and value losses over tokens: value, statistics and gradient, in two stages of fixed order.

Stage 1 is one program a sequence, which writes its sums as one column of a table [sums, B]; stage 2 is one program
that adds the columns. Tensors are [B, T], or packed [total] with `cu_seqlens` [B + 1].
"""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import TOKEN_OPTIONS, on_device_of
from ppo_fast.kernels.sequences import REDUCTIONS, SEQUENCE_SIZES, divisor, sequence_bounds
from ppo_fast.kernels.surrogate import expm1_less_x, held_log_ratio, surrogate
from torch import Tensor

POLICY_STATS = ("clip_fraction", "approx_kl", "ratio_mean", "ratio_max", "entropy", "kl")
POLICY_SUMS = 8  # the loss's terms, then what the statistics need, then the tokens that count


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def policy_sums_kernel(
    logprobs_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    entropy_ptr,
    kl_ptr,
    coefficients_ptr,
    cu_seqlens_ptr,
    kept_logprobs_ptr,
    sums_ptr,
    lengths_ptr,
    tokens,
    sequences,
    BLOCK: tl.constexpr,
):
    """One sequence's sums: loss terms, clipped, k3, ratio, largest ratio, entropy, KL; and its counted tokens."""
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, cu_seqlens_ptr)
    low = tl.load(coefficients_ptr)
    high = tl.load(coefficients_ptr + 1)
    dual_clip = tl.load(coefficients_ptr + 2)
    clamp = tl.load(coefficients_ptr + 3)

    zero = tl.full((), 0.0, tl.float32)
    terms, clips, k3s, ratios, highest, entropies, kls = zero, zero, zero, zero, zero, zero, zero
    length = tl.full((), 0, tl.int64)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at = first + columns
        counted = tl.load(mask_ptr + at, mask=columns < size, other=0) != 0
        logprob = tl.load(logprobs_ptr + at, mask=counted, other=0.0).to(tl.float32)
        old = tl.load(old_logprobs_ptr + at, mask=counted, other=0.0).to(tl.float32)
        advantage = tl.load(advantages_ptr + at, mask=counted, other=0.0).to(tl.float32)
        if kept_logprobs_ptr is not None:
            tl.store(kept_logprobs_ptr + at, logprob, mask=columns < size)

        term, _, is_clipped = surrogate(logprob - old, advantage, low, high, dual_clip, clamp)
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + at, mask=counted, other=0.0)
            term -= tl.load(coefficients_ptr + 4) * entropy
            entropies += tl.sum(entropy, axis=0)
        if kl_ptr is not None:
            kl = tl.load(kl_ptr + at, mask=counted, other=0.0)
            kl_coef = tl.load(coefficients_ptr + 5)
            term += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
            kls += tl.sum(kl, axis=0)
        log_ratio = held_log_ratio(logprob - old, clamp)
        ratio = tl.where(counted, tl.exp(log_ratio), 0.0)
        terms += tl.sum(tl.where(counted, term, 0.0), axis=0)
        clips += tl.sum((counted & is_clipped).to(tl.float32), axis=0)
        k3s += tl.sum(expm1_less_x(log_ratio), axis=0)
        ratios += tl.sum(ratio, axis=0)
        highest = tl.maximum(highest, tl.max(ratio, axis=0))
        length += tl.sum(counted.to(tl.int64), axis=0)

    tl.store(lengths_ptr + sequence, length)
    sums = sums_ptr + sequence
    tl.store(sums, terms)
    tl.store(sums + sequences, clips)
    tl.store(sums + 2 * sequences, k3s)
    tl.store(sums + 3 * sequences, ratios)
    tl.store(sums + 4 * sequences, highest)
    tl.store(sums + 5 * sequences, entropies)
    tl.store(sums + 6 * sequences, kls)


@triton.jit
def column_sum(column_ptr, rows, inside):
    """Sum of one tile of a table's row."""
    return tl.sum(tl.load(column_ptr + rows, mask=inside, other=0.0), axis=0)


@triton.jit
def policy_finish_kernel(
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
    """Add the sequences up; write the loss, the six statistics and the reduction's last denominator."""
    zero = tl.full((), 0.0, tl.float32)
    loss, clips, k3s, ratios, highest, entropies, kls = zero, zero, zero, zero, zero, zero, zero
    counted = tl.full((), 0, tl.int64)
    nonempty = tl.full((), 0, tl.int64)
    for start in range(0, sequences, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < sequences
        lengths = tl.load(lengths_ptr + rows, mask=inside, other=0)
        terms = tl.load(sums_ptr + rows, mask=inside, other=0.0)
        if REDUCTION == 3:
            terms = terms / tl.maximum(lengths, 1).to(tl.float32)
        loss += tl.sum(terms, axis=0)
        clips += column_sum(sums_ptr + sequences, rows, inside)
        k3s += column_sum(sums_ptr + 2 * sequences, rows, inside)
        ratios += column_sum(sums_ptr + 3 * sequences, rows, inside)
        most = tl.load(sums_ptr + 4 * sequences + rows, mask=inside, other=0.0)
        highest = tl.maximum(highest, tl.max(most, axis=0))
        entropies += column_sum(sums_ptr + 5 * sequences, rows, inside)
        kls += column_sum(sums_ptr + 6 * sequences, rows, inside)
        counted += tl.sum(lengths, axis=0)
        nonempty += tl.sum((lengths > 0).to(tl.int64), axis=0)

    denominator = divisor(counted, nonempty, normalizer_ptr, REDUCTION)
    tl.store(divisor_ptr, denominator)
    tl.store(loss_ptr, loss / denominator)
    tokens = tl.maximum(counted, 1).to(tl.float32)
    tl.store(stats_ptr, clips / tokens)
    tl.store(stats_ptr + 1, k3s / tokens)
    tl.store(stats_ptr + 2, ratios / tokens)
    # A maximum drops a NaN, a sum keeps it.
    tl.store(stats_ptr + 3, tl.where(ratios == ratios, highest, ratios))
    tl.store(stats_ptr + 4, entropies / tokens)
    tl.store(stats_ptr + 5, kls / tokens)


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def policy_backward_kernel(
    grad_loss_ptr,
    logprobs_ptr,
    old_logprobs_ptr,
    advantages_ptr,
    mask_ptr,
    coefficients_ptr,
    cu_seqlens_ptr,
    lengths_ptr,
    divisor_ptr,
    grad_logprobs_ptr,
    tokens,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write g slope / (divisor [length]) of one sequence, 0 in masked slots."""
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, cu_seqlens_ptr)
    low = tl.load(coefficients_ptr)
    high = tl.load(coefficients_ptr + 1)
    dual_clip = tl.load(coefficients_ptr + 2)
    clamp = tl.load(coefficients_ptr + 3)
    weight = tl.load(grad_loss_ptr) / tl.load(divisor_ptr)
    if REDUCTION == 3:
        weight = weight / tl.maximum(tl.load(lengths_ptr + sequence), 1).to(tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at = first + columns
        counted = tl.load(mask_ptr + at, mask=columns < size, other=0) != 0
        logprob = tl.load(logprobs_ptr + at, mask=counted, other=0.0).to(tl.float32)
        old = tl.load(old_logprobs_ptr + at, mask=counted, other=0.0).to(tl.float32)
        advantage = tl.load(advantages_ptr + at, mask=counted, other=0.0).to(tl.float32)
        _, slope, _ = surrogate(logprob - old, advantage, low, high, dual_clip, clamp)
        grad = tl.where(counted, weight * slope, 0.0)
        tl.store(grad_logprobs_ptr + at, grad.to(grad_logprobs_ptr.dtype.element_ty), mask=columns < size)


def _sequence_count(tokens_like: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens_like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _columns(tokens_like: Tensor, cu_seqlens: Tensor | None) -> int:
    return tokens_like.shape[1] if cu_seqlens is None else 0


def policy_forward(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reduction: str,
    entropy: Tensor | None = None,
    kl: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss [], stats [6], logprobs with 0 in masked slots, lengths [B] int64 and the divisor [].

    Token tensors are contiguous and of one shape; `entropy` and `kl`, float32, add their terms to the loss.
    """
    for name, x in (
        ("logprobs", logprobs),
        ("old_logprobs", old_logprobs),
        ("advantages", advantages),
        ("mask", mask),
    ):
        assert x.is_contiguous(), f"{name} has strides {x.stride()}"
    sequences, device = _sequence_count(logprobs, cu_seqlens), logprobs.device
    loss = torch.zeros((), dtype=torch.float32, device=device)
    stats = torch.zeros(len(POLICY_STATS), dtype=torch.float32, device=device)
    kept = torch.empty(logprobs.shape, dtype=torch.float32, device=device)
    lengths = torch.empty(sequences, dtype=torch.int64, device=device)
    denominator = torch.ones((), dtype=torch.float32, device=device)
    if logprobs.numel() == 0:
        return loss, stats, kept, lengths.zero_(), denominator
    sums = torch.empty((POLICY_SUMS - 1, sequences), dtype=torch.float32, device=device)
    with on_device_of(logprobs):
        policy_sums_kernel[(sequences,)](
            logprobs_ptr=logprobs,
            old_logprobs_ptr=old_logprobs,
            advantages_ptr=advantages,
            mask_ptr=mask,
            entropy_ptr=entropy,
            kl_ptr=kl,
            coefficients_ptr=coefficients,
            cu_seqlens_ptr=cu_seqlens,
            kept_logprobs_ptr=kept,
            sums_ptr=sums,
            lengths_ptr=lengths,
            tokens=_columns(logprobs, cu_seqlens),
            sequences=sequences,
            **TOKEN_OPTIONS,
        )
        policy_finish_kernel[(1,)](
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
    return loss, stats, kept, lengths, denominator


def policy_backward(
    grad_loss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    denominator: Tensor,
    *,
    reduction: str,
) -> Tensor:
    """Return the gradient of `logprobs`, in its dtype; `grad_loss` is a float32 0-d tensor."""
    grad_logprobs = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
    if logprobs.numel() == 0:
        return grad_logprobs
    with on_device_of(logprobs):
        policy_backward_kernel[(_sequence_count(logprobs, cu_seqlens),)](
            grad_loss_ptr=grad_loss,
            logprobs_ptr=logprobs,
            old_logprobs_ptr=old_logprobs,
            advantages_ptr=advantages,
            mask_ptr=mask,
            coefficients_ptr=coefficients,
            cu_seqlens_ptr=cu_seqlens,
            lengths_ptr=lengths,
            divisor_ptr=denominator,
            grad_logprobs_ptr=grad_logprobs,
            tokens=_columns(logprobs, cu_seqlens),
            REDUCTION=REDUCTIONS[reduction],
            **TOKEN_OPTIONS,
        )
    return grad_logprobs
