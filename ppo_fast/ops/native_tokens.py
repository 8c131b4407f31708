"""The token losses and the masked moments by native code: twins of the launchers of `kernels`, of the same names.

What a call has in numbers comes as float64 tensors, which native code reads where they lie. Results are float64 where
one of the token tensors is, else float32; `divisor` and what the moments keep for their gradient are always float64.
"""

from types import ModuleType

import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops.backends import CPU_DTYPES, large_empty
from ppo_fast.ops.fused_estimate import (
    COMPUTE,
    address,
    as_bytes,
    contiguous_rows,
    token_rows,
    widest,
)

REDUCTIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")  # of csrc/cpu/losses.h
POLICY_STATS = 6
VALUE_STATS = 4
MOMENTS = 3  # float64 numbers kept for each column: count, mean, sum of squares about it


def _native() -> tuple[ModuleType, dict[str, int | str]]:
    """The extension, and how it is to run."""
    return build.extension(), {"threads": torch.get_num_threads(), "isa": build.selected_isa()}


class _Batch:
    """Token tensors as native code takes them: alive, with contiguous rows, checked."""

    def __init__(
        self,
        mask: Tensor,
        now: Tensor | None,
        old: Tensor | None,
        target: Tensor | None,
        cu_seqlens: Tensor | None,
        reduction: str,
        *others: Tensor | None,
    ) -> None:
        self.rows = [
            None if x is None else contiguous_rows(x) for x in (as_bytes(mask), now, old, target, *others)
        ]
        self.starts = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
        self.sequences = mask.shape[0] if self.starts is None else len(self.starts) - 1
        self.dtype = widest(now, old, target, *others)
        self.addresses = [token_rows(x) for x in self.rows]
        self.native = build.extension().TokenBatch(
            sequences=self.sequences,
            tokens=mask.shape[-1],
            cu_seqlens=address(self.starts),
            compute=COMPUTE[self.dtype],
            reduction=REDUCTIONS.index(reduction),
            **dict(zip(("mask", "now", "old", "target"), self.addresses[:4], strict=True)),
        )


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

    Token tensors are [B, T], or packed [total] with `cu_seqlens` [B + 1], of any floating dtype, each its own;
    `entropy` and `kl` add their terms to the loss. `coefficients` [7] and `normalizer` [] are float64.
    """
    batch = _Batch(mask, logprobs, old_logprobs, advantages, cu_seqlens, reduction, entropy, kl)
    loss, stats, lengths, divisor = _outputs(batch, POLICY_STATS)
    kept = large_empty(logprobs.shape, batch.dtype)
    native, run = _native()
    native.clipped_policy_forward(
        batch.native,
        entropy=batch.addresses[4],
        kl=batch.addresses[5],
        coefficients=coefficients.data_ptr(),
        normalizer=address(normalizer),
        kept=kept.data_ptr(),
        loss=loss.data_ptr(),
        stats=stats.data_ptr(),
        lengths=lengths.data_ptr(),
        divisor=divisor.data_ptr(),
        **run,
    )
    return loss, stats, kept, lengths, divisor


def _outputs(batch: _Batch, stats: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for loss [], stats, lengths [B] and the divisor []."""
    return (
        torch.empty((), dtype=batch.dtype),
        torch.empty(stats, dtype=batch.dtype),
        torch.empty(batch.sequences, dtype=torch.int64),
        torch.empty((), dtype=torch.float64),
    )


def policy_backward(
    grad_loss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    *,
    reduction: str,
) -> Tensor:
    """Return the gradient of `logprobs`, in its dtype, from that of the loss, a 0-d tensor."""
    batch = _Batch(mask, logprobs, old_logprobs, advantages, cu_seqlens, reduction)
    grad = large_empty(logprobs.shape, logprobs.dtype)
    down = grad_loss.to(torch.float64)
    native, run = _native()
    native.clipped_policy_backward(
        batch.native,
        coefficients=coefficients.data_ptr(),
        grad_loss=down.data_ptr(),
        lengths=lengths.data_ptr(),
        divisor=divisor.data_ptr(),
        grad_now=grad.data_ptr(),
        **run,
    )
    return grad


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
    """Return loss [], stats [4], lengths [B] int64 and the divisor []; `clip` is float64 0-d, +inf for none."""
    batch = _Batch(mask, values, old_values, returns, cu_seqlens, reduction)
    loss, stats, lengths, divisor = _outputs(batch, VALUE_STATS)
    native, run = _native()
    native.clipped_value_forward(
        batch.native,
        clip=clip.data_ptr(),
        normalizer=address(normalizer),
        loss=loss.data_ptr(),
        stats=stats.data_ptr(),
        lengths=lengths.data_ptr(),
        divisor=divisor.data_ptr(),
        **run,
    )
    return loss, stats, lengths, divisor


