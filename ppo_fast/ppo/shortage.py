"""Out of memory: told in terms of the settings that decide how much is needed, or met by halving the micro-batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

Result = TypeVar("Result")


class OutOfMemory(MemoryError):
    """Memory ran out; the message says where, and which settings to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in torch's allocator on the CPU, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def explaining_shortage(where: str, lower: str) -> Iterator[None]:
    """Have memory that runs out in the block say `where` and what to `lower`; other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {where}: lower {lower} ({_first_line(error)})") from error


@dataclass
class MicroBatches:
    """How many sequences go through a model at once: as configured, or less once memory ran out."""

    size: int
    may_halve: bool = False

    def run(
        self, what: str, work: Callable[[int], Result], clean: Callable[[], None] | None = None
    ) -> Result:
        """`work(size)`, tried again at half the size where memory runs out, if that is allowed.

        `clean` takes back what a failed try has left, before the next. The new size stays. Raises OutOfMemory where
        halving is not allowed, or one sequence alone is too much.
        """
        while True:
            try:
                return work(self.size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self.may_halve or self.size == 1:
                    raise OutOfMemory(self._advice(what, error)) from error
            # Out of the except block, so that the error no longer holds the tensors of the failed pass.
            if clean is not None:
                clean()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"out of memory in {what} of {self.size} sequences: goes on with {self.size // 2}",
                stacklevel=2,
            )
            self.size //= 2

    def _advice(self, what: str, error: BaseException) -> str:
        if self.size > 1:
            lower = f"objective.micro_batch_size (now {self.size}), or allow objective.halve_on_oom=true"
        else:
            lower = "rollout.max_new_tokens, shorten the prompts, or take models.dtype=bfloat16"
        return f"out of memory in {what} of {self.size} sequence(s): lower {lower} ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0][:200] or type(error).__name__
