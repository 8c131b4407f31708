"""A head's matrix products over chunks of rows: hidden states to logits in one kept buffer, and gradients back.

The logits of a chunk are the only thing of the size of the vocabulary beside the head itself and its gradient.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_fast.ops.backends import large_empty

ROW_STEP = 16  # a chunk that is not given is a multiple of this
CPU_CHUNK_BYTES = 128 * 2**20  # several hundred rows of most vocabularies: BLAS gains little beyond
GPU_CHUNK_ROWS = 4096  # each further chunk reads and writes the gradient of the head once more
SHARE_OF_FREE = 8  # a chunk of logits takes at most one part in so many of the free memory
BLOCK_ROWS = 64  # rows of a chunk that are copied at a time, so that a copy costs little memory
VOCABULARY_BLOCK = 4096  # rows of the head whose gradient is converted at a time


def free_bytes(device: torch.device) -> int:
    """Bytes that nobody uses on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def rows_of_a_chunk(rows: int, head_bytes: int, row_bytes: int, device: torch.device, chunk_rows: int) -> int:
    """`chunk_rows` itself, or for 0 what memory allows, so that the last chunk is nearly as long as the others.

    A row of the buffer takes `row_bytes`, the head `head_bytes`: each chunk reads and writes its gradient once more, so
    on a CPU a quarter of what that takes is well spent on the buffer.
    """
    if chunk_rows:
        return chunk_rows
    most = free_bytes(device) // SHARE_OF_FREE // row_bytes
    if device.type == "cuda":
        most = min(most, GPU_CHUNK_ROWS)
    else:
        most = min(most, max(CPU_CHUNK_BYTES, head_bytes // 4) // row_bytes)
    most = max(ROW_STEP, most // ROW_STEP * ROW_STEP)
    pieces = max(1, -(-rows // most))
    return max(ROW_STEP, -(-rows // (pieces * ROW_STEP)) * ROW_STEP)


@dataclass(frozen=True)
class Head:
    """z = hidden @ weight.T + bias, and with a softcap s: s tanh(z / s)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float  # 0 for none

    def in_dtype(self, dtype: torch.dtype) -> "Head":
        """The same head in the dtype of the products."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.softcap)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Write the logits of every row of `x` [R, D] into `out` [R, V]: always as many, so always the same way."""
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out)
        if self.softcap:
            for rows in _blocks(len(out), BLOCK_ROWS):
                wide = out[rows].to(_wide(out.dtype))
                out[rows] = wide.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncap(self, grad: Tensor, logits: Tensor) -> None:
        """Take the gradient of the capped `logits` to that of the logits before, in place."""
        for rows in _blocks(len(grad), BLOCK_ROWS):
            wide = logits[rows].to(_wide(grad.dtype))
            grad[rows] = wide.div_(self.softcap).square_().neg_().add_(1.0).mul_(grad[rows])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def size_of(tensor: Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.itemsize


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def common_dtype(
    hidden: Tensor, head: Head, ref_hidden: Tensor | None, ref_head: Head | None
) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of the products, and of the logits, of both models: float64 for both where one of them has it."""
    own = torch.promote_types(hidden.dtype, head.weight.dtype)
    if ref_hidden is None or ref_head is None:
        return own, own
    ref = torch.promote_types(ref_hidden.dtype, ref_head.weight.dtype)
    return (torch.float64, torch.float64) if torch.float64 in (own, ref) else (own, ref)


def held_dtype(learner: Tensor) -> torch.dtype:
    """The dtype in which a gradient waits for that of the loss: one in float16 has its loss scale still before it."""
    return torch.float32 if learner.dtype == torch.float16 else learner.dtype


@dataclass(frozen=True)
class Chunk:
    """Rows `rows` of those that take part, and their hidden states in a buffer that the next chunk overwrites."""

    rows: slice
    x: Tensor
    """[R, D]; what stands past the chunk's own rows is of no account."""

    @property
    def count(self) -> int:
        """Rows of its own."""
        return self.rows.stop - self.rows.start


class Chunks:
    """The hidden states [N, D] in chunks of one size: of all rows, or of those that `chosen` names.

    `counted` [N] bool, where it is given, is False for rows whose hidden states are not read but taken as 0.
    """

    def __init__(
        self,
        hidden: Tensor,
        dtype: torch.dtype,
        size: int,
        chosen: Tensor | None,
        counted: Tensor | None = None,
    ) -> None:
        self.hidden, self.chosen, self.counted = hidden, chosen, counted
        self.count = len(hidden) if chosen is None else len(chosen)
        self.x = torch.zeros((size, hidden.shape[-1]), dtype=dtype, device=hidden.device)

    def __iter__(self) -> Iterator[Chunk]:
        for rows in _blocks(self.count, len(self.x)):
            yield Chunk(rows, self.of(rows))

    def of(self, rows: slice) -> Tensor:
        """Their hidden states, in the buffer."""
        count = rows.stop - rows.start
        x = self.x[:count]
        x.copy_(self.hidden[rows] if self.chosen is None else self.hidden[self.chosen[rows]])
        if self.counted is not None:
            x.masked_fill_(~self.counted[rows].unsqueeze(-1), 0.0)
        return self.x


def logits_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised [rows, vocab]."""
    if device.type == "cpu":
        return large_empty((rows, vocab), dtype)
    return torch.empty((rows, vocab), dtype=dtype, device=device)


def keep_rows(tensor: Tensor, kept: Tensor) -> Tensor:
    """Move the rows `kept`, which rise, to the front of `tensor` in place; returns that part.

    A row never moves down the tensor, so a block of them may be written before the later ones are read.
    """
    first = int((kept != torch.arange(len(kept), device=kept.device)).long().argmax()) if len(kept) else 0
    for rows in _blocks(len(kept), BLOCK_ROWS):
        if rows.stop > first:
            tensor[rows] = tensor[kept[rows]]
    return tensor[: len(kept)]


class HeadGradients:
    """The gradients of hidden states and head, as far as they are wanted, added up from chunk to chunk.

    The head's are added in float32 (float64 for float64) over all chunks and rounded to its dtype once, at the end.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        of_hidden: bool,
        of_weight: bool,
        of_bias: bool,
        *,
        shared: bool = False,
    ) -> None:
        """`shared`: what of the hidden states is made here is one part of a sum, and is not rounded before it."""
        weight, bias = head.weight, head.bias
        wide = _wide(weight.dtype)
        self.head = head
        dtype = _wide(hidden.dtype) if shared else held_dtype(hidden)
        self.hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if of_hidden else None
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if of_weight else None
        self.bias = bias.new_zeros(bias.shape, dtype=wide) if of_bias and bias is not None else None

    @property
    def wanted(self) -> bool:
        """Whether there is anything to add up."""
        return not (self.hidden is self.weight is self.bias is None)

    def add(self, grad: Tensor, x: Tensor, where: slice | Tensor) -> None:
        """Take in `grad` [n, V] of the logits of the hidden states `x` [n, D], which are the rows `where` of all."""
        if self.hidden is not None:
            self.hidden[where] = torch.mm(grad, self.head.weight).to(self.hidden.dtype)
        if self.weight is not None:
            if self.weight.dtype == grad.dtype:
                self.weight.addmm_(grad.t(), x)
            else:
                for rows in _blocks(len(self.weight), VOCABULARY_BLOCK):
                    self.weight[rows] += _product_for_a_sum(grad[:, rows].t(), x)
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)

    def results(
        self, weight: Tensor, bias: Tensor | None, hidden: Tensor, unit: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients of hidden states, weight and bias, times `unit`, as they are held; empty where not wanted."""
        pairs = ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        return [
            weight.new_empty(0)
            if mine is None or x is None
            else (mine if unit is None else mine.mul_(unit)).to(held_dtype(x))
            for mine, x in pairs
        ]


def _product_for_a_sum(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16-bit operands, in float32 where the device's product has it."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def row_state(
    stats: Tensor,
    impl: str,
    g_logprob: Tensor,
    g_entropy: Tensor,
    g_kl: Tensor | None = None,
    ref_stats: Tensor | None = None,
) -> Tensor:
    """What a launch of the gradient reads of each row, from its statistics and what comes down on it.

    `stats` [n, 3]: max x, sum e^d, E_p[d]; `ref_stats` [n, 3]: max r, sum e^d_ref, E_p[d - d_ref].
    """
    top, total, mean = stats.unbind(1)
    none = torch.zeros_like(top)
    g_kl = none if g_kl is None else g_kl
    ref_top, ref_total, mean_gap = (none, none + 1, none) if ref_stats is None else ref_stats.unbind(1)
    if impl == "cpu":
        return torch.stack(
            (top, total, mean, ref_top, ref_total, mean_gap, g_logprob, g_entropy, g_kl), dim=1
        )
    of_mean = torch.where(g_entropy == 0, 0.0, g_entropy * mean)
    a = of_mean - torch.where(g_kl == 0, 0.0, g_kl * mean_gap) - g_logprob
    return torch.stack((top, 1 / total, ref_top, a, -g_entropy, g_logprob, g_kl), dim=1)
