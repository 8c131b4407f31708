"""Sampling with random numbers that belong to the response, not to the process that happens to sample it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from ppo_fast.ppo.config import RolloutConfig

TINY = torch.finfo(torch.float32).tiny  # an exponential draw of exactly 0 has no logarithm
Stream = Literal["training", "evaluation", "order"]
STREAMS: tuple[Stream, ...] = ("training", "evaluation", "order")


class SeededSampling(LogitsProcessor):
    """Adds each row's own Gumbel noise to its scores, so that the largest one is a sample.

    ``argmax_j(z_j / temperature - log E_j)`` with E_j exponential draws is a draw from softmax(z / temperature) (the
    Gumbel-max trick). The draws of row b come from a generator seeded by `seeds[b]`: a response is the same whatever
    rows stand beside it, up to what its logits change in the last bits.

    Args:
        config: temperature, top_k and top_p.
        seeds: one for each row of the batch.
        device: where the scores will be.
    """

    def __init__(self, config: RolloutConfig, seeds: Sequence[int], device: torch.device) -> None:
        self.config = config
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the next token, with noise.

        Raises FloatingPointError where a row's largest is NaN or infinite: nothing can be sampled from it.
        """
        warped = self.distribution(input_ids, scores)
        if not bool(torch.isfinite(warped.amax(-1)).all()):
            raise FloatingPointError(
                "the actor's logits are not finite, so nothing can be sampled: its weights are lost. Lower "
                "optimizer.actor_lr and go on from a checkpoint"
            )
        draws = torch.empty_like(warped)
        for row, generator in zip(draws, self.generators, strict=True):
            row.exponential_(generator=generator)
        return warped - draws.clamp_(min=TINY).log_()

    def distribution(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores whose softmax is sampled from: divided by the temperature, cut by top_k and top_p."""
        warped = scores.float() / self.config.temperature
        if self.config.top_k:
            warped = TopKLogitsWarper(self.config.top_k)(input_ids, warped)
        if self.config.top_p < 1.0:
            warped = TopPLogitsWarper(self.config.top_p)(input_ids, warped)
        return warped


def stream_seeds(seed: int, stream: Stream, first: int, count: int) -> list[int]:
    """Seeds number `first`, `first` + 1, ... of a stream of a run with `seed`.

    Streams: a response each, in training and in evaluation; a shuffle of the batch each. They are the same for any
    number of processes, and a run that is resumed needs no memory of them. Neighbouring seeds and numbers are far apart
    after mixing (the finaliser of SplitMix64, Steele et al. 2014), so that response 1 of seed 0 is not response 0 of
    seed 1.
    """
    start = _mix(_mix(seed) + STREAMS.index(stream))
    return [_mix(start + number) for number in range(first, first + count)]


def fresh_seeds(count: int) -> list[int]:
    """Seeds drawn from torch's global generator."""
    return torch.randint(2**62, (count,), device="cpu").tolist()


def _mix(number: int) -> int:
    word = (number + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return (word ^ (word >> 31)) % 2**63
