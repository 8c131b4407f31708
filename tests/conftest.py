"""Runs before every test: the repository's root leaves sys.path, Triton goes to its interpreter, seeds are set."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The folder kernels/ at the root must never be importable as `kernels`, which transformers looks for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
# Where the kernels are tested: in Triton's interpreter, or on a GPU with PPO_FAST_TEST_DEVICE=cuda.
DEVICE = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when triton is first imported: before any other import of ours
    )

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    numpy.random.seed(0)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    """What a test makes without naming a device is on the one under test."""
    if DEVICE == "cpu":
        yield
        return
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """Assert that a result is as near to the float64 truth as eager torch in the tested dtype.

    The floor is two float32 roundings at the size of the truth: where eager happens to be exact, nothing else could
    pass; it is far below the error of a wrong formula.
    """

    def check(got: Tensor, eager: Tensor, truth: Tensor, name: str, slack: float = 0.0) -> None:
        assert got.shape == truth.shape, name
        assert got.dtype == eager.dtype, name
        if truth.numel() == 0:
            return
        floor = 2 * torch.finfo(torch.float32).eps * max(1.0, truth.abs().max().item())
        if got.dtype == torch.float64:
            floor = 1e-13 * max(1.0, truth.abs().max().item())
        error = (got.double() - truth).abs().max().item()
        bound = (eager.double() - truth).abs().max().item() + floor + slack * truth.abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, eager's with the floor {bound:.3g}"

    return check


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty returns with NaN, so that an element nobody wrote shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args: object, _original: Callable[..., Tensor] = original, **kwargs: object) -> Tensor:
            tensor = _original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)
