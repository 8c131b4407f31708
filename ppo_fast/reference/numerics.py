"""What every oracle shares: the dtype rule, masks, and the packed layout."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def keep(x: Tensor, counted: Tensor) -> Tensor:
    """`x` widened, with 0 where `counted` is False: NaN there reaches neither result nor gradient."""
    return torch.where(counted, widen(x), 0.0)


def mean_where(x: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted slots of `x`, which holds 0 in the others; 0 for an empty mask."""
    return x.sum() / counted.sum().clamp(min=1)


def pad_rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[total] to [B, longest], sequence b being `x[cu_seqlens[b]:cu_seqlens[b + 1]]`; the rest is 0.

    Reads the longest length on the host: the oracle may wait for the device, a fused kernel may not.
    """
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    width = int((ends - starts).max())
    slot = starts + torch.arange(width, device=x.device)
    inside = slot < ends
    return torch.where(inside, x[torch.where(inside, slot, 0)], 0) if x.numel() else x.new_zeros(inside.shape)


def unpad_rows(x: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """[B, longest] back to [total]: the inverse of `pad_rows`."""
    slot = torch.arange(total, device=x.device)
    row = torch.searchsorted(cu_seqlens[1:].long().contiguous(), slot, right=True)
    return x[row, slot - cu_seqlens.long()[row]]
