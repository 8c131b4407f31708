"""The clipped value loss, C++ and Triton: padded and packed, against float64 with eager as the yardstick."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_value
from ppo_fast.records import ValueLoss

CPU = [] if torch.cuda.is_available() else ["cpu"]
IMPLS = [*CPU, "triton"]
REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
WELL_FORMED = [("cpu", torch.float32), ("cpu", torch.float64), ("triton", torch.float32)]
native = pytest.mark.skipif(not CPU, reason="the native kernels run on the CPU")
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


def assert_parity(
    no_worse: Callable[..., None], tensors: dict[str, Tensor], impl: str, **options: Any
) -> None:
    fused, eager = (run(tensors, name, **options) for name in (impl, "reference"))
    truth = run(cast(tensors, torch.float64), "reference", **options)
    # A bfloat16 gradient is cut off in the interpreter where it is rounded on a GPU.
    cut_off = impl == "triton" and fused[1].dtype != torch.float32
    slack = torch.finfo(fused[1].dtype).eps if cut_off else 1e-6
    no_worse(fused[1], eager[1], truth[1], "gradient", slack)
    no_worse(*(out.loss.detach() for out, _ in (fused, eager, truth)), "loss", 1e-6)
    assert fused[0].stats.keys() == truth[0].stats.keys()
    for name in truth[0].stats:
        no_worse(*(out.stats[name] for out, _ in (fused, eager, truth)), name, 1e-6)


@pytest.mark.parametrize("normalizer", [None, 3.5, "tensor"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLS)
def test_reductions(
    impl: str, reduction: str, normalizer: float | str | None, no_worse: Callable[..., None]
) -> None:
    divisor = torch.tensor(7) if normalizer == "tensor" else normalizer
    assert_parity(no_worse, padded(), impl, reduction=reduction, normalizer=divisor)


@pytest.mark.parametrize("clip", [None, 0.01, 5.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_clips(impl: str, clip: float | None, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, padded(), impl, clip=clip)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_half_inputs(impl: str, dtype: torch.dtype, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, cast(padded(), dtype), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_explained_variance_survives_a_large_offset(impl: str) -> None:
    """Values near 2^12: sums of squares would leave nothing of a variance of 1."""
    tensors = padded(2.0**12)
    got = run(tensors, impl)[0].stats["explained_variance"]
    truth = run(cast(tensors, torch.float64), "reference")[0].stats["explained_variance"]
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, {name: x[:, ::2] for name, x in padded().items()}, impl)
    assert_parity(no_worse, {name: x.T for name, x in padded().items()}, impl)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_packed_gives_the_bits_of_padded(impl: str, reduction: str) -> None:
    tensors = padded()
    inside = torch.arange(1600) < torch.tensor(LENGTHS).unsqueeze(1)
    packed = {name: x[inside] for name, x in tensors.items()}
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    a = run(tensors, impl, reduction=reduction)
    b = run(packed, impl, reduction=reduction, cu_seqlens=cu_seqlens)
    assert torch.equal(a[0].loss, b[0].loss)
    assert torch.equal(a[1][inside], b[1])
    assert all(torch.equal(a[0].stats[name], b[0].stats[name]) for name in a[0].stats)


@pytest.mark.parametrize("impl", IMPLS)
def test_literal(impl: str) -> None:
    """v = 0.5 from 0, c = 0.25, R = 1 and 0: errors max(.25, .5625) clipped away, and max(.25, .0625) kept."""
    values = torch.tensor([[0.5, 0.5]], requires_grad=True)
    returns, old = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    out = ppo_fast.value_loss(values, old, returns, torch.ones(1, 2), clip=0.25, impl=impl)
    out.loss.backward()
    assert out.loss.item() == 0.5 * (0.5625 + 0.25) / 2
    assert values.grad.tolist() == [[0.0, 0.25]]
    assert out.stats["clip_fraction"].item() == 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_at_its_bound_a_clip_passes_the_gradient(impl: str) -> None:
    values = torch.tensor([[0.25, -0.25]], requires_grad=True)
    old = torch.zeros(1, 2)
    out = ppo_fast.value_loss(values, old, old + 1, torch.ones(1, 2), clip=0.25, impl=impl)
    out.loss.backward()
    assert values.grad.tolist() == [[-0.375, -0.625]]  # (v - 1) / 2


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tie_of_the_errors_outside_of_the_clip_halves_the_gradient(impl: str) -> None:
    """v = 0.5 clipped to 0.25 and R half way between: of (v - R) = 0.125 one half."""
    values = torch.tensor([[0.5]], requires_grad=True)
    returns, old = torch.tensor([[0.375]]), torch.zeros(1, 1)
    out = ppo_fast.value_loss(values, old, returns, torch.ones(1, 1), clip=0.25, impl=impl)
    out.loss.backward()
    assert values.grad.item() == 0.0625
    assert out.stats["clip_fraction"].item() == 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_mask_and_returns_that_do_not_vary(impl: str) -> None:
    tensors = padded()
    out, gradient = run({**tensors, "mask": torch.zeros(4, 1600)}, impl)
    assert out.loss.item() == 0
    assert bool((gradient == 0).all())
    assert {value.item() for value in out.stats.values()} == {0.0}
    flat = {**tensors, "returns": torch.ones(4, 1600)}
    assert run(flat, impl)[0].stats["explained_variance"].item() == 0.0


@native
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64(reduction: str, no_worse: Callable[..., None]) -> None:
    tensors = cast(padded(), torch.float64)
    got, truth = (run(tensors, impl, reduction=reduction) for impl in ("cpu", "reference"))
    no_worse(got[1], truth[1], truth[1], "gradient")
    no_worse(got[0].loss.detach(), truth[0].loss, truth[0].loss, "loss")
    for name, value in truth[0].stats.items():
        no_worse(got[0].stats[name], value, value, name)


@native
def test_each_tensor_may_have_its_own_dtype(no_worse: Callable[..., None]) -> None:
    tensors = padded()
    tensors |= {"values": tensors["values"].bfloat16(), "returns": tensors["returns"].half()}
    assert_parity(no_worse, tensors, "cpu")
    got, gradient = run(tensors | {"old_values": tensors["old_values"].double()}, "cpu")
    truth, _ = run(cast(tensors, torch.float64), "reference")
    assert got.loss.dtype == got.stats["value_mean"].dtype == torch.float64
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(got.loss, truth.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("garbage", [torch.inf, -torch.inf, 1e30, 0.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_false_mask_covers_changes_no_bit(impl: str, garbage: float) -> None:
    """A NaN elsewhere in this file; here what would not show by itself."""
    tensors = padded()
    other = {k: x if k == "mask" else x.masked_fill(~tensors["mask"], garbage) for k, x in tensors.items()}
    a, b = run(tensors, impl), run(other, impl)
    assert torch.equal(a[0].loss, b[0].loss)
    assert torch.equal(a[1], b[1])
    assert all(torch.equal(a[0].stats[name], b[0].stats[name]) for name in a[0].stats)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_weight_does_not_reach_a_masked_gradient(impl: str) -> None:
    tensors = padded()
    _, gradient = run(tensors, impl, normalizer=torch.tensor(0.0))
    assert bool((gradient[~tensors["mask"]] == 0).all())
    assert not gradient[tensors["mask"]].isfinite().all()


@native
def test_returns_that_do_not_vary_explain_nothing_in_float64_too() -> None:
    """0.1 three times over: a mean of rounded sums would leave a spread of 1e-34 to divide by."""
    tensors = cast(padded(), torch.float64)
    tensors["returns"] = torch.full((4, 1600), 0.1, dtype=torch.float64)
    assert run(tensors, "cpu")[0].stats["explained_variance"].item() == 0.0


@native
def test_a_return_that_is_not_finite_shows() -> None:
    """Also in the mean over tiles of which the others are finite."""
    tensors = padded()
    tensors["returns"][2, 5] = torch.inf
    got, expected = (run(tensors, impl)[0] for impl in ("cpu", "reference"))
    assert got.loss.isinf()
    assert got.stats["return_mean"].isinf()
    for name in ("explained_variance", "value_mean", "clip_fraction"):
        torch.testing.assert_close(got.stats[name], expected.stats[name])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl: str, shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    out, gradient = run({"values": x, "old_values": x, "returns": x, "mask": x}, impl)
    assert out.loss.item() == 0
    assert gradient.shape == shape
    assert {value.item() for value in out.stats.values()} == {0.0}


@pytest.mark.parametrize(("impl", "dtype"), CPU and WELL_FORMED)
def test_operators_are_well_formed(impl: str, dtype: torch.dtype) -> None:
    values, old, returns = torch.randn(3, 2, 3).unbind()
    returns = returns.to(dtype)
    numbers = torch.tensor([0.2, 2.0], dtype=torch.float64 if impl == "cpu" else torch.float32).unbind()
    tokens = (values.requires_grad_(), old, returns, torch.ones(2, 3), numbers[0])
    arguments = (*tokens, numbers[1], None, "seq-mean-token-mean", impl)
    torch.library.opcheck(fused_value.clipped_value_loss, arguments)
    kept = [x.detach() for x in fused_value.clipped_value_loss(*arguments)[-2:]]
    backward = (torch.tensor(0.5), values.detach(), *tokens[1:], None, *kept, "seq-mean-token-mean", impl)
    torch.library.opcheck(fused_value.clipped_value_loss_backward, backward)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["values", "old_values", "returns"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_broken_number_shows(impl: str, name: str, bad: float) -> None:
    """In the loss, and in its own gradient; without a clip the old values are not looked at."""
    tensors = {k: torch.randn(2, 5) for k in ("values", "old_values", "returns")} | {"mask": torch.ones(2, 5)}
    tensors[name][1, 2] = bad
    for clip in (0.2, None):
        got, truth = run(tensors, impl, clip=clip), run(cast(tensors, torch.float64), "reference", clip=clip)
        torch.testing.assert_close(got[0].loss.double(), truth[0].loss, equal_nan=True)
        others = torch.ones(2, 5, dtype=torch.bool)
        others[1, 2] = False
        torch.testing.assert_close(got[1][others].double(), truth[1][others])
        ignored = clip is None and name == "old_values"
        assert bool(got[0].loss.isfinite()) == ignored
        if ignored:
            torch.testing.assert_close(got[1].double(), truth[1])
        elif bad != bad:
            assert bool(got[1][1, 2].isnan())
