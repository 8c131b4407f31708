"""Log-probability and entropy from hidden states, for any gradients that come down: four products a chunk.

The forward keeps three numbers of a row. The backward makes the logits of a chunk anew, puts their gradient in their
place, and takes that to hidden states and head; rows that get no gradient are left out of all three products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_fast.ops.fused_estimate import coefficient_dtype, scalar, widest
from ppo_fast.ops.fused_logprob import logprob_entropy
from ppo_fast.ops.fused_policy_rows import gradient_of_rows
from ppo_fast.ops.linear_chunks import (
    Chunks,
    Head,
    HeadGradients,
    logits_buffer,
    row_state,
    rows_of_a_chunk,
    size_of,
)
from ppo_fast.ops.sharded_head import gathered, keep_until_accumulated
from ppo_fast.ops.vocab_parallel import NOWHERE, Slice, agreed_chunk_rows

STATS = 3  # numbers of a row: max x, sum e^d, E_p[d]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    return_entropy: bool,
    chunk_rows: int | None,
    compact: bool | None,
    shard: Slice | None,
    impl: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run `ppo_fast.linear_logprobs` on `impl`; `shard` says which slice of the vocabulary the head is."""
    tensors = (hidden, weight, bias, labels, scalar(temperature, hidden.device, impl))
    compact = hidden.device.type == "cpu" if compact is None else compact
    options = (softcap or 0.0, chunk_rows or 0, compact, impl)
    if shard is None:
        logprobs, entropy, _ = linear_rows(*tensors, *options)
    else:
        logprobs, entropy = _Sharded.apply(*tensors, options, shard)
    return (logprobs, entropy) if return_entropy else logprobs


def _start(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float,
    chunk_rows: int,
    chosen: Tensor | None,
) -> tuple[Head, Chunks, Tensor]:
    """The head in the dtype of the products, the chunks of the chosen rows, and the buffer of their logits."""
    dtype, vocab = torch.promote_types(hidden.dtype, weight.dtype), len(weight)
    rows = hidden.reshape(-1, hidden.shape[-1])
    count = len(rows) if chosen is None else len(chosen)
    size = rows_of_a_chunk(count, size_of(weight), vocab * dtype.itemsize, hidden.device, chunk_rows)
    head = Head(weight, bias, softcap).in_dtype(dtype)
    return (
        head,
        Chunks(rows, dtype, size, chosen),
        logits_buffer(min(count, 1) * size, vocab, dtype, hidden.device),
    )


@torch.library.custom_op("ppo_fast::linear_rows", mutates_args=())
def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [...], entropy [...], stats [N, 3], which the backward needs)."""
    head, chunks, logits = _start(hidden, weight, bias, softcap, chunk_rows, None)
    logprobs, entropy, stats = (
        torch.empty(shape, dtype=dtype, device=hidden.device)
        for shape, dtype in _outputs(hidden, weight, impl)
    )
    flat, taus = labels.flatten(), temperature.flatten()
    for chunk in chunks:
        head.logits(chunk.x, logits)
        rows = chunk.rows
        tau = taus[rows] if temperature.dim() else temperature
        got = logprob_entropy(logits[: chunk.count], flat[rows], tau, impl)
        for whole, part in zip((logprobs, entropy, stats), got, strict=True):
            whole[rows] = part
    return logprobs.view(labels.shape), entropy.view(labels.shape), stats


def _outputs(hidden: Tensor, weight: Tensor, impl: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    count, wide = hidden.shape[:-1].numel(), widest(hidden, weight)
    return [((count,), wide), ((count,), wide), ((count, STATS), coefficient_dtype(impl))]


@linear_rows.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = hidden.new_empty(labels.shape, dtype=widest(hidden, weight))
    stats = hidden.new_empty((labels.numel(), STATS), dtype=coefficient_dtype(impl))
    return logprobs, torch.empty_like(logprobs), stats


def _gradients(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    stats: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
    *,
    shard: Slice | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    downs = [
        torch.zeros(len(stats), dtype=stats.dtype, device=stats.device)
        if g is None
        else g.flatten().to(stats.dtype)
        for g in (grad_logprobs, grad_entropy)
    ]
    flat, taus = labels.flatten(), temperature.flatten()
    outside = (flat < 0) | (flat >= len(weight))
    if shard is not None:
        flat = shard.local(flat)
        outside = flat == NOWHERE
    if impl != "cpu":  # where a label outside of the vocabulary has not been refused, it makes its row NaN
        downs[0] = downs[0].masked_fill(outside & (downs[0] != 0), torch.nan)
    chosen = ((downs[0] != 0) | (downs[1] != 0)).nonzero().squeeze(1) if compact else None
    head, chunks, logits = _start(hidden, weight, bias, softcap, chunk_rows, chosen)
    gradients = HeadGradients(chunks.hidden, head, *learns, shared=shard is not None)
    one = torch.ones((), dtype=stats.dtype, device=stats.device)
    for chunk in chunks:
        head.logits(chunk.x, logits)
        where = chunk.rows if chosen is None else chosen[chunk.rows]
        own, targets = logits[: chunk.count], flat[where]
        tau = taus[where] if temperature.dim() else temperature
        state = row_state(stats[where], impl, *(g[where] for g in downs))
        grad = gradient_of_rows(one, own, targets, tau, None, state, impl, inplace=not softcap)
        if softcap:
            head.uncap(grad, own)
        gradients.add(grad, chunk.x[: chunk.count], where)
    if shard is not None and gradients.hidden is not None:
        shard.summed(gradients.hidden)
    of_hidden, of_weight, of_bias = gradients.results(weight, bias, chunks.hidden)
    shaped = of_hidden.to(hidden.dtype).view(hidden.shape) if learns[0] else of_hidden
    return shaped, of_weight.to(weight.dtype), of_bias if bias is None else of_bias.to(bias.dtype)


@torch.library.custom_op("ppo_fast::linear_rows_backward", mutates_args=())
def linear_rows_backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    stats: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias, in their dtypes; empty where not wanted."""
    with gathered(weight, bias):
        return _gradients(
            grad_logprobs, grad_entropy, hidden, weight, bias, labels, temperature, stats,
            softcap, chunk_rows, compact, learns, impl,
        )  # fmt: skip


