"""Where a launch goes and how a row kernel is tiled: by the vocabulary alone, never by the batch."""

import contextlib

import torch
import triton
from torch import Tensor


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """The device of `tensor` as the current one, where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def row_options(
    vocab: int, *, largest_block: int = 4096, elements_per_warp: int = 512
) -> dict[str, int | bool]:
    """Tile and warps by vocabulary alone, so that a row's result never depends on the batch round it.

    `enable_fp_fusion` is written out because Triton's default changes in 3.10, and parity would move with it.
    """
    block = min(triton.next_power_of_2(max(vocab, 16)), largest_block)
    most = largest_block // elements_per_warp
    return {
        "BLOCK": block,
        "num_warps": max(1, min(most, block // elements_per_warp)),
        "enable_fp_fusion": True,
    }


TOKEN_OPTIONS: dict[str, int | bool] = {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": True}
"""Of the token kernels: fixed, so that a sequence's sums do not depend on the padding or batch round it."""
