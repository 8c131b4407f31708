"""What turns per-token terms into one number: where each sequence lies, how many tokens count, what divides them.

Sums over a batch are made in two stages, one program a sequence and then one program over the sequences, each in a
fixed order: no atomics, so the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import TOKEN_OPTIONS, on_device_of
from torch import Tensor

# As with rows (`ROW_STRIDES`): else a sequence padded to a multiple of 16 would be summed in an order of its own.
SEQUENCE_SIZES = (
    "tokens",
    "logprobs_stride",
    "ref_logprobs_stride",
    "token_rewards_stride",
    "values_stride",
    "mask_stride",
)
REDUCTIONS = {"token-mean": 0, "token-sum": 1, "seq-mean-token-sum": 2, "seq-mean-token-mean": 3}


@triton.jit
def sequence_bounds(sequence, tokens, cu_seqlens_ptr):
    """First token and number of tokens of `sequence` (int64): column 0 of T, or as `cu_seqlens` says."""
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        return first, tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64) - first
    else:
        return sequence * tokens, tokens.to(tl.int64)


@triton.jit
def divisor(counted, nonempty, normalizer_ptr, REDUCTION: tl.constexpr):
    """The last denominator of the reduction, or the caller's in its place; at least 1 where it is a count."""
    if normalizer_ptr is not None:
        return tl.load(normalizer_ptr).to(tl.float32)
    elif REDUCTION == 0:
        return tl.maximum(counted, 1).to(tl.float32)
    elif REDUCTION == 1:
        return tl.full((), 1.0, tl.float32)
    else:
        return tl.maximum(nonempty, 1).to(tl.float32)


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def sequence_lengths_kernel(mask_ptr, cu_seqlens_ptr, lengths_ptr, tokens, BLOCK: tl.constexpr):
    """Write how many tokens of each sequence count."""
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, cu_seqlens_ptr)
    length = tl.full((), 0, tl.int64)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        counted = tl.load(mask_ptr + first + columns, mask=columns < size, other=0) != 0
        length += tl.sum(counted.to(tl.int64), axis=0)
    tl.store(lengths_ptr + sequence, length)


@triton.jit
def divisor_kernel(
    lengths_ptr, normalizer_ptr, divisor_ptr, sequences, REDUCTION: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the reduction's last denominator, from the lengths alone."""
    counted = tl.full((), 0, tl.int64)
    nonempty = tl.full((), 0, tl.int64)
    for start in range(0, sequences, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        lengths = tl.load(lengths_ptr + rows, mask=rows < sequences, other=0)
        counted += tl.sum(lengths, axis=0)
        nonempty += tl.sum((lengths > 0).to(tl.int64), axis=0)
    tl.store(divisor_ptr, divisor(counted, nonempty, normalizer_ptr, REDUCTION))


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def token_weights_kernel(
    mask_ptr, lengths_ptr, divisor_ptr, weights_ptr, tokens, REDUCTION: tl.constexpr, BLOCK: tl.constexpr
):
    """Write d loss / d term of each token, and -inf where the mask is 0."""
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, None)
    weight = 1.0 / tl.load(divisor_ptr)
    if REDUCTION == 3:
        weight = weight / tl.maximum(tl.load(lengths_ptr + sequence), 1).to(tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        counted = tl.load(mask_ptr + first + columns, mask=columns < size, other=0) != 0
        tl.store(weights_ptr + first + columns, tl.where(counted, weight, float("-inf")), mask=columns < size)


def token_weights(mask: Tensor, normalizer: Tensor | None, reduction: str) -> Tensor:
    """Return d loss / d term of every token, float32 [B, T], and -inf where the mask is 0; three small launches."""
    assert mask.is_contiguous(), f"mask has strides {mask.stride()}"
    sequences, tokens = mask.shape
    weights = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    if mask.numel() == 0:
        return weights
    lengths = torch.empty(sequences, dtype=torch.int64, device=mask.device)
    denominator = torch.empty((), dtype=torch.float32, device=mask.device)
    with on_device_of(mask):
        sequence_lengths_kernel[(sequences,)](
            mask_ptr=mask,
            cu_seqlens_ptr=None,
            lengths_ptr=lengths,
            tokens=tokens,
            **TOKEN_OPTIONS,
        )
        divisor_kernel[(1,)](
            lengths_ptr=lengths,
            normalizer_ptr=normalizer,
            divisor_ptr=denominator,
            sequences=sequences,
            REDUCTION=REDUCTIONS[reduction],
            **TOKEN_OPTIONS,
        )
        token_weights_kernel[(sequences,)](
            mask_ptr=mask,
            lengths_ptr=lengths,
            divisor_ptr=denominator,
            weights_ptr=weights,
            tokens=tokens,
            REDUCTION=REDUCTIONS[reduction],
            **TOKEN_OPTIONS,
        )
    return weights
