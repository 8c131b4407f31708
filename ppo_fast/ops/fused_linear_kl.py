"""Exact KL of two heads from the hidden states of both: a chunk of either's logits at a time, and no more.

The forward keeps five numbers of a row; the backward makes both chunks anew and puts the gradient over the policy's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_fast.ops.fused_estimate import coefficient_dtype, scalar, widest
from ppo_fast.ops.fused_kl import STATE, kl_rows
from ppo_fast.ops.fused_linear_logprobs import fake_gradients
from ppo_fast.ops.fused_policy_rows import gradient_of_rows
from ppo_fast.ops.linear_chunks import (
    Chunks,
    Head,
    HeadGradients,
    common_dtype,
    logits_buffer,
    row_state,
    rows_of_a_chunk,
    size_of,
)
from ppo_fast.ops.sharded_head import gathered, keep_until_accumulated
from ppo_fast.ops.vocab_parallel import ELSEWHERE, Slice, agreed_chunk_rows


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    softcap: float | None,
    temperature: float | Tensor,
    chunk_rows: int | None,
    compact: bool | None,
    shard: Slice | None,
    impl: str,
) -> Tensor:
    """Run `ppo_fast.linear_kl` on `impl`; `shard` says which slice of the vocabulary the heads are."""
    tensors = (
        hidden,
        weight,
        bias,
        *(None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)),
        scalar(temperature, hidden.device, impl),
    )
    compact = hidden.device.type == "cpu" if compact is None else compact
    options = (softcap or 0.0, chunk_rows or 0, compact, impl)
    return (
        linear_kl_rows(*tensors, *options)[0] if shard is None else _Sharded.apply(*tensors, options, shard)
    )


class _Pair:
    """Chunks of the chosen rows of both models, and the buffers of their logits."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        ref_hidden: Tensor,
        ref_head: Head,
        chunk_rows: int,
        chosen: Tensor | None,
    ) -> None:
        dtypes = common_dtype(hidden, head, ref_hidden, ref_head)
        vocab = len(head.weight)
        count = hidden.shape[:-1].numel() if chosen is None else len(chosen)
        row_bytes = vocab * sum(dtype.itemsize for dtype in dtypes)
        size = rows_of_a_chunk(count, size_of(head.weight), row_bytes, hidden.device, chunk_rows)
        self.chosen = chosen
        self.heads = [one.in_dtype(dtype) for one, dtype in zip((head, ref_head), dtypes, strict=True)]
        self.chunks, self.ref_chunks = (
            Chunks(x.reshape(-1, x.shape[-1]), dtype, size, chosen)
            for x, dtype in zip((hidden, ref_hidden), dtypes, strict=True)
        )
        self.buffers = [logits_buffer(min(count, 1) * size, vocab, dtype, hidden.device) for dtype in dtypes]

    def project(self, x: Tensor, rows: slice) -> list[Tensor]:
        """Logits of both, of the rows alone that the chunk has."""
        self.heads[0].logits(x, self.buffers[0])
        self.heads[1].logits(self.ref_chunks.of(rows), self.buffers[1])
        return [buffer[: rows.stop - rows.start] for buffer in self.buffers]


@torch.library.custom_op("ppo_fast::linear_kl_rows", mutates_args=())
def linear_kl_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(KL [...], state [N, 9 or 5], which the backward needs)."""
    head, ref_head = Head(weight, bias, softcap), Head(ref_weight, ref_bias, softcap)
    pair = _Pair(hidden, head, ref_hidden, ref_head, chunk_rows, None)
    count = hidden.shape[:-1].numel()
    kl = hidden.new_empty(count, dtype=widest(hidden, weight, ref_hidden, ref_weight))
    state = hidden.new_empty((count, STATE[impl]), dtype=coefficient_dtype(impl))
    taus = temperature.flatten()
    for chunk in pair.chunks:
        rows = chunk.rows
        tau = taus[rows] if temperature.dim() else temperature
        kl[rows], state[rows] = kl_rows(*pair.project(chunk.x, rows), tau, impl)
    return kl.view(hidden.shape[:-1]), state


@linear_kl_rows.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    temperature: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    kl = hidden.new_empty(hidden.shape[:-1], dtype=widest(hidden, weight, ref_hidden, ref_weight))
    return kl, hidden.new_empty((kl.numel(), STATE[impl]), dtype=coefficient_dtype(impl))


def _gradient_state(state: Tensor, grad_kl: Tensor, impl: str) -> Tensor:
    """The rows' state for the launch of the gradient, from what the launch of the KL wrote."""
    none = torch.zeros_like(grad_kl)
    if impl == "cpu":
        stats, ref_stats = state[:, :3], state[:, 3:6]
    else:  # without E_p[d], which an entropy alone would need
        stats, ref_stats = torch.stack((state[:, 0], state[:, 1], none), dim=1), state[:, 2:5]
    return row_state(stats, impl, none, none, grad_kl, ref_stats)