@linear_rows_backward.register_fake
def _(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: Tensor,
    stats: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, learns)


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, learns: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward returns, without its values."""
    of_hidden, of_weight, of_bias = (
        weight.new_empty(0) if x is None or not wanted else x.new_empty(x.shape)
        for x, wanted in zip((hidden, weight, bias), learns, strict=True)
    )
    return of_hidden, of_weight, of_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softcap, ctx.chunk_rows, ctx.compact, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 9
    keep_until_accumulated(*ctx.saved_tensors[1:3])
    learns = list(ctx.needs_input_grad[:3])
    grads = linear_rows_backward(
        grad_logprobs,
        grad_entropy,
        *ctx.saved_tensors,
        ctx.softcap,
        ctx.chunk_rows,
        ctx.compact,
        learns,
        ctx.impl,
    )
    return *(grad if wanted else None for grad, wanted in zip(grads, learns, strict=True)), *(None,) * 6


linear_rows.register_autograd(_backward, setup_context=_save)


class _Sharded(torch.autograd.Function):
    """The same of a slice of the vocabulary: one gather in the forward, one sum of a gradient in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: Tensor,
        options: tuple[float, int, bool, str],
        shard: Slice,
    ) -> tuple[Tensor, Tensor]:
        softcap, chunk_rows, _, impl = options
        size = chunk_rows or agreed_chunk_rows(labels.numel(), hidden.device)
        head, chunks, logits = _start(hidden, weight, bias, softcap, size, None)
        local, taus = shard.local(labels.flatten()), temperature.flatten()
        partial = hidden.new_empty((labels.numel(), STATS + 1), dtype=coefficient_dtype(impl))
        for chunk in chunks:
            head.logits(chunk.x, logits)
            tau = taus[chunk.rows] if temperature.dim() else temperature
            own = logits[: chunk.count]
            partial[chunk.rows] = shard.partial(own, None, local[chunk.rows], tau, impl)
        tau = taus if temperature.dim() else temperature
        stats = shard.merged(partial, local, tau)
        ctx.save_for_backward(hidden, weight, bias, labels, temperature, stats.own)
        ctx.options, ctx.shard = options, shard
        ctx.set_materialize_grads(False)
        wide = widest(hidden, weight)
        logprobs, entropy = (x.to(wide).view(labels.shape) for x in (stats.logprobs(tau), stats.entropy()))
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        learns = list(ctx.needs_input_grad[:3])
        softcap, chunk_rows, compact, impl = ctx.options
        hidden, weight, bias, labels, temperature, stats = ctx.saved_tensors
        grads = _gradients(
            grad_logprobs, grad_entropy, hidden, weight, bias, labels, temperature, stats,
            softcap, chunk_rows, compact, learns, impl, shard=ctx.shard,
        )  # fmt: skip
        return *(grad if wanted else None for grad, wanted in zip(grads, learns, strict=True)), *(None,) * 4
