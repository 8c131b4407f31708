"""For the files of this folder, which only a child process of ../test_versions.py collects."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
Outcome = tuple[list[Tensor], list[Tensor]]


def outcome(
    function: Callable[..., object], inputs: list[Tensor], *args: object, **options: object
) -> Outcome:
    """Results and the gradients of `inputs`, each result weighted by its own numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves, *args, **options)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
    total = 0.0
    for result in results:
        if result.requires_grad:
            weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view_as(result)
            total = total + (result * weights).sum()
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
    return [x.detach() for x in results], [x.grad for x in leaves]


@pytest.fixture
def same() -> Callable[..., None]:
    """Assert that ours gives what theirs gives: dtype, shape, NaN, numbers, gradients.

    In half precision values must agree bit for bit, where `bits` is left on; a gradient is rounded once by us and at
    each step by them, so it may be off by what their steps lose.
    """

    def check(
        ours: Callable[..., object],
        theirs: Callable[..., object],
        inputs: list[Tensor],
        *args: object,
        bits: bool = True,
        tolerance: float = 1e-5,
        gradients: bool = True,
        **options: object,
    ) -> None:
        got, got_gradients = outcome(ours, inputs, *args, **options)
        want, want_gradients = outcome(theirs, inputs, *args, **options)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            if b.dtype in HALF and bits:
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                slack = max(tolerance, 4 * torch.finfo(b.dtype).eps if b.is_floating_point() else 0)
                torch.testing.assert_close(a, b, rtol=slack, atol=slack, equal_nan=True)
        for a, b in zip(got_gradients, want_gradients, strict=True) if gradients else ():
            assert (a is None) == (b is None)
            if b is not None:
                slack = 0.02 if b.dtype in HALF else tolerance
                torch.testing.assert_close(a, b, rtol=slack, atol=slack, equal_nan=True)

    return check


@pytest.fixture
def same_error() -> Callable[..., None]:
    """Assert that both raise, the same kind of error."""

    def check(
        ours: Callable[..., object], theirs: Callable[..., object], *args: object, **options: object
    ) -> None:
        with pytest.raises(Exception) as theirs_raised:  # noqa: PT011 - whatever theirs raises
            theirs(*args, **options)
        with pytest.raises(theirs_raised.type):
            ours(*args, **options)

    return check


@pytest.fixture
def outcome_of() -> Callable[..., Outcome]:
    """Results and gradients of a call."""
    return outcome


@pytest.fixture
def no_worse_than_theirs() -> Callable[..., None]:
    """Assert that ours is as near to the truth in float64 as theirs, gradients included."""

    def check(
        mine: Callable[..., tuple],
        original: Callable[..., tuple],
        truth: Callable[..., tuple],
        inputs: list[Tensor],
    ) -> None:
        got, want = outcome(mine, inputs), outcome(original, inputs)
        exact_results = outcome(truth, [x.double() for x in inputs])
        for a, b, exact in zip(*([*x[0], *x[1]] for x in (got, want, exact_results)), strict=True):
            assert (a is None) == (b is None)
            if a is None:
                continue
            assert a.dtype == b.dtype
            if a.dtype == torch.bool:
                assert torch.equal(a, b)
                continue
            rounding = 16 * torch.finfo(torch.float32).eps + torch.finfo(a.dtype).eps / 2
            floor = rounding * exact.abs().max().clamp(min=10)
            error, bound = ((x.double() - exact.double()).abs().max() for x in (a, b))
            assert error <= bound + floor, f"error {error:.3g}, theirs {bound:.3g}"

    return check
