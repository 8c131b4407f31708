"""The registry of benchmark cases: every suite takes its shapes from here."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One [rows, vocab] of logits; temperature is 0.7 so that no implementation skips the division."""

    rows: int
    vocab: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.vocab}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * self.dtype.itemsize


SMOKE = Case(8, 257, torch.float32)  # the smallest, for the test that the suites run at all

CASES = [
    SMOKE,
    Case(512, 32000, torch.float32),  # Llama 2
    Case(512, 32000, torch.bfloat16),
    Case(256, 50257, torch.float32),  # GPT-2: no row is aligned
    Case(128, 151936, torch.bfloat16),  # Qwen 2.5
]
