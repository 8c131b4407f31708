"""The processes that run one training together: who this one is, and how they come to one mind."""

from __future__ import annotations

import torch
from torch import distributed


class Ranks:
    """The ranks of torch.distributed's default group, or this process alone where none was started."""

    def __init__(self) -> None:
        self.together = distributed.is_available() and distributed.is_initialized()
        self.index: int = distributed.get_rank() if self.together else 0
        self.count: int = distributed.get_world_size() if self.together else 1

    @property
    def first(self) -> bool:
        """Whether this rank writes what is one for all."""
        return self.index == 0

    def all(self, flag: bool) -> bool:
        """Whether `flag` is true on every rank; a barrier, too. Every rank must call it."""
        return not self.any(not flag)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank; a barrier, too. Every rank must call it."""
        if not self.together:
            return flag
        # NCCL moves tensors of a GPU alone, gloo those of the host.
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        votes = torch.tensor(int(flag), device=device)
        distributed.all_reduce(votes, op=distributed.ReduceOp.MAX)
        return bool(votes.item())