def _gradients(
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    temperature: Tensor,
    state_of: Callable[[slice | Tensor, Tensor], Tensor],
    softcap: float,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
    *,
    shard: Slice | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_kl_rows_backward`; `state_of` some rows and what comes down on them is what a launch reads."""
    down = grad_kl.flatten().to(coefficient_dtype(impl))
    chosen = (down != 0).nonzero().squeeze(1) if compact else None
    head, ref_head = Head(weight, bias, softcap), Head(ref_weight, ref_bias, softcap)
    pair = _Pair(hidden, head, ref_hidden, ref_head, chunk_rows, chosen)
    gradients = HeadGradients(pair.chunks.hidden, pair.heads[0], *learns, shared=shard is not None)
    taus = temperature.flatten()
    one = torch.ones((), dtype=down.dtype, device=down.device)
    for chunk in pair.chunks:
        own, ref = pair.project(chunk.x, chunk.rows)
        where = chunk.rows if chosen is None else chosen[chunk.rows]
        tau = taus[where] if temperature.dim() else temperature
        rows = state_of(where, down[where])
        any_label = torch.zeros(chunk.count, dtype=torch.int64, device=own.device)
        grad = gradient_of_rows(one, own, any_label, tau, ref, rows, impl, inplace=not softcap)
        if softcap:
            pair.heads[0].uncap(grad, own)
        gradients.add(grad, chunk.x[: chunk.count], where)
    if shard is not None and gradients.hidden is not None:
        shard.summed(gradients.hidden)
    of_hidden, of_weight, of_bias = gradients.results(weight, bias, pair.chunks.hidden)
    shaped = of_hidden.to(hidden.dtype).view(hidden.shape) if learns[0] else of_hidden
    return shaped, of_weight.to(weight.dtype), of_bias if bias is None else of_bias.to(bias.dtype)


@torch.library.custom_op("ppo_fast::linear_kl_rows_backward", mutates_args=())
def linear_kl_rows_backward(
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    temperature: Tensor,
    state: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states, weight and bias, in their dtypes; empty where not wanted."""
    with gathered(weight, bias, ref_weight, ref_bias):
        return _gradients(
            grad_kl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature,
            lambda where, down: _gradient_state(state[where], down, impl),
            softcap, chunk_rows, compact, learns, impl,
        )  # fmt: skip


@linear_kl_rows_backward.register_fake
def _(
    grad_kl: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    temperature: Tensor,
    state: Tensor,
    softcap: float,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias, learns)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softcap, ctx.chunk_rows, ctx.compact, ctx.impl = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_kl: Tensor | None, _grad_state: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_kl is None:
        return (None,) * 11
    keep_until_accumulated(*ctx.saved_tensors[1:3])
    learns = list(ctx.needs_input_grad[:3])
    grads = linear_kl_rows_backward(
        grad_kl, *ctx.saved_tensors, ctx.softcap, ctx.chunk_rows, ctx.compact, learns, ctx.impl
    )
    return *(grad if wanted else None for grad, wanted in zip(grads, learns, strict=True)), *(None,) * 8


linear_kl_rows.register_autograd(_backward, setup_context=_save)


class _Sharded(torch.autograd.Function):
    """The same of a slice of both vocabularies: one gather in the forward, one sum of a gradient in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        temperature: Tensor,
        options: tuple[float, int, bool, str],
        shard: Slice,
    ) -> Tensor:
        softcap, chunk_rows, _, impl = options
        shape = hidden.shape[:-1]
        head, ref_head = Head(weight, bias, softcap), Head(ref_weight, ref_bias, softcap)
        size = chunk_rows or agreed_chunk_rows(shape.numel(), hidden.device)
        pair = _Pair(hidden, head, ref_hidden, ref_head, size, None)
        elsewhere = torch.full((shape.numel(),), ELSEWHERE, device=hidden.device)
        partial = hidden.new_empty((shape.numel(), 7), dtype=coefficient_dtype(impl))
        taus = temperature.flatten()
        for chunk in pair.chunks:
            rows = chunk.rows
            tau = taus[rows] if temperature.dim() else temperature
            own, ref = pair.project(chunk.x, rows)
            partial[rows] = shard.partial(own, ref, elsewhere[rows], tau, impl)
        stats = shard.merged(partial, elsewhere, taus if temperature.dim() else temperature)
        tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature)
        ctx.save_for_backward(*tensors, stats.own, stats.ref)
        ctx.options, ctx.shard = options, shard
        return stats.kl().to(widest(hidden, weight, ref_hidden, ref_weight)).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, own, ref = ctx.saved_tensors
        learns = list(ctx.needs_input_grad[:3])
        softcap, chunk_rows, compact, impl = ctx.options

        def state_of(where: slice | Tensor, down: Tensor) -> Tensor:
            none = torch.zeros_like(down)
            return row_state(own[where], impl, none, none, down, ref[where])

        grads = _gradients(
            grad_kl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature, state_of,
            softcap, chunk_rows, compact, learns, impl, shard=ctx.shard,
        )  # fmt: skip
        return *(grad if wanted else None for grad, wanted in zip(grads, learns, strict=True)), *(None,) * 6
