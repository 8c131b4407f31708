"""TRL 1.16: per-token log-probabilities from the hidden state, behind `add_fused_lm_head`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.contract import for_each_row, strict
from ppo_fast.integrations.originals import WIDE
from ppo_fast.integrations.trl.row_chunks import Head, row_chunks
from ppo_fast.ops.sharded_head import is_partitioned

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TILE_ROWS = 1024
_TILE_COLUMNS = 8192


class LMHeadOutputs(NamedTuple):
    """What TRL unpacks by position: [N] each, or None where it was not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
) -> LMHeadOutputs:
    """Replaces `ChunkedLogProbFunction.apply` of `trl.kernels` (`trl.trainer.utils._ChunkedLogProbFunction`).

    z = (hidden @ weight.T + bias) logit_scale; with a softcap s, z = s tanh(z / s); then z / temperature.

    Args:
        hidden: [N, D]; its dtype, or that of autocast, is the one the product is taken in. In half precision the
            logits are rounded to it, as TRL's are; `patch(..., strict=False)` leaves them as they are.
        weight: [V, D].
        bias: [V], or None.
        targets: [N], int.
        temperature: above 0, a number or a tensor that holds one.
        chunk_size: columns of the vocabulary at a time, at most; the fused op chooses its own.
        final_logit_softcapping: s, or None.
        logit_scale: factor of the logits before the softcap.
        outputs: which of OPTIONAL_OUTPUTS are wanted.

    Returns:
        logprobs and entropy, differentiable, then log sum_j p_j^2, the mean of z over the vocabulary, and whether
        the target is the first of the largest z: [N] each, float32 and bool, None where not wanted.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    head = Head(logit_scale, final_logit_softcapping, temperature, "entropy" in outputs)
    labels = targets.long()
    with torch.autocast(device, enabled=False):
        rounds = strict() and dtype not in WIDE
        function = row_chunks if rounds or is_partitioned(weight) else _whole
        logprobs, entropy = function(head, hidden, weight, bias, labels, dtype)
        if strict() and entropy is not None and bias is not None and final_logit_softcapping is None:
            # TRL has 0 * inf in the entropy where the bias forbids a token.
            entropy = entropy * torch.where((bias.detach() == -torch.inf).any(), torch.nan, 1.0)
        rest = _statistics(
            head,
            hidden.detach().to(dtype),
            weight.detach().to(dtype),
            None if bias is None else bias.detach().to(dtype),
            labels,
            min(chunk_size, _TILE_COLUMNS),
            outputs,
        )
    return LMHeadOutputs(logprobs, entropy, *rest)


class ChunkedLogProbFunction:
    """Stands for `trl.trainer.utils._ChunkedLogProbFunction`, of which TRL calls `apply`."""

    apply = staticmethod(chunked_logprobs)


def _whole(
    head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """By the fused op, which takes the logits as the product gives them.

    It has no factor: s tanh(k x / s) / T is (s / k) tanh(x / (s / k)) / (T / k) for k above 0. The sign of k, or its
    zero, goes into the logits.
    """
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    scale = head.scale
    if scale <= 0:
        factor = -1.0 if scale < 0 else 0.0
        hidden, bias = hidden * factor, None if bias is None else bias * factor
        scale = -scale if scale < 0 else 1.0
    results = ppo_fast.linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=for_each_row(head.temperature / scale, labels.shape),
        softcap=None if head.softcap is None else head.softcap / scale,
        return_entropy=head.with_entropy,
    )
    logprobs, entropy = results if isinstance(results, tuple) else (results, None)
    return logprobs.float(), None if entropy is None else entropy.float()


def _tiles(
    head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: int
) -> Iterator[tuple[int, Tensor]]:
    """(first column, z / temperature [n, columns] float32) over the vocabulary."""
    for start in range(0, len(weight), columns):
        part = slice(start, start + columns)
        logits = head.project(hidden, weight[part], None if bias is None else bias[part])
        yield start, (head.transform(logits) / head.temperature).float()


@torch.no_grad()
def _statistics(
    head: Head,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    columns: int,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What TRL logs beside the log-probabilities, in one more pass over the head if it asks for any of it."""
    names = OPTIONAL_OUTPUTS[1:]
    if not any(name in outputs for name in names):
        return None, None, None
    chunks = zip(hidden.split(_TILE_ROWS), labels.split(_TILE_ROWS), strict=True)
    parts = [
        _row_statistics(_tiles(head, rows, weight, bias, columns), picks, len(weight))
        for rows, picks in chunks
    ]
    joined = map(torch.cat, zip(*parts, strict=True))
    sums, means, tops = (x if name in outputs else None for name, x in zip(names, joined, strict=True))
    return sums, means, tops


def _row_statistics(
    tiles: Iterator[tuple[int, Tensor]], labels: Tensor, vocab: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log sum p^2 = log sum exp(2 d) - 2 log sum exp(d), d = z - max z; the mean of z; is the target on top."""
    rows = torch.arange(len(labels), device=labels.device)
    lowest = torch.full(labels.shape, -torch.inf, device=labels.device)
    zeros = torch.zeros_like(lowest)
    top, top_before, once, twice, total, target = lowest, lowest, zeros, zeros, zeros, zeros
    for start, z in tiles:
        width = z.shape[1]
        new_top = torch.maximum(top, z.amax(-1))
        shrink, terms = (top - new_top).exp(), (z - new_top.unsqueeze(-1)).exp()
        once = once * shrink + terms.sum(-1)
        twice = twice * shrink**2 + terms.square().sum(-1)
        total, top = total + z.sum(-1), new_top
        local = labels - start
        inside = (local >= 0) & (local < width)
        target = torch.where(inside, z[rows, local.clamp(0, width - 1)], target)
        before = torch.arange(width, device=z.device) < local.unsqueeze(-1)
        top_before = torch.maximum(top_before, z.masked_fill(~before, -torch.inf).amax(-1))
    is_top1 = (target >= top) & (target > top_before)
    return twice.log() - 2 * once.log(), total / vocab, is_top1
