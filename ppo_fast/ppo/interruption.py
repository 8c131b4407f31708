"""SIGTERM: remembered when it comes, acted on where the state of a run is one that can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import StoppingCriteria

from ppo_fast.ppo.ranks import Ranks


class Interrupted(Exception):
    """SIGTERM came, and this is a place to stop at."""


class StopSignal:
    """Whether this run was asked to stop. `check` is called between micro-batches, on every rank alike."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.requested = False

    def check(self) -> None:
        """Raise Interrupted, on all ranks together, where one of them was asked to stop."""
        if self.ranks.any(self.requested):
            raise Interrupted

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a wish to stop while the block runs. Outside of the main thread nothing can be taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: object) -> None:
            self.requested = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


class EndGeneration(StoppingCriteria):
    """Ends a generation at the next token once a stop is asked for; what it sampled till then is thrown away.

    No rank waits for another here, since each may generate for as many tokens as its own responses take.
    """

    def __init__(self, stop: StopSignal) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: object) -> Tensor:
        """True for every row, or False for every row. [B] bool."""
        return torch.full((input_ids.shape[0],), self.stop.requested, device=input_ids.device)
