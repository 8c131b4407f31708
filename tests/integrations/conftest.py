"""The real trainers, with stand-ins for the machinery round their numerics that is not installed."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ppo_fast

from .stand_ins import OPENRLHF, VERL, stand_ins


def required(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: `make test` and `make integration` install it")


@pytest.fixture(scope="session")
def verl() -> SimpleNamespace:
    """verl's modules."""
    required("verl")
    with stand_ins(**VERL):
        return SimpleNamespace(
            functional=importlib.import_module("verl.utils.torch_functional"),
            algos=importlib.import_module("verl.trainer.ppo.core_algos"),
            fused=importlib.import_module("verl.utils.experimental.torch_functional"),
            kernel=importlib.import_module("verl.utils.kernel.linear_cross_entropy"),
            config=importlib.import_module("verl.workers.config"),
        )


@pytest.fixture(scope="session")
def openrlhf() -> SimpleNamespace:
    """OpenRLHF's modules."""
    required("openrlhf")
    with stand_ins(**OPENRLHF):
        return SimpleNamespace(
            utils=importlib.import_module("openrlhf.models.utils"),
            loss=importlib.import_module("openrlhf.models.loss"),
            maker=importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker"),
        )


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    ppo_fast.unpatch()


def masks() -> dict[str, Tensor]:
    """[3, 7] each; 1 = the token counts."""
    rows = {
        "full": [[1] * 7] * 3,
        "padded": [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]],
        "holes": [[0, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 1, 0]],
        "an_empty_row": [[1, 1, 0, 1, 0, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 1]],
        "empty": [[0] * 7] * 3,
    }
    return {name: torch.tensor(row) for name, row in rows.items()}


MASKS = list(masks())
MASK_DTYPES = {"bool": torch.bool, "int64": torch.int64, "float32": torch.float32}


@pytest.fixture
def batch() -> Callable[..., list[Tensor]]:
    """`count` tensors [3, 7] whose masked slots hold garbage, in `dtype`."""

    def make(
        count: int, mask: Tensor, dtype: torch.dtype = torch.float32, garbage: float = 1e4
    ) -> list[Tensor]:
        tensors = torch.randn(count, *mask.shape, dtype=torch.float64)
        return [torch.where(mask != 0, x, garbage * x).to(dtype) for x in tensors]

    return make


@contextmanager
def autocast_on_a_gpu() -> Iterator[tuple[Tensor, Tensor]]:
    """Autocast of CUDA, and logits [2, 3, 5] in bfloat16 with labels there: without values, so without a GPU."""
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            logits = torch.empty(2, 3, 5, device="cuda", dtype=torch.bfloat16)
            yield logits, torch.empty(2, 3, device="cuda", dtype=torch.int64)
    finally:
        torch.set_autocast_enabled("cuda", False)


Call = Callable[..., object]


def outcome(call: Call, moving: int, *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What `call` returns, flattened, and the gradients of its first `moving` inputs under fixed upstream ones."""
    leaves = [x.detach().clone().requires_grad_(i < moving) for i, x in enumerate(inputs)]
    result = call(*leaves)
    results = list(result) if isinstance(result, tuple) else [result]
    results = [torch.as_tensor(list(x.values())) if isinstance(x, dict) else x for x in results]
    results = [x for x in results if x is not None]
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in results]
    live = [(x, w.to(x.dtype)) for x, w in zip(results, weights, strict=True) if x.requires_grad]
    if not live or not moving:
        return [x.detach() for x in results], []
    sum((x * w).sum() for x, w in live).backward()
    return [x.detach() for x in results], [x.grad for x in leaves[:moving]]


@pytest.fixture
def same() -> Callable[..., None]:
    """Assert that our function and the original agree: values, dtypes, NaN, gradients."""

    def check(
        ours: Call, theirs: Call, *inputs: Tensor, moving: int = 1, rtol: float = 2e-5, atol: float = 2e-6
    ) -> None:
        got, expected = (outcome(call, moving, *inputs) for call in (ours, theirs))
        for kind, ones, others in zip(("result", "gradient"), got, expected, strict=True):
            assert len(ones) == len(others), kind
            for i, (one, other) in enumerate(zip(ones, others, strict=True)):
                torch.testing.assert_close(
                    one,
                    other,
                    rtol=rtol,
                    atol=atol,
                    equal_nan=True,
                    msg=lambda m, i=i, k=kind: f"{k} {i}: {m}",
                )

    return check


@pytest.fixture
def no_worse_than_theirs(no_worse: Callable[..., None]) -> Callable[..., None]:
    """In half precision: our error against the float64 truth may not exceed that of the original."""

    def check(ours: Call, theirs: Call, *inputs: Tensor, moving: int = 1) -> None:
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        runs = [
            outcome(ours, moving, *inputs),
            outcome(theirs, moving, *inputs),
            outcome(theirs, moving, *wide),
        ]
        for kind, got, eager, truth in zip(("result", "gradient"), *runs, strict=True):
            for i, (one, other, true) in enumerate(zip(got, eager, truth, strict=True)):
                # One rounding to the half dtype: theirs may be exact by luck.
                slack = torch.finfo(one.dtype).eps / 2
                no_worse(one, other, true.double(), f"{kind} {i}", slack=slack)

    return check
