"""Where a launch goes and how a row kernel is tiled: by the vocabulary alone, never by the batch."""

import contextlib

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of `tensor` as the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def is_aligned(vocab: int) -> bool:
    """Whether the kernels take every row of this vocabulary to start on a multiple of 16 elements."""
    return vocab % 16 == 0


def row_options(vocab: int, *, largest_block: int = 4096, warps: int = 16) -> dict[str, int | bool]:
    """Tile and warps by vocabulary alone, so that a row's result never depends on the batch round it.

    One choice for every row kernel: the order in which a row is summed follows from it, so that a log-probability has
    the same bits whichever op took it, and an on-policy ratio is 1. For the same reason whether loads are vectors is a
    matter of the vocabulary (ALIGNED): `gpu_row_grid` copies rows that do not lie as it says. Eight elements a thread
    are one 16-byte load of bfloat16, and few enough that nothing spills.
    `enable_fp_fusion` is written out because Triton's default changes in 3.10, and parity would move with it.
    """
    block = min(triton.next_power_of_2(max(vocab, 16)), largest_block)
    return {
        "BLOCK": block,
        "ALIGNED": is_aligned(vocab),
        "num_warps": max(1, block * warps // largest_block),
        "enable_fp_fusion": True,
    }


TOKEN_OPTIONS: dict[str, int | bool] = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
"""Of the token kernels: fixed, so that a sequence's sums do not depend on the padding or batch round it."""
