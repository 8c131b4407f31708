"""The clipped policy loss from hidden states: its gradients are made in the forward, in three products a chunk.

For each chunk of rows: logits = hidden @ weight.T into the kept buffer; one launch makes log-probabilities and row
coefficients of it; the gradient takes the place of the logits; then the gradients of hidden states and head. Rows whose
coefficients are all 0 take part in neither of the last two products: same sums, 1 + 2 a products for a share a.
"""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_estimate import as_bytes, scalar, widest
from ppo_fast.ops.fused_policy import contiguous, pack_coefficients
from ppo_fast.ops.fused_policy_rows import (
    LOGITS_STATS,
    RowNumbers,
    gradient_of_rows,
    launch_rows,
    token_launchers,
)
from ppo_fast.ops.linear_chunks import (
    Chunk,
    Chunks,
    Head,
    HeadGradients,
    common_dtype,
    held_dtype,
    keep_rows,
    logits_buffer,
    rows_of_a_chunk,
    size_of,
)
from ppo_fast.ops.sharded_head import is_partitioned, keep_until_accumulated
from ppo_fast.ops.vocab_parallel import Slice, agreed_chunk_rows
from ppo_fast.records import PolicyLoss

TERMS = slice(4, 6)  # entropy_coef and kl_coef among the packed coefficients


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    chunk_rows: int | None,
    compact: bool | None,
    shard: Slice | None,
    impl: str,
    **coefficients: Any,
) -> PolicyLoss:
    """Run `ppo_fast.linear_policy_loss` on `impl`; `shard` says which slice of the vocabulary the heads are."""
    numbers, normalizer = pack_coefficients(hidden.device, impl=impl, **coefficients)
    learns = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    arguments = (
        labels,
        old_logprobs.detach(),
        advantages.detach(),
        as_bytes(mask) if impl == "cpu" else comparable(mask),
        scalar(temperature, hidden.device, impl),
        *(None if x is None else x.detach() for x in (ref_hidden, ref_weight, ref_bias)),
        numbers,
        normalizer,
        softcap or 0.0,
        reduction,
        chunk_rows or 0,
        hidden.device.type == "cpu" if compact is None else compact,
        learns,
        impl,
    )
    if shard is not None or (any(learns) and not torch.compiler.is_compiling()):
        loss, logprobs, entropy, stats = _GradientsInForward.apply(hidden, weight, bias, arguments, shard)
    else:
        loss, logprobs, entropy, stats, *_ = linear_policy_rows(hidden, weight, bias, *arguments)
    named = dict(zip(LOGITS_STATS, stats.detach().unbind(), strict=True))
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named)


class _Rows:
    """What a launch reads of each row that takes part; a temperature may be one for all."""

    def __init__(self, numbers: RowNumbers, chosen: Tensor | None) -> None:
        each = [x.flatten() if x.dim() else x for x in numbers]
        self.columns = each if chosen is None else [x[chosen] if x.dim() else x for x in each]

    def of(self, rows: slice) -> RowNumbers:
        """Those of some rows."""
        labels, old_logprobs, advantages, weights, temperature = self.columns
        some = temperature[rows] if temperature.dim() else temperature
        return labels[rows], old_logprobs[rows], advantages[rows], weights[rows], some


