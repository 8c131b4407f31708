"""How the rows of a strided tensor of logits are found without copying it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowGrid:
    """Rows of `logits` on two levels of stride, in elements.

    Row r starts at (r // inner_rows) * outer_stride + (r % inner_rows) * inner_stride.
    """

    logits: Tensor
    inner_rows: int
    outer_stride: int
    inner_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """(inner_rows, outer_stride, inner_stride)."""
        return self.inner_rows, self.outer_stride, self.inner_stride

    def owns_rows(self, original: Tensor) -> bool:
        """Whether writing here writes the rows of `original`, each of them once: no copy, and no shared storage."""
        vocab = original.shape[-1]
        outer_rows = original.shape[:-1].numel() // self.inner_rows
        levels = sorted([(self.outer_stride, outer_rows), (self.inner_stride, self.inner_rows)])
        extent, apart = vocab, True
        for stride, size in levels:
            apart &= size <= 1 or stride >= extent
            extent = max(extent, stride * (size - 1) + extent)
        return apart and self.logits is original


def gpu_row_grid(logits: Tensor) -> RowGrid:
    """Return the rows of `logits` as the Triton kernels take them, copied where they do not lie so.

    Of a vocabulary that divides by 16 every row begins on a multiple of 16 elements and of 16 bytes: the layout of a
    load, and with it the order of a sum, is then a matter of the vocabulary alone.
    """
    rows = row_grid(logits)
    strides = (rows.outer_stride, rows.inner_stride)
    lie_so = all(stride % 16 == 0 for stride in strides) and rows.logits.data_ptr() % 16 == 0
    if logits.shape[-1] % 16 == 0 and not lie_so:
        return row_grid(logits.clone(memory_format=torch.contiguous_format))
    return rows


def row_grid(logits: Tensor) -> RowGrid:
    """Fold the leading axes of `logits` into at most two levels of stride; copy only where they do not fold.

    `logits[:, :-1]` of a contiguous [B, T, V] folds to B x (T - 1) rows with strides T V and V: no copy.
    """
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return row_grid(logits.contiguous())
    levels: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == stride * size:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return row_grid(logits.contiguous())
    (_, outer_stride), (inner_rows, inner_stride) = [(1, 0)] * (2 - len(levels)) + levels
    return RowGrid(logits, max(1, inner_rows), outer_stride, inner_stride)
