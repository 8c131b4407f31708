"""TRL 1.16: per-token log-probabilities from the hidden state, behind `add_fused_lm_head`."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import ppo_fast

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
        hidden: [N, D]; its dtype, or that of autocast, is the one the product is taken in.
        weight: [V, D].
        bias: [V], or None.
        targets: [N], int.
        temperature: above 0.
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
    with torch.autocast(device, enabled=False):
        hidden, weight = hidden.to(dtype), _in_dtype(weight, dtype)
        head = _Head(weight, None if bias is None else bias.to(dtype), logit_scale, final_logit_softcapping)
        labels = targets.long()
        logprobs, entropy = head.logprobs(hidden, labels, temperature, "entropy" in outputs)
        rest = _statistics(
            head, hidden.detach(), labels, temperature, min(chunk_size, _TILE_COLUMNS), outputs
        )
    return LMHeadOutputs(logprobs, entropy, *rest)


class ChunkedLogProbFunction:
    """Stands for `trl.trainer.utils._ChunkedLogProbFunction`, of which TRL calls `apply`."""

    apply = staticmethod(chunked_logprobs)


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)


class _Head:
    """A language model's head: weight [V, D], bias [V] or None, a factor, a cap."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> None:
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap

    def logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The op has no factor: s tanh(k x / s) / T is (s / k) tanh(x / (s / k)) / (T / k) for k above 0."""
        bias, scale = self.bias, self.scale
        if scale <= 0:  # its sign, or its zero, goes into the logits
            factor = -1.0 if scale < 0 else 0.0
            hidden, bias = hidden * factor, None if bias is None else bias * factor
            scale = -scale if scale < 0 else 1.0
        results = ppo_fast.linear_logprobs(
            hidden,
            self.weight,
            labels,
            bias=bias,
            temperature=temperature / scale,
            softcap=None if self.softcap is None else self.softcap / scale,
            return_entropy=with_entropy,
        )
        logprobs, entropy = results if isinstance(results, tuple) else (results, None)
        if entropy is not None and bias is not None and self.softcap is None:
            # TRL has 0 * inf in the entropy where the bias forbids a token.
            entropy = entropy * torch.where((bias.detach() == -torch.inf).any(), torch.nan, 1.0)
        return logprobs.float(), None if entropy is None else entropy.float()

    def tiles(self, hidden: Tensor, temperature: float, columns: int) -> Iterator[tuple[int, Tensor]]:
        """(first column, z [n, columns] float32) over the vocabulary, the product rounded to its own dtype."""
        for start in range(0, len(self.weight), columns):
            logits = hidden @ self.weight.detach()[start : start + columns].T
            if self.bias is not None:
                logits = logits + self.bias.detach()[start : start + columns]
            z = logits.float() * self.scale
            if self.softcap is not None:
                z = self.softcap * torch.tanh(z / self.softcap)
            yield start, z / temperature


@torch.no_grad()
def _statistics(
    head: _Head, hidden: Tensor, labels: Tensor, temperature: float, columns: int, outputs: tuple[str, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What TRL logs beside the log-probabilities, in one more pass over the head if it asks for any of it."""
    wanted = [name for name in OPTIONAL_OUTPUTS[1:] if name in outputs]
    if not wanted:
        return None, None, None
    chunks = zip(hidden.split(_TILE_ROWS), labels.split(_TILE_ROWS), strict=True)
    parts = [_row_statistics(head, rows, picks, temperature, columns) for rows, picks in chunks]
    joined = dict(zip(OPTIONAL_OUTPUTS[1:], map(torch.cat, zip(*parts, strict=True)), strict=True))
    return (
        joined["log_sum_sq_probs"] if "log_sum_sq_probs" in wanted else None,
        joined["mean_logits"] if "mean_logits" in wanted else None,
        joined["is_top1"] if "is_top1" in wanted else None,
    )


def _row_statistics(
    head: _Head, hidden: Tensor, labels: Tensor, temperature: float, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log sum p^2 = log sum exp(2 d) - 2 log sum exp(d), d = z - max z; the mean of z; is the target on top."""
    rows = torch.arange(len(hidden), device=hidden.device)
    lowest = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    zeros = torch.zeros_like(lowest)
    top, top_before, once, twice, total, target = lowest, lowest, zeros, zeros, zeros, zeros
    for start, z in head.tiles(hidden, temperature, columns):
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
    return twice.log() - 2 * once.log(), total / len(head.weight), is_top1