def _unit(weights: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A power of two near the largest weight of a token; None where the gradient needs none.

    In float16 a gradient of 1 / tokens times a probability would vanish before the caller's loss scale reaches it: it
    is made without that factor, which the sums in float32 then get.
    """
    if dtype != torch.float16 or weights.numel() == 0:
        return None
    largest = weights.masked_fill(weights == -torch.inf, 0.0).abs().max()
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), 1.0)


class _Run:
    """One call: its heads, its buffers, and what its chunks add up."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        ref_hidden: Tensor | None,
        ref_head: Head | None,
        counted: Tensor,
        chunk_rows: int,
        compact: bool,
        shard: Slice | None,
    ) -> None:
        dtype, ref_dtype = common_dtype(hidden, head, ref_hidden, ref_head)
        vocab, device = len(head.weight), hidden.device
        self.head = head.in_dtype(dtype)
        self.chosen = counted.nonzero().squeeze(1) if compact else None
        self.compact = compact
        unread = None if compact else counted
        count = len(counted) if self.chosen is None else len(self.chosen)
        if shard is not None:
            chunk_rows = chunk_rows or agreed_chunk_rows(count, device)
        itemsize = dtype.itemsize + (0 if ref_head is None else ref_dtype.itemsize)
        size = rows_of_a_chunk(count, size_of(head.weight), vocab * itemsize, device, chunk_rows)
        self.chunks = Chunks(hidden, dtype, size, self.chosen, unread)
        self.logits = logits_buffer(size if count else 0, vocab, dtype, device)
        self.ref_head = None
        if ref_hidden is not None and ref_head is not None:
            self.ref_head = ref_head.in_dtype(ref_dtype)
            self.ref_chunks = Chunks(ref_hidden, ref_dtype, size, self.chosen, unread)
            self.ref_logits = logits_buffer(size if count else 0, vocab, ref_dtype, device)

    def project(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Logits of the chunk's own rows, and the reference's."""
        self.head.logits(chunk.x, self.logits)
        if self.ref_head is None:
            return self.logits[: chunk.count], None
        self.ref_head.logits(self.ref_chunks.of(chunk.rows), self.ref_logits)
        return self.logits[: chunk.count], self.ref_logits[: chunk.count]

    def scatter(self, parts: list[Tensor], dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Numbers of the rows that took part among all rows; 0 for the others."""
        out = self.logits.new_zeros(shape.numel(), dtype=dtype)
        if parts:
            out[slice(None) if self.chosen is None else self.chosen] = torch.cat(parts)
        return out.view(shape)

    def places(self, rows: slice, kept: Tensor | None) -> slice | Tensor:
        """Where the rows of a chunk stand among all rows; of them only `kept` if that is given."""
        if self.chosen is None:
            return rows if kept is None else kept + rows.start
        return self.chosen[rows] if kept is None else self.chosen[rows][kept]

    def learn(
        self,
        gradients: HeadGradients,
        chunk: Chunk,
        logits: tuple[Tensor, Tensor | None],
        rows: RowNumbers,
        state: Tensor,
        impl: str,
        *,
        skip: bool,
    ) -> None:
        """Take the chunk's logits to their gradient by the rows' state, and that to the head; `skip` rows without."""
        own, ref = logits
        labels, *_, temperature = rows
        x, kept = chunk.x[: chunk.count], None
        if skip:
            kept = (state[:, -3:] != 0).any(1).nonzero().squeeze(1)
            own, ref, x, state, labels = keep_rows(own, kept), None, x[kept], state[kept], labels[kept]
            temperature = temperature[kept] if temperature.dim() else temperature
            if len(kept) == 0:
                return
        one = torch.ones((), dtype=state.dtype, device=state.device)
        capped = self.head.softcap != 0
        grad = gradient_of_rows(one, own, labels, temperature, ref, state, impl, inplace=not capped)
        if capped:
            self.head.uncap(grad, own)
        gradients.add(grad, x, self.places(chunk.rows, kept))


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    coefficients: Tensor,
    normalizer: Tensor | None,
    softcap: float,
    reduction: str,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
    *,
    shard: Slice | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, logprobs, entropy, stats, and the gradients of hidden states, weight and bias as they are held."""
    labels, old_logprobs, advantages, mask = contiguous(labels, old_logprobs, advantages, mask)
    tokens, sequences = token_launchers(impl)
    weights = sequences.token_weights(mask, normalizer, reduction)
    rows_of, head = hidden.reshape(-1, hidden.shape[-1]), Head(weight, bias, softcap)
    ref_head = None if ref_weight is None else Head(ref_weight, ref_bias, softcap)
    ref_rows = None if ref_hidden is None else ref_hidden.reshape(-1, ref_hidden.shape[-1])
    run = _Run(rows_of, head, ref_rows, ref_head, (mask != 0).flatten(), chunk_rows, compact, shard)
    unit = _unit(weights, run.logits.dtype)
    if unit is not None:
        weights = weights / unit
    targets = labels if shard is None else shard.local(labels)
    rows = _Rows((targets, old_logprobs, advantages, weights, temperature), run.chosen)
    gradients = HeadGradients(rows_of, run.head, *learns, shared=shard is not None)
    skip = compact and not bool((coefficients[TERMS] != 0).any())
    inplace = gradients.wanted and not skip and not softcap and shard is None

    parts: list[tuple[Tensor, ...]] = []
    for chunk in run.chunks:
        logits = run.project(chunk)
        numbers = rows.of(chunk.rows)
        if shard is None:
            *results, state = launch_rows(*logits, numbers, coefficients, impl, inplace=inplace)
        else:
            *results, state = shard.launch_rows(*logits, numbers, coefficients, impl)
        parts.append(tuple(x for x in results if x is not None))
        if state is None:
            gradients.add(logits[0], chunk.x[: chunk.count], run.places(chunk.rows, None))
        elif gradients.wanted:
            run.learn(gradients, chunk, logits, numbers, state, impl, skip=skip)

    dtype = widest(run.logits, ref_hidden, ref_weight)
    columns = [list(column) for column in zip(*parts, strict=True)] or [[], [], []]
    per_token = [run.scatter(column, dtype, labels.shape) for column in columns]
    logprobs, entropy = per_token[:2]
    loss, stats, *_ = tokens.policy_forward(
        logprobs, old_logprobs, advantages, mask, coefficients, normalizer, None,
        reduction=reduction, entropy=entropy, kl=None if ref_head is None else per_token[2],
    )  # fmt: skip
    if shard is not None and gradients.hidden is not None:
        shard.summed(gradients.hidden)
    held = gradients.results(weight, bias, rows_of, unit)
    if learns[0]:
        held[0] = held[0].view(hidden.shape)
    return loss, logprobs, entropy, stats, held


@torch.library.custom_op("ppo_fast::linear_policy_rows", mutates_args=())
def linear_policy_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    coefficients: Tensor,
    normalizer: Tensor | None,
    softcap: float,
    reduction: str,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logprobs, entropy, stats [6], gradients of hidden, weight and bias; empty where not learnt)."""
    loss, logprobs, entropy, stats, held = _run(
        hidden, weight, bias, labels, old_logprobs, advantages, mask, temperature, ref_hidden, ref_weight,
        ref_bias, coefficients, normalizer, softcap, reduction, chunk_rows, compact, learns, impl,
    )  # fmt: skip
    of_hidden, of_weight, of_bias = held
    return loss, logprobs, entropy, stats, of_hidden, of_weight, of_bias


@linear_policy_rows.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    coefficients: Tensor,
    normalizer: Tensor | None,
    softcap: float,
    reduction: str,
    chunk_rows: int,
    compact: bool,
    learns: list[bool],
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = widest(hidden, weight, ref_hidden, ref_weight)
    logprobs = hidden.new_empty(labels.shape, dtype=dtype)
    held = [
        weight.new_empty(0) if x is None or not wanted else x.new_empty(x.shape, dtype=held_dtype(x))
        for x, wanted in zip((hidden, weight, bias), learns, strict=True)
    ]
    return (
        logprobs.new_empty(()),
        logprobs,
        torch.empty_like(logprobs),
        logprobs.new_empty(6),
        held[0],
        held[1],
        held[2],
    )


@torch.library.custom_op("ppo_fast::scale_held_gradient", mutates_args=())
def scale_held_gradient(grad_loss: Tensor, held: Tensor, like: Tensor) -> Tensor:
    """`held` times the gradient of the loss, in the dtype of `like`; it has no gradient of its own."""
    return (held * grad_loss).to(like.dtype, copy=True)


@scale_held_gradient.register_fake
def _(grad_loss: Tensor, held: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(held, dtype=like.dtype)


def _save_held(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.learns = inputs[-2]
    ctx.save_for_backward(*inputs[:3], *output[4:])
    ctx.set_materialize_grads(False)


def _held_backward(ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 19
    like, held = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    grads = [
        scale_held_gradient(grad_loss, mine, x) if wanted and x is not None else None
        for mine, x, wanted in zip(held, like, ctx.learns, strict=True)
    ]
    return *grads, *(None,) * 16


linear_policy_rows.register_autograd(_held_backward, setup_context=_save_held)


class _GradientsInForward(torch.autograd.Function):
    """As the operator's own autograd, but where the gradient of the loss is 1 what is held is handed on, not copied."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        arguments: tuple[Any, ...],
        shard: Slice | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss, logprobs, entropy, stats, held = _run(hidden, weight, bias, *arguments, shard=shard)
        ctx.learns, ctx.dtypes = (
            arguments[-2],
            [None if x is None else x.dtype for x in (hidden, weight, bias)],
        )
        ctx.save_for_backward(*held)
        ctx.partitioned = [x for x in (weight, bias) if is_partitioned(x)]
        ctx.mark_non_differentiable(logprobs, entropy, stats)
        return loss, logprobs, entropy, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_policy_loss: the gradient has none of its own, so create_graph=True cannot be had"
            )
        keep_until_accumulated(*ctx.partitioned)
        as_it_is = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        grads = [
            None if not wanted else (mine if as_it_is else mine * grad_loss).to(dtype)
            for mine, dtype, wanted in zip(ctx.saved_tensors, ctx.dtypes, ctx.learns, strict=True)
        ]
        return *grads, None, None
