"""Where a launch goes and how a row kernel is tiled: by the vocabulary alone, never by the batch."""

import contextlib

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of `tensor` as the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def row_options(vocab: int, *, largest_block: int = 4096, warps: int = 16) -> dict[str, int | bool]:
    """Tile and warps by vocabulary alone, so that a row's result never depends on the batch round it.

    One choice for every row kernel but one (in `policy_rows`): the order in which a row is summed follows from it, so
    that a log-probability has the same bits whichever op took it, and an on-policy ratio is 1. Eight elements a thread
    are one 16-byte load of bfloat16, and few enough that nothing else spills.
    `enable_fp_fusion` is written out because Triton's default changes in 3.10, and parity would move with it.
    """
    block = min(triton.next_power_of_2(max(vocab, 16)), largest_block)
    return {"BLOCK": block, "num_warps": max(1, block * warps // largest_block), "enable_fp_fusion": True}


TOKEN_OPTIONS: dict[str, int | bool] = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
"""Of the token kernels: fixed, so that a sequence's sums do not depend on the padding or batch round it."""
