"""Public ops for masked moments: mean, variance, and the two ways to normalise by them."""

from torch import Tensor

from ppo_fast import reference
from ppo_fast.ops import dispatch, fused_moments
from ppo_fast.ops.checks import Checker
from ppo_fast.ops.dispatch import Impl


def _check(op: str, x: Tensor, mask: Tensor, axis: int | None, unbiased: bool) -> None:
    check = Checker(op, "x", x)
    check.mask(mask, x.shape, "shape of x")
    check.flag("unbiased", unbiased)
    if axis is not None:
        if isinstance(axis, bool) or not isinstance(axis, int):
            check.fail("axis", f"is a {type(axis).__name__}", "an int or None", TypeError)
        if not -x.dim() <= axis < x.dim():
            check.fail("axis", f"is {axis}", f"an axis of x, in [{-x.dim()}, {x.dim()})")
    check.finite(mask, x=x)


def masked_mean(x: Tensor, mask: Tensor, axis: int | None = None, *, impl: Impl = "auto") -> Tensor:
    """Mean over the slots that count, sum(x mask) / sum(mask).

    Args:
        x: any shape, floating.
        mask: same shape, bool or numeric, nonzero = counts.
        axis: the axis to average over; None means all of them.
        impl: auto, reference, cpu or triton.

    Returns:
        0-d, or `x` without `axis`; float32 (float64 for float64). 0 where nothing counts.

    Raises:
        ValueError: wrong shape, device, axis or `impl`.
        TypeError: wrong dtype.

    Source: Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    _check("masked_mean", x, mask, axis, False)
    runs = dispatch.resolve("masked_mean", impl, x)
    if runs != "reference":
        return fused_moments.masked_mean(x, mask, axis, impl=runs)
    return reference.masked_mean(x, mask, axis)


def masked_var(
    x: Tensor, mask: Tensor, axis: int | None = None, *, unbiased: bool = False, impl: Impl = "auto"
) -> Tensor:
    """Variance over the slots that count, sum((x - mean)^2 mask) / n; n - 1 when unbiased.

    Args:
        x: any shape, floating.
        mask: same shape, bool or numeric, nonzero = counts.
        axis: the axis to reduce; None means all of them.
        unbiased: Bessel's correction.
        impl: auto, reference, cpu or triton.

    Returns:
        0-d, or `x` without `axis`; float32 (float64 for float64). 0 where none or one slot counts.

    Raises:
        ValueError: wrong shape, device, axis or `impl`.
        TypeError: wrong dtype.

    Source: Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    _check("masked_var", x, mask, axis, unbiased)
    runs = dispatch.resolve("masked_var", impl, x)
    if runs != "reference":
        return fused_moments.masked_var(x, mask, axis, unbiased=unbiased, impl=runs)
    return reference.masked_var(x, mask, axis, unbiased=unbiased)


def masked_whiten(x: Tensor, mask: Tensor, *, unbiased: bool = False, impl: Impl = "auto") -> Tensor:
    """Shift and scale to mean 0, variance 1 over the slots that count: (x - mean) / sqrt(var + 1e-8).

    Args:
        x: any shape, floating.
        mask: same shape, bool or numeric, nonzero = counts.
        unbiased: divide the variance by n - 1.
        impl: auto, reference, cpu or triton.

    Returns:
        Shape of `x`, float32 (float64 for float64), 0 in masked slots; all 0 when fewer than two count.

    Raises:
        ValueError: wrong shape, device or `impl`.
        TypeError: wrong dtype.

    Source: PPO2's advantage normalisation; Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    _check("masked_whiten", x, mask, None, unbiased)
    runs = dispatch.resolve("masked_whiten", impl, x)
    if runs != "reference":
        return fused_moments.masked_whiten(x, mask, unbiased=unbiased, impl=runs)
    return reference.masked_whiten(x, mask, unbiased=unbiased)


def masked_rescale(x: Tensor, mask: Tensor, *, unbiased: bool = False, impl: Impl = "auto") -> Tensor:
    """Scale to variance 1 over the slots that count, mean kept: (x - mean) / sqrt(var + 1e-8) + mean.

    Args:
        x: any shape, floating.
        mask: same shape, bool or numeric, nonzero = counts.
        unbiased: divide the variance by n - 1.
        impl: auto, reference, cpu or triton.

    Returns:
        Shape of `x`, float32 (float64 for float64), 0 in masked slots; one counted slot keeps its value.

    Raises:
        ValueError: wrong shape, device or `impl`.
        TypeError: wrong dtype.

    Source: reward whitening without the shift, Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    _check("masked_rescale", x, mask, None, unbiased)
    runs = dispatch.resolve("masked_rescale", impl, x)
    if runs != "reference":
        return fused_moments.masked_rescale(x, mask, unbiased=unbiased, impl=runs)
    return reference.masked_rescale(x, mask, unbiased=unbiased)
