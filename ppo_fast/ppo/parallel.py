"""Several processes, one batch: how they start, which rows each takes, and how what they know is put together.

The batch of a PPO step is one and the same for any number of processes. Of each minibatch every process takes an equal
run of rows: it samples, scores and trains those. Token-level results are gathered after scoring (a few numbers a
token, far less than a model), so that whitening, shuffling and metrics are those of the whole batch by construction,
and a minibatch of a later epoch holds the rows that one process alone would have drawn.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ppo_fast.ppo.ranks import Ranks

Rows = Tensor | slice
T = TypeVar("T")

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What torch says where a peer is gone or late; the transport's own type is RuntimeError.
CONNECTION = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe", "tcpstore")


class LostRankError(RuntimeError):
    """Another process of the run died, or did not answer in time."""


@contextmanager
def process_group(timeout_minutes: float, *, cpu: bool, engines: bool) -> Iterator[Ranks]:
    """The group of all processes that a launcher started, or this process alone where none did.

    Reads what `torchrun` and `deepspeed` set: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A group that
    the caller has made is used and left as it is. A process that waits for another for longer than the timeout gives
    up with `LostRankError`; so does one whose peer is gone. With `engines` one process alone has a group, too, since
    DeepSpeed asks for one.

    Raises ValueError where a launcher's environment is incomplete.
    """
    launched = _launched()
    if distributed.is_initialized() or not (launched or engines):
        with told_of_lost_ranks(timeout_minutes):
            yield Ranks()
        return
    backend = "gloo" if cpu else "cpu:gloo,cuda:nccl"
    place: dict[str, Any] = {} if launched else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
    if not cpu:
        torch.cuda.set_device(local_rank())
    with told_of_lost_ranks(timeout_minutes):
        distributed.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **place)
        yield Ranks()
    # Not after an error: a peer that is gone would be waited for.
    distributed.destroy_process_group()


@contextmanager
def told_of_lost_ranks(timeout_minutes: float) -> Iterator[None]:
    """Turn the transport's RuntimeError into one that says what happened and what to do."""
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if isinstance(error, LostRankError) or not any(word in said.lower() for word in CONNECTION):
            raise
        if not (distributed.is_available() and distributed.is_initialized()):
            raise
        raise LostRankError(
            f"rank {distributed.get_rank()} lost another process of the run: it died, or did not answer within "
            f"parallel.timeout_minutes={timeout_minutes:g}. What it said stands above or in its own log; "
            f"resume=auto goes on from the last checkpoint ({said.splitlines()[0][:200]})"
        ) from error


def local_rank() -> int:
    """Number of this process on its machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _launched() -> bool:
    """Whether a launcher started this process as one of several (or as one on purpose)."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return False
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing:
        raise ValueError(
            f"the environment has WORLD_SIZE and RANK but no {', '.join(missing)}: "
            "start the processes with `torchrun` or `deepspeed`"
        )
    return True


@dataclass(frozen=True)
class Shard:
    """The rows of a batch that one process takes: of each of `minibatches` equal parts, the index-th equal run."""

    index: int
    count: int

    @classmethod
    def of(cls, ranks: Ranks) -> Shard:
        """This process's place among all."""
        return cls(ranks.index, ranks.count)

    def check(self, batch_size: int, minibatches: int) -> None:
        """ValueError where a minibatch cannot be split evenly."""
        size = batch_size // minibatches
        if size % self.count:
            raise ValueError(
                f"rollout.batch_size / objective.minibatches is {size} responses, "
                f"expected a multiple of the number of processes ({self.count})"
            )

    def rows(self, batch: int, minibatches: int) -> list[int]:
        """This process's rows of a batch, in the order in which it holds them."""
        size = batch // minibatches
        own = size // self.count
        starts = range(self.index * own, batch, size)
        return [row for start in starts for row in range(start, start + own)]

    def part(self, rows: Rows) -> Rows:
        """This process's run of a minibatch's rows."""
        if isinstance(rows, Tensor):
            own = rows.shape[0] // self.count
            return rows[self.index * own : (self.index + 1) * own]
        own = (rows.stop - rows.start) // self.count
        start = rows.start + self.index * own
        return slice(start, start + own)

    def gather(self, own: Tensor, minibatches: int) -> Tensor:
        """The whole batch [B, ...] from every process's rows [B / count, ...], in the order of the batch."""
        if self.count == 1:
            return own
        raw = own.detach().contiguous()
        sent = raw.view(torch.uint8) if raw.dtype == torch.bool else raw
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        distributed.all_gather(parts, sent)
        size = own.shape[0] // minibatches
        together = torch.stack(parts).view(self.count, minibatches, size, *own.shape[1:])
        return together.transpose(0, 1).reshape(self.count * own.shape[0], *own.shape[1:]).view(own.dtype)

    def gather_fields(self, record: T, minibatches: int) -> T:
        """A dataclass with every tensor field gathered."""
        values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}  # type: ignore[arg-type]
        tensors = {
            name: self.gather(value, minibatches)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return dataclasses.replace(record, **tensors)  # type: ignore[type-var]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        return self._reduce(values, distributed.ReduceOp.SUM)

    def largest(self, values: Tensor) -> Tensor:
        """Maximum over all processes."""
        return self._reduce(values, distributed.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: distributed.ReduceOp.RedOpType) -> Tensor:
        if self.count == 1:
            return values
        total = values.detach().clone()
        distributed.all_reduce(total, op=operation)
        return total


def agreed(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action` returns on this process, once it has succeeded on every one.

    Where it raises ValueError or OSError on one, that one raises it and the others raise ValueError: nobody waits for
    a process that has gone. It must not talk to the others itself.
    """
    error: Exception | None = None
    try:
        result = action()
    except (ValueError, OSError) as caught:
        error = caught
    if ranks.all(error is None):
        return result
    raise error or ValueError("another process of the run has refused: see what it says")


ALL_ROWS = Shard(0, 1)
"""What a process alone takes."""


def share_weights(model: nn.Module) -> None:
    """Every process takes the first one's parameters and buffers, so that all start from the same ones."""
    if Ranks().count == 1:
        return
    for tensor in model.state_dict().values():
        distributed.broadcast(tensor, src=0)


def padded_to_multiple(items: Sequence[T], count: int) -> list[T]:
    """The items, the last one repeated until `count` divides their number."""
    return [*items, *[items[-1]] * (-len(items) % count)]


def sum_gradients(parameters: Sequence[Tensor], bucket_bytes: int = 64 << 20) -> None:
    """Add every parameter's gradient up over all processes, in buckets of one dtype; a missing one counts as 0."""
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket = buckets.setdefault(parameter.grad.dtype, [])
        bucket.append(parameter.grad)
        if sum(grad.nbytes for grad in bucket) >= bucket_bytes:
            _sum_bucket(buckets.pop(parameter.grad.dtype))
    for bucket in buckets.values():
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
