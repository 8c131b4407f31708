"""The clipped value loss in Triton: padded and packed, against float64 with eager as the yardstick."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_value
from ppo_fast.records import ValueLoss

REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
LENGTHS = [3, 0, 1500, 1]  # an empty sequence, and one longer than a tile


def padded(offset: float = 0.0) -> dict[str, Tensor]:
    """A hole in the long row, a row of nothing; NaN where the mask is 0."""
    mask = torch.arange(1600) < torch.tensor(LENGTHS).unsqueeze(1)
    mask[2, 700:720] = False
    old = torch.randn(4, 1600) + offset
    tensors = {
        "values": old + 0.3 * torch.randn(4, 1600),
        "old_values": old,
        "returns": torch.randn(4, 1600) + offset,
    }
    return {**{name: x.masked_fill(~mask, torch.nan) for name, x in tensors.items()}, "mask": mask}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def run(tensors: dict[str, Tensor], impl: str, **options: Any) -> tuple[ValueLoss, Tensor]:
    values = tensors["values"].detach().clone().requires_grad_()
    out = ppo_fast.value_loss(**{**tensors, "values": values}, impl=impl, **options)
    return out, torch.autograd.grad(out.loss, values, torch.tensor(-1.5, dtype=out.loss.dtype))[0]


def assert_parity(no_worse: Callable[..., None], tensors: dict[str, Tensor], **options: Any) -> None:
    fused, eager = (run(tensors, impl, **options) for impl in ("triton", "reference"))
    truth = run(cast(tensors, torch.float64), "reference", **options)
    # A bfloat16 gradient is cut off in the interpreter where it is rounded on a GPU.
    slack = 1e-6 if fused[1].dtype == torch.float32 else torch.finfo(fused[1].dtype).eps
    no_worse(fused[1], eager[1], truth[1], "gradient", slack)
    no_worse(*(out.loss.detach() for out, _ in (fused, eager, truth)), "loss", 1e-6)
    assert fused[0].stats.keys() == truth[0].stats.keys()
    for name in truth[0].stats:
        no_worse(*(out.stats[name] for out, _ in (fused, eager, truth)), name, 1e-6)


@pytest.mark.parametrize("normalizer", [None, 3.5, "tensor"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("poisoned_empty")
def test_reductions(reduction: str, normalizer: float | str | None, no_worse: Callable[..., None]) -> None:
    divisor = torch.tensor(7) if normalizer == "tensor" else normalizer
    assert_parity(no_worse, padded(), reduction=reduction, normalizer=divisor)


@pytest.mark.parametrize("clip", [None, 0.01, 5.0])
def test_clips(clip: float | None, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, padded(), clip=clip)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype: torch.dtype, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, cast(padded(), dtype))


def test_explained_variance_survives_a_large_offset() -> None:
    """Values near 2^12: sums of squares would leave nothing of a variance of 1."""
    tensors = padded(2.0**12)
    got = run(tensors, "triton")[0].stats["explained_variance"]
    truth = run(cast(tensors, torch.float64), "reference")[0].stats["explained_variance"]
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=1e-5)


def test_strided_inputs(no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, {name: x[:, ::2] for name, x in padded().items()})
    assert_parity(no_worse, {name: x.T for name, x in padded().items()})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_gives_the_bits_of_padded(reduction: str) -> None:
    tensors = padded()
    inside = torch.arange(1600) < torch.tensor(LENGTHS).unsqueeze(1)
    packed = {name: x[inside] for name, x in tensors.items()}
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    a = run(tensors, "triton", reduction=reduction)
    b = run(packed, "triton", reduction=reduction, cu_seqlens=cu_seqlens)
    assert torch.equal(a[0].loss, b[0].loss)
    assert torch.equal(a[1][inside], b[1])
    assert all(torch.equal(a[0].stats[name], b[0].stats[name]) for name in a[0].stats)


def test_literal() -> None:
    """v = 0.5 from 0, c = 0.25, R = 1 and 0: errors max(.25, .5625) clipped away, and max(.25, .0625) kept."""
    values = torch.tensor([[0.5, 0.5]], requires_grad=True)
    returns, old = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    out = ppo_fast.value_loss(values, old, returns, torch.ones(1, 2), clip=0.25, impl="triton")
    out.loss.backward()
    assert out.loss.item() == 0.5 * (0.5625 + 0.25) / 2
    assert values.grad.tolist() == [[0.0, 0.25]]
    assert out.stats["clip_fraction"].item() == 0.5


def test_at_its_bound_a_clip_passes_the_gradient() -> None:
    values = torch.tensor([[0.25, -0.25]], requires_grad=True)
    old = torch.zeros(1, 2)
    out = ppo_fast.value_loss(values, old, old + 1, torch.ones(1, 2), clip=0.25, impl="triton")
    out.loss.backward()
    assert values.grad.tolist() == [[-0.375, -0.625]]  # (v - 1) / 2


def test_an_empty_mask_and_returns_that_do_not_vary() -> None:
    tensors = padded()
    out, gradient = run({**tensors, "mask": torch.zeros(4, 1600)}, "triton")
    assert out.loss.item() == 0
    assert bool((gradient == 0).all())
    assert {value.item() for value in out.stats.values()} == {0.0}
    flat = {**tensors, "returns": torch.ones(4, 1600)}
    assert run(flat, "triton")[0].stats["explained_variance"].item() == 0.0


def test_operator_is_well_formed_and_compiles() -> None:
    values = torch.randn(2, 3, requires_grad=True)
    old, returns, mask = torch.randn(2, 3), torch.randn(2, 3), torch.ones(2, 3)
    arguments = (
        values,
        old,
        returns,
        mask,
        torch.tensor(0.2),
        torch.tensor(2.0),
        None,
        "seq-mean-token-mean",
    )
    torch.library.opcheck(fused_value.clipped_value_loss, arguments)

    def loss(clip: float) -> Tensor:
        return ppo_fast.value_loss(values, old, returns, mask, clip=clip, impl="triton").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for clip in (0.2, 0.3):
        assert torch.equal(compiled(clip), loss(clip))
