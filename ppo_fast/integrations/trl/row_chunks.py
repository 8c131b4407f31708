"""The head of a language model a few rows at a time, with logits in the dtype of the product, as TRL rounds them.

For half precision, where `linear_logprobs` takes the logits as its own products give them, and for weights that
DeepSpeed's ZeRO-3 takes away between forward and backward: here the backward computes the logits anew, and gathers the
weights.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.contract import for_each_row
from ppo_fast.integrations.originals import WIDE
from ppo_fast.ops.sharded_head import is_partitioned

_TILE_BYTES = 2**28


@dataclass(frozen=True)
class Head:
    """How hidden states become logits, and what is wanted of these."""

    scale: float
    softcap: float | None
    temperature: float
    with_entropy: bool

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Logits in the dtype of the product; the bias is added after rounding."""
        logits = hidden @ weight.T
        return logits if bias is None else logits + bias

    def transform(self, logits: Tensor) -> Tensor:
        """Factor and cap, in float32 or wider."""
        z = (logits if logits.dtype == torch.float64 else logits.float()) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def score(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropy; a factor above 0 goes into the temperature, and the op reads the logits."""
        if self.softcap is None and self.scale > 0:
            z, temperature = logits, self.temperature / self.scale
        else:
            z, temperature = self.transform(logits), self.temperature
        return ppo_fast.logprobs_and_entropy_from_logits(
            z, labels, temperature=for_each_row(temperature, labels.shape)
        )


def _gathered(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """Sharded parameters whole for a while, by TRL's own rule."""
    if not any(is_partitioned(parameter) for parameter in parameters):
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


def row_chunks(
    head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropy [N], float32; the latter None where it is not wanted."""
    logprobs, entropy = _RowChunks.apply(hidden, weight, bias, labels, head, dtype)
    return logprobs, entropy if head.with_entropy else None


def _rows_at_a_time(vocab: int, dtype: torch.dtype) -> int:
    return max(1, _TILE_BYTES // (vocab * dtype.itemsize))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, not rounded on the way."""
    if a.device.type == "cuda" and a.dtype not in WIDE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if a.dtype != torch.float64 else a @ b


class _RowChunks(torch.autograd.Function):
    """Nothing of size V lives longer than its chunk of rows; gradients of the weight are summed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: Head,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.head, ctx.dtype = head, dtype
        narrow, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        size = _rows_at_a_time(len(weight), dtype)
        parts = [
            head.score(head.project(rows.to(dtype), narrow, cast_bias), picks)
            for rows, picks in zip(hidden.split(size), labels.split(size), strict=True)
        ]
        logprobs, entropy = (torch.cat(x).float() for x in zip(*parts, strict=True))
        return logprobs, entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        head, dtype, needs = ctx.head, ctx.dtype, ctx.needs_input_grad[:3]
        wanted = [grad is not None for grad in (grad_logprobs, grad_entropy)]
        with _gathered(weight, bias):
            narrow, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            grads: list[Tensor | None] = [
                torch.empty_like(hidden) if needs[0] else None,
                torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None,
                torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None,
            ]
            size = _rows_at_a_time(len(weight), dtype)
            for start in range(0, len(hidden), size):
                rows = slice(start, start + size)
                part = hidden[rows].to(dtype)
                upstream = [x[rows] for x in (grad_logprobs, grad_entropy) if x is not None]
                with torch.enable_grad():
                    logits = head.project(part, narrow, cast_bias).requires_grad_()
                    scores = head.score(logits, labels[rows])
                results = [x for x, used in zip(scores, wanted, strict=True) if used]
                (d_logits,) = torch.autograd.grad(
                    results, logits, [g.to(x.dtype) for g, x in zip(upstream, results, strict=True)]
                )
                if grads[0] is not None:
                    grads[0][rows] = _product(d_logits, narrow)
                if grads[1] is not None:
                    grads[1] += _product(d_logits.T, part)
                if grads[2] is not None:
                    grads[2] += d_logits.sum(0, dtype=torch.float32)
        inputs = (hidden, weight, bias)
        cast = (None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
        return *cast, None, None, None
