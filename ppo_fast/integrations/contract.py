"""What the contracts of the trainers' functions have in common: their dtypes, their masks, their NaN."""

import functools

import torch
from torch import Tensor

IGNORED_LABEL = -100  # flash-attn's cross entropy gives it a loss of 0

_strict = True


def strict() -> bool:
    """Whether a replacement gives NaN where its original does; False lets ours give the better answer."""
    return _strict


def set_strict(strict: bool) -> None:
    """Set what `strict` says; `patch(..., strict=...)` does."""
    global _strict
    _strict = strict


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of the sum of these tensors, none of them 0-d."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def wide_index(index: Tensor) -> Tensor:
    """An index that torch.gather takes, in the dtype that our ops take; any other is left to be refused."""
    return index.long() if index.dtype == torch.int32 else index


def for_each_row(temperature: float | Tensor, rows: torch.Size) -> float | Tensor:
    """A tensor of one element, which originals broadcast, as our ops take a tensor: with one element for each row."""
    if isinstance(temperature, Tensor) and temperature.numel() == 1:
        return temperature.detach().reshape(()).expand(rows)
    return temperature


def zero_one(mask: Tensor) -> bool:
    """Whether every entry is 0 or 1, so that "nonzero counts" and "multiply by the mask" are the same.

    On a GPU reading the mask would wait for the device: there integers are taken for 0 and 1, and floats not.
    """
    if mask.dtype == torch.bool:
        return True
    if mask.device.type != "cpu":
        return not mask.is_floating_point()
    if mask.is_floating_point():
        return bool(((mask == 0) | (mask == 1)).all())
    least, most = mask.aminmax() if mask.numel() else (0, 1)
    return bool(least >= 0) and bool(most <= 1)


def require_zero_one(op: str, name: str, mask: Tensor) -> None:
    """Refuse a mask that weighs its slots: a fused loss knows only slots that count and slots that do not."""
    if mask.device.type == "cpu" and not zero_one(mask):
        raise ValueError(f"{op}: `{name}` has entries other than 0 and 1, expected a mask")


def poison(masked: Tensor, *tensors: Tensor) -> Tensor:
    """0, or NaN where `masked` slots hold one that is not finite: what `(x * mask).sum()` makes of them, 0-d.

    Args:
        masked: bool, True for a slot that does not count.
        tensors: of the same shape.
    """
    return sum((torch.where(masked, tensor.detach() * 0, 0).sum() for tensor in tensors), torch.zeros(()))


def nan_where_impossible(entropy: Tensor, logits: Tensor) -> Tensor:
    """NaN for each row with a logit at -inf, where `softmax(z) * z` is 0 * inf; ours adds 0 for such a column."""
    if not _strict:
        return entropy
    impossible = logits.detach().amin(-1) == -torch.inf
    return entropy * torch.where(impossible, torch.nan, 1.0).to(entropy.dtype)


@functools.cache
def flash_attn_cross_entropy() -> bool:
    """Whether flash-attn's Triton cross entropy can be imported, by which trainers choose their dtype."""
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss  # noqa: F401
    except ImportError:
        return False
    return True
