"""The registry of benchmark cases: every suite takes its shapes from here, the same for all implementations."""

from dataclasses import dataclass

import torch
from measure import DEVICE


@dataclass(frozen=True)
class Case:
    """One [rows, columns]: logits over a vocabulary, or sequences of tokens."""

    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize


SMOKE = Case(8, 257, torch.float32)  # the smallest, for the test that the suites run at all

CPU_CASES = [
    SMOKE,
    Case(512, 32000, torch.float32),  # Llama 2
    Case(512, 32000, torch.bfloat16),
    Case(256, 50257, torch.float32),  # GPT-2: no row is aligned
    Case(128, 151936, torch.bfloat16),  # Qwen 2.5
]
GPU_CASES = [
    Case(8192, 128256, torch.bfloat16),  # Llama 3
    Case(8192, 151936, torch.bfloat16),
    Case(8192, 32000, torch.bfloat16),
    Case(4096, 50257, torch.float32),
]
LOGITS = GPU_CASES if DEVICE == "cuda" else CPU_CASES

# What the native ops are held to on a CPU, side by side with what they replace.
RATIOS = [SMOKE, *(Case(512, v, dtype) for v in (32000, 151936) for dtype in (torch.float32, torch.bfloat16))]


@dataclass(frozen=True)
class HeadCase(Case):
    """Hidden states [rows, width] and a head of `columns` tokens."""

    width: int

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}x{self.width}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> int:
        """Of hidden states and head."""
        return (self.rows + self.columns) * self.width * self.dtype.itemsize


SMOKE_HEAD = HeadCase(8, 257, torch.float32, 16)
CPU_HEADS = [
    SMOKE_HEAD,
    HeadCase(4096, 49152, torch.float32, 576),  # SmolLM2-135M
    HeadCase(4096, 49152, torch.bfloat16, 576),
    HeadCase(2048, 151936, torch.float32, 1024),  # Qwen3-0.6B
]
GPU_HEADS = [HeadCase(8192, 128256, torch.bfloat16, 4096), HeadCase(8192, 151936, torch.bfloat16, 4096)]
HEADS = GPU_HEADS if DEVICE == "cuda" else CPU_HEADS

# Tokens: a micro-batch, and one that fills a GPU.
TOKENS = [SMOKE, Case(64, 1024, torch.float32), Case(1024, 1024, torch.float32)]

# The experience stage, whose loops over tokens grow with the columns: short, long and very long responses, and one row.
SHAPES = [(1024, 1024), (512, 8192), (128, 32768), (1, 131072)] + ([(1024, 8192)] if DEVICE == "cuda" else [])
EXPERIENCE = [SMOKE, *(Case(rows, columns, torch.float32) for rows, columns in SHAPES)]
