"""Oracles of the masked moments: mean, variance, and the two ways to normalise by them."""

import torch
from torch import Tensor

from ppo_fast.reference.numerics import keep

WHITEN_EPS = 1e-8  # inside the square root, so that a batch of equal values whitens to 0


def masked_mean(x: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """sum(x m) / sum(m), m being 1 where the mask is nonzero.

    Args:
        x: any shape, floating.
        mask: same shape, nonzero = counts.
        axis: the axis to average over; None means all of them.

    Returns:
        0-d, or `x` without `axis`; float32 (float64 for float64). 0 where nothing counts.

    Source: Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    counted = mask != 0
    dims = tuple(range(x.dim())) if axis is None else (axis,)
    return keep(x, counted).sum(dims) / counted.sum(dims).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, axis: int | None = None, *, unbiased: bool = False) -> Tensor:
    """sum((x - mean)^2 m) / n, n = sum(m), or n - 1 when unbiased.

    Args:
        x: any shape, floating.
        mask: same shape, nonzero = counts.
        axis: the axis to reduce; None means all of them.
        unbiased: Bessel's correction.

    Returns:
        0-d, or `x` without `axis`; float32 (float64 for float64). 0 where none or one slot counts.

    Source: Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    counted = mask != 0
    dims = tuple(range(x.dim())) if axis is None else (axis,)
    kept = keep(x, counted)
    n = counted.sum(dims, keepdim=True)
    centred = torch.where(counted, kept - kept.sum(dims, keepdim=True) / n.clamp(min=1), 0.0)
    freedom = (n - 1 if unbiased else n).clamp(min=1).sum(dims)
    return centred.square().sum(dims) / freedom


def masked_whiten(x: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over all counted slots: mean 0, variance 1.

    Args:
        x: any shape, floating.
        mask: same shape, nonzero = counts.
        unbiased: divide the variance by n - 1.

    Returns:
        Shape of `x`, float32 (float64 for float64), 0 in masked slots; all 0 when fewer than two count.

    Source: PPO2's advantage normalisation; Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    scale = torch.rsqrt(masked_var(x, mask, unbiased=unbiased) + WHITEN_EPS)
    counted = mask != 0
    return torch.where(counted, (keep(x, counted) - masked_mean(x, mask)) * scale, 0.0)


def masked_rescale(x: Tensor, mask: Tensor, *, unbiased: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) + mean over all counted slots: variance 1, the mean kept.

    Args:
        x: any shape, floating.
        mask: same shape, nonzero = counts.
        unbiased: divide the variance by n - 1.

    Returns:
        Shape of `x`, float32 (float64 for float64), 0 in masked slots; one counted slot keeps its value.

    Source: reward whitening without the shift, Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    whitened = masked_whiten(x, mask, unbiased=unbiased)
    return torch.where(mask != 0, whitened + masked_mean(x, mask), 0.0)