def value_backward(
    grad_loss: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    *,
    reduction: str,
) -> Tensor:
    """Return the gradient of `values`, in their dtype, from that of the loss, a 0-d tensor."""
    batch = _Batch(mask, values, old_values, returns, cu_seqlens, reduction)
    grad = large_empty(values.shape, values.dtype)
    down = grad_loss.to(torch.float64)
    native, run = _native()
    native.clipped_value_backward(
        batch.native,
        clip=clip.data_ptr(),
        grad_loss=down.data_ptr(),
        lengths=lengths.data_ptr(),
        divisor=divisor.data_ptr(),
        grad_now=grad.data_ptr(),
        **run,
    )
    return grad


def token_weights(mask: Tensor, normalizer: Tensor | None, reduction: str) -> Tensor:
    """Return d loss / d term of every token, float64 [B, T] and contiguous, and -inf where the mask is 0."""
    batch = _Batch(mask, None, None, None, None, reduction)
    weights = torch.empty(mask.shape, dtype=torch.float64)
    native, run = _native()
    native.token_weights(batch.native, normalizer=address(normalizer), weights=weights.data_ptr(), **run)
    return weights


def _columns(x: Tensor, mask: Tensor, unbiased: bool) -> object:
    """`x` and `mask`, contiguous [outer, length, inner] and bool, as native code takes them."""
    outer, length, inner = x.shape
    return build.extension().MaskedColumns(
        x=x.data_ptr(),
        dtype=CPU_DTYPES[x.dtype],
        mask=mask.data_ptr(),
        outer=outer,
        length=length,
        inner=inner,
        unbiased=unbiased,
    )


def moments_forward(x: Tensor, mask: Tensor, *, unbiased: bool, order: int) -> tuple[Tensor, Tensor]:
    """Return mean (order 1) or variance (order 2) [columns], and count, mean and squares, float64 [columns, 3].

    x is [outer, length, inner], contiguous; mask likewise, bool.
    """
    columns = x.shape[0] * x.shape[2]
    result = torch.empty(columns, dtype=widest(x))
    whole = torch.empty((columns, MOMENTS), dtype=torch.float64)
    native, run = _native()
    native.masked_moment(
        _columns(x, mask, unbiased), order=order, result=result.data_ptr(), whole=whole.data_ptr(), **run
    )
    return result, whole


def moment_backward(
    grad: Tensor, x: Tensor, mask: Tensor, whole: Tensor, *, unbiased: bool, order: int
) -> Tensor:
    """Return the gradient of x, contiguous, in its dtype, from `grad` [columns] in the dtype of the result."""
    grad_x = large_empty(x.shape, x.dtype)
    native, run = _native()
    native.masked_moment_backward(
        _columns(x, mask, unbiased),
        order=order,
        whole=whole.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=grad_x.data_ptr(),
        **run,
    )
    return grad_x


def normalize_forward(x: Tensor, mask: Tensor, *, unbiased: bool, keep_mean: bool) -> tuple[Tensor, Tensor]:
    """Return x normalised over all that counts, and its moments [1, 3]; x and mask are [1, size, 1]."""
    out = large_empty(x.shape, widest(x))
    whole = torch.empty((1, MOMENTS), dtype=torch.float64)
    native, run = _native()
    native.masked_normalize(
        _columns(x, mask, unbiased),
        keep_mean=keep_mean,
        out=out.data_ptr(),
        whole=whole.data_ptr(),
        **run,
    )
    return out, whole


def normalize_backward(
    grad: Tensor, x: Tensor, mask: Tensor, whole: Tensor, *, unbiased: bool, keep_mean: bool
) -> Tensor:
    """Return the gradient of x, contiguous, in its dtype, from `grad` [1, size, 1] in the dtype of the result."""
    grad_x = large_empty(x.shape, x.dtype)
    native, run = _native()
    native.masked_normalize_backward(
        _columns(x, mask, unbiased),
        keep_mean=keep_mean,
        whole=whole.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=grad_x.data_ptr(),
        **run,
    )
    return grad_x
