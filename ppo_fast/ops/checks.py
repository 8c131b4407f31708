"""Every check of what a caller passes in, in one place, before any work is done.

Shapes, dtypes, devices and coefficients are always checked. What only the values tell (a label outside the
vocabulary, a NaN under a true mask) would make a GPU wait for the host, so there it is checked on request.
"""

import math
import numbers
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_check_everything = False


def check_inputs(enabled: bool) -> bool:
    """Turn the checks that read values on everywhere, GPUs included, or back to the default.

    They are: labels inside the vocabulary, `cu_seqlens` and `score_index` sound, tensor coefficients in range
    (on CPU tensors these are always on), and no NaN or infinity under a true mask. On a GPU each one waits
    for the device, so this is for finding a fault, not for training.

    Returns:
        The previous setting.
    """
    global _check_everything
    if not isinstance(enabled, bool):
        raise TypeError(f"check_inputs: `enabled` is a {type(enabled).__name__}, expected a bool")
    previous, _check_everything = _check_everything, enabled
    return previous


def _readable(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be read: a traced tensor has none, a GPU's cost a wait."""
    return not torch.compiler.is_compiling() and (tensor.device.type == "cpu" or _check_everything)


class Checker:
    """Checks for one call of one op, anchored at its first tensor, whose device the others must share."""

    def __init__(self, op: str, name: str, anchor: Tensor, *, dims: int | None = None) -> None:
        self.op = op
        self.tensor(name, anchor)
        self.anchor_name, self.device = name, anchor.device
        self.floats(anchor.shape, "", **{name: anchor})
        if dims is not None and anchor.dim() != dims:
            self.fail(name, f"has shape {tuple(anchor.shape)}", f"{dims} dimensions")
        if anchor.dim() == 0 and dims is None:
            self.fail(name, "has no dimensions", "at least one")

    def fail(self, name: str, got: str, expected: str, error: type[Exception] = ValueError) -> NoReturn:
        """Raise: which op, which argument, what came, what was expected."""
        raise error(f"{self.op}: `{name}` {got}, expected {expected}")

    def tensor(self, name: str, value: object) -> None:
        """`value` is a tensor, whatever its shape."""
        if not isinstance(value, Tensor):
            self.fail(name, f"is a {type(value).__name__}", "a torch.Tensor", TypeError)

    def _placed(self, name: str, value: Tensor, shape: Sequence[int], why: str) -> None:
        """`value` is a tensor of `shape` on the anchor's device."""
        self.tensor(name, value)
        if tuple(value.shape) != tuple(shape):
            self.fail(name, f"has shape {tuple(value.shape)}", f"{tuple(shape)}{why and f' ({why})'}")
        if value.device != self.device:
            self.fail(name, f"is on {value.device}", f"{self.device}, where `{self.anchor_name}` is")

    def floats(self, shape: Sequence[int], why: str, **tensors: Tensor) -> None:
        """Each tensor is real floating, of `shape`."""
        for name, value in tensors.items():
            self._placed(name, value, shape, why)
            if not value.is_floating_point():
                self.fail(name, f"has dtype {value.dtype}", "a floating dtype", TypeError)

    def vocabulary(self, logits: Tensor) -> int:
        """The last axis of `logits` holds at least one token; returns V."""
        if logits.shape[-1] == 0:
            self.fail("logits", f"has shape {tuple(logits.shape)}", "a vocabulary of at least 1")
        return logits.shape[-1]

    def optional_floats(self, shape: Sequence[int], why: str, **tensors: Tensor | None) -> None:
        """Each tensor that is not None is real floating, of `shape`."""
        self.floats(shape, why, **{name: value for name, value in tensors.items() if value is not None})

    def mask(self, mask: Tensor, shape: Sequence[int], why: str) -> None:
        """`mask` is bool or numeric, of `shape`."""
        self._placed("mask", mask, shape, why)
        if mask.is_complex():
            self.fail("mask", f"has dtype {mask.dtype}", "bool or a real number", TypeError)

    def number(
        self,
        name: str,
        value: object,
        *,
        above: float | None = None,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """`value` is a finite real number inside the stated bounds."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
            self.fail(name, f"is a {type(value).__name__}", "a number", TypeError)
        number = float(value)
        if not -math.inf < number < math.inf:  # torch.compile traces this, math.isfinite not
            self.fail(name, f"is {value}", "a finite number")
        if above is not None and not number > above:
            self.fail(name, f"is {value}", f"a number above {above}")
        if at_least is not None and number < at_least:
            self.fail(name, f"is {value}", f"at least {at_least}")
        if at_most is not None and number > at_most:
            self.fail(name, f"is {value}", f"at most {at_most}")

    def optional_number(self, name: str, value: object, *, above: float = 0.0) -> None:
        """`value` is None or a finite number above the bound."""
        if value is not None:
            self.number(name, value, above=above)

    def optional_count(self, name: str, value: object) -> None:
        """`value` is None or a whole number of at least 1."""
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            self.fail(name, f"is a {type(value).__name__}", "a whole number or None", TypeError)
        if value < 1:
            self.fail(name, f"is {value}", "at least 1")

    def optional_flag(self, name: str, value: object) -> None:
        """`value` is None or a bool."""
        if value is not None:
            self.flag(name, value)

    def flag(self, name: str, value: object) -> None:
        """`value` is a bool."""
        if not isinstance(value, bool):
            self.fail(name, f"is a {type(value).__name__}", "a bool", TypeError)

    def group(self, group: object) -> None:
        """None or a process group."""
        if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
            expected = "a torch.distributed.ProcessGroup or None"
            self.fail("group", f"is a {type(group).__name__}", expected, TypeError)

    def choice(self, name: str, value: object, options: Sequence[str]) -> None:
        """`value` is one of the named options."""
        if value not in options:
            self.fail(name, f"is {value!r}", f"one of {', '.join(options)}")

    def temperature(self, value: float | Tensor, shape: Sequence[int], mask: Tensor | None = None) -> None:
        """A positive finite number, or a floating tensor of `shape`, positive where the mask counts."""
        if not isinstance(value, Tensor):
            self.number("temperature", value, above=0.0)
            return
        self.floats(shape, "one for each row of logits", temperature=value)
        if _readable(value):
            good = torch.isfinite(value) & (value > 0)
            self._all(
                "temperature", good if mask is None else good | (mask == 0), value, "above 0 and finite"
            )

    def discount(self, name: str, value: float | Tensor, batch: int) -> None:
        """A number in [0, 1], or a floating tensor [batch] of them."""
        if not isinstance(value, Tensor):
            self.number(name, value, at_least=0.0, at_most=1.0)
            return
        self.floats((batch,), "one for each sequence", **{name: value})
        if _readable(value):
            self._all(name, (value >= 0) & (value <= 1), value, "between 0 and 1")

    def normalizer(self, value: float | Tensor | None) -> None:
        """None, a number above 0, or a 0-d tensor (whose value is the caller's word)."""
        if isinstance(value, Tensor):
            self._placed("normalizer", value, (), "a 0-d tensor")
            if value.is_complex() or value.dtype == torch.bool:
                self.fail("normalizer", f"has dtype {value.dtype}", "a real number", TypeError)
            if _check_everything and _readable(value):
                self._all("normalizer", torch.isfinite(value) & (value > 0), value, "above 0 and finite")
        else:
            self.optional_number("normalizer", value)

    def labels(
        self, labels: Tensor, shape: Sequence[int], why: str, vocab: int | None, mask: Tensor | None = None
    ) -> None:
        """int64 of `shape`; inside [0, vocab), if that is known, where the mask counts, if values may be read."""
        self._placed("labels", labels, shape, why)
        if labels.dtype != torch.int64:
            self.fail("labels", f"has dtype {labels.dtype}", "torch.int64", TypeError)
        if vocab is not None and _readable(labels):
            if mask is None and labels.numel() > 0:  # a quarter of the time of the comparison below
                least, most = labels.aminmax()
                if least >= 0 and most < vocab:
                    return
            good = (labels >= 0) & (labels < vocab)
            self._all("labels", good if mask is None else good | (mask == 0), labels, f"in [0, {vocab})")

    def score_index(self, index: Tensor | None, mask: Tensor, cu_seqlens: Tensor | None, batch: int) -> None:
        """None, or int64 [batch], each a counted slot of its sequence unless the sequence has none."""
        if index is None:
            return
        self._placed("score_index", index, (batch,), "one for each sequence")
        if index.dtype != torch.int64:
            self.fail("score_index", f"has dtype {index.dtype}", "torch.int64", TypeError)
        if not _readable(index) or mask.numel() == 0:
            return
        counted = (mask != 0).flatten()
        width = mask.shape[-1]
        bounds = (
            torch.arange(batch + 1, device=mask.device) * width if cu_seqlens is None else cu_seqlens.long()
        )
        starts, sizes = bounds[:-1], bounds.diff()
        inside = (index >= 0) & (index < sizes)
        pays = counted[torch.where(inside, starts + index, 0)]
        so_far = torch.nn.functional.pad(counted.cumsum(0), (1, 0))
        good = (inside & pays) | (so_far[bounds[1:]] == so_far[starts])
        self._all("score_index", good, index, "a slot that the mask of its sequence counts")

    def cu_seqlens(self, cu_seqlens: Tensor, total: int) -> int:
        """Integers [B + 1] that rise from 0 to `total`; returns B."""
        self.tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            self.fail("cu_seqlens", f"has shape {tuple(cu_seqlens.shape)}", "[B + 1] with B of at least 1")
        self._placed("cu_seqlens", cu_seqlens, cu_seqlens.shape, "")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            self.fail("cu_seqlens", f"has dtype {cu_seqlens.dtype}", "torch.int32 or torch.int64", TypeError)
        if _readable(cu_seqlens):
            ends = cu_seqlens.tolist()
            if ends[0] != 0 or ends[-1] != total or sorted(ends) != ends:
                self.fail("cu_seqlens", f"is {ends}", f"values that rise from 0 to {total}")
        return len(cu_seqlens) - 1

    def finite(self, mask: Tensor | None, **tensors: Tensor | None) -> None:
        """On request: no NaN or infinity, where the mask counts if there is one."""
        for name, value in tensors.items():
            if value is not None and _check_everything and _readable(value):
                good = torch.isfinite(value)
                self._all(name, good if mask is None else good | (mask == 0), value, "a finite number")

    def logits(self, mask: Tensor | None, **tensors: Tensor | None) -> None:
        """On request: no NaN or +inf in the rows that count; -inf marks an impossible token."""
        for name, value in tensors.items():
            if value is not None and _check_everything and _readable(value):
                good = value < torch.inf
                good = good if mask is None else good | (mask == 0).unsqueeze(-1)
                self._all(name, good, value, "a number below infinity")

    def _all(self, name: str, good: Tensor, value: Tensor, expected: str) -> None:
        """Every element of `good` holds; else name the first offender and where it stands."""
        if bool(good.all()):
            return
        where = tuple((~good).nonzero()[0].tolist())
        at = f" at {where[0] if len(where) == 1 else where}" if where else ""
        self.fail(name, f"holds {value[where].item()}{at}", expected)


def tokens(op: str, name: str, anchor: Tensor, cu_seqlens: Tensor | None) -> tuple[Checker, int]:
    """Open the checks of a token-space op: its anchor is [B, T], or [total] with `cu_seqlens`; returns B."""
    check = Checker(op, name, anchor)
    if cu_seqlens is None:
        if anchor.dim() != 2:
            check.fail(
                name, f"has shape {tuple(anchor.shape)}", "[B, T] (or packed [total] with `cu_seqlens`)"
            )
        return check, anchor.shape[0]
    if anchor.dim() != 1:
        check.fail(name, f"has shape {tuple(anchor.shape)}", "packed [total], since `cu_seqlens` is given")
    return check, check.cu_seqlens(cu_seqlens, anchor.shape[0])
