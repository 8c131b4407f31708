"""Exact KL in C++ and Triton against float64, with eager torch in the tested dtype as the yardstick."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_estimate, fused_kl

# numpy, under Triton's interpreter, warns of the very NaNs and infinities that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

IMPLS = ["triton"] if torch.cuda.is_available() else ["cpu", "triton"]
IMPL = "triton"  # the one under test
INTERPRETED = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu") == "cpu"
SHAPES = [
    ((1, 1), "a vocabulary of one: the KL is 0"),
    ((0, 5), "no rows"),
    ((64, 2), "narrower than a warp"),
    ((64, 127), "one short of a power of two: the tail"),
    ((8, 3, 4097), "one past a tile"),
    ((2, 50257), "GPT-2: odd, so rows start at every alignment"),
    ((1, 151936), "Qwen 2.5: many tiles"),
]


@pytest.fixture(autouse=True, params=IMPLS)
def _impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request.module, "IMPL", request.param)


def three_ways(
    logits: Tensor,
    ref: Tensor,
    temperature: float | Tensor = 1.0,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(KL, gradient, reference's gradient) by the kernel, by eager in the same dtype, and in float64."""
    grad = torch.randn(view(logits).shape[:-1])
    results = []
    for impl, dtype in ((IMPL, logits.dtype), ("reference", logits.dtype), ("reference", torch.float64)):
        x, r = (t.detach().to(dtype).requires_grad_() for t in (logits, ref))
        kl = ppo_fast.kl_from_logits(view(x), view(r), temperature=temperature, impl=impl)
        gradients = torch.autograd.grad(kl, (x, r), grad.to(kl.dtype))
        results.append((kl.detach(), *gradients))
    return results


def assert_parity(
    no_worse: Callable[..., None], results: list[tuple[Tensor, ...]], slack: float = 0.0
) -> None:
    # Over many rows the kernel is nearer than eager; of a few, which one wins is luck of roundings: one millionth.
    for name, *three in zip(("kl", "gradient", "reference's gradient"), *results, strict=True):
        no_worse(*three, name, 1e-6 + (slack if "gradient" in name else 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=[str(shape) for shape, _ in SHAPES])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.usefixtures("poisoned_empty")
def test_no_worse_than_eager(
    shape: tuple[int, ...], dtype: torch.dtype, temperature: float, no_worse: Callable[..., None]
) -> None:
    logits, ref = ((torch.randn(shape) * 4).to(dtype) for _ in range(2))
    # Triton's interpreter cuts a bfloat16 off where the hardware rounds it: one unit in the last place.
    cut_off = torch.finfo(dtype).eps if dtype == torch.bfloat16 and INTERPRETED else 0.0
    assert_parity(no_worse, three_ways(logits, ref, temperature), cut_off)


def test_near_equal_rows_do_not_cancel(no_worse: Callable[..., None]) -> None:
    """A policy after one small step: KL about 5e-7, of which sums of log-probabilities would leave noise."""
    logits = torch.randn(4, 5000) * 3
    results = three_ways(logits, logits + 1e-3 * torch.randn(4, 5000))
    assert_parity(no_worse, results)
    torch.testing.assert_close(results[0][0].double(), results[2][0], rtol=0, atol=3e-7)


def test_literal() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = .5 ln 2 + .5 ln(2/3); dx_0 = .5 (ln 2 - KL); dr = q - p."""
    logits = torch.zeros(1, 2, requires_grad=True)
    ref = torch.tensor([[1.0, 3.0]]).log().requires_grad_()
    kl = ppo_fast.kl_from_logits(logits, ref, impl=IMPL)
    kl.sum().backward()
    torch.testing.assert_close(kl.detach(), torch.tensor([0.14384104]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.27465307, -0.27465307]]))
    torch.testing.assert_close(ref.grad, torch.tensor([[-0.25, 0.25]]))


def test_temperature_of_each_row(no_worse: Callable[..., None]) -> None:
    logits, ref = torch.randn(2, 3, 67) * 4, torch.randn(2, 3, 67) * 4
    assert_parity(no_worse, three_ways(logits, ref, torch.rand(2, 3) + 0.5))


VIEWS = {
    "without the last token": lambda x: x[:, :-1],
    "rows swapped": lambda x: x.transpose(0, 1),
    "columns strided": lambda x: x[..., ::2],
    "one row for all": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides(view: Callable[[Tensor], Tensor], no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, three_ways(torch.randn(5, 6, 40), torch.randn(5, 6, 40), 1.3, view))


def test_rows_past_two_to_the_31_elements() -> None:
    stride, vocab = 2**30 + 8, 33
    far = torch.empty(2 * stride + vocab, dtype=torch.bfloat16).as_strided((3, vocab), (stride, 1))
    far.copy_(torch.randn(3, vocab))
    ref = torch.randn(3, vocab)
    for a, b in ((far, ref), (ref, far)):
        x, near = a.detach().requires_grad_(), a.contiguous().requires_grad_()
        kls = [ppo_fast.kl_from_logits(t, r, impl=IMPL) for t, r in ((x, b), (near, b.contiguous()))]
        assert torch.equal(*kls)
        assert torch.equal(*(torch.autograd.grad(k.sum(), t)[0] for k, t in zip(kls, (x, near), strict=True)))


@pytest.mark.parametrize("offset", [2.0**14, -(2.0**14), 2.0**20])
def test_common_offsets_cancel(offset: float) -> None:
    """Logits on a grid of 1/8 stay exact under these offsets, of either side, so nothing at all may change."""
    logits, ref = ((torch.randn(3, 200) * 8).round() / 8 for _ in range(2))
    plain = ppo_fast.kl_from_logits(logits, ref, temperature=0.5, impl=IMPL)
    assert torch.equal(plain, ppo_fast.kl_from_logits(logits + offset, ref, temperature=0.5, impl=IMPL))
    assert torch.equal(plain, ppo_fast.kl_from_logits(logits, ref - offset, temperature=0.5, impl=IMPL))


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("columns", [slice(0, 8200), slice(None, None, 3)], ids=["leading", "scattered"])
def test_columns_impossible_for_both_add_nothing(
    lowest: float, columns: slice, no_worse: Callable[..., None]
) -> None:
    """Longer than a tile, so that the first tile has no maximum; finfo.min is how some trainers write -inf."""
    logits, ref = torch.randn(2, 9000), torch.randn(2, 9000)
    logits[:, columns] = ref[:, columns] = lowest
    results = three_ways(logits, ref, 0.8)
    assert_parity(no_worse, results)
    assert bool((results[0][1][:, columns] == 0).all())
    assert bool((results[0][2][:, columns] == 0).all())


def test_impossible_for_the_policy_alone_adds_nothing(no_worse: Callable[..., None]) -> None:
    logits, ref = torch.randn(2, 9000), torch.randn(2, 9000)
    logits[:, 100:] = -torch.inf
    assert_parity(no_worse, three_ways(logits, ref))


@pytest.mark.parametrize("logit", [0.0, -300.0], ids=["likely", "underflowing"])
def test_impossible_for_the_reference_alone_is_infinite(logit: float) -> None:
    """In the first of two tiles, followed by a maximum so high that the first tile's weight underflows."""
    logits, ref = torch.randn(2, 9000), torch.randn(2, 9000)
    logits[0, 3], ref[0, 3] = logit, -torch.inf
    logits[:, 8999] = 200.0
    logits.requires_grad_()
    kl = ppo_fast.kl_from_logits(logits, ref, impl=IMPL)
    assert kl[0].item() == torch.inf
    assert bool(kl[1].isfinite())
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    assert gradient.isnan().any(-1).tolist() == [True, False]


def test_a_far_reference_costs_its_distance() -> None:
    """ref is 3000 nats lower in the column that the policy takes for sure: KL = 3000 up to rounding."""
    logits, ref = torch.tensor([[0.0, 3000.0]]), torch.tensor([[3000.0, 0.0]])
    torch.testing.assert_close(ppo_fast.kl_from_logits(logits, ref, impl=IMPL), torch.tensor([3000.0]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_broken_row_shows_and_stays_alone(bad: float, side: int) -> None:
    pair = [torch.randn(3, 5000), torch.randn(3, 5000)]
    pair[side][1, 17] = bad
    pair[0].requires_grad_()
    kl = ppo_fast.kl_from_logits(*pair, impl=IMPL)
    assert kl.isfinite().tolist() == [True, False, True]
    assert torch.autograd.grad(kl.sum(), pair[0])[0].isfinite().all(-1).tolist() == [True, False, True]


def test_one_gradient_alone_and_twice() -> None:
    logits, ref = torch.randn(3, 50), torch.randn(3, 50)
    x, r = logits.clone().requires_grad_(), ref.clone().requires_grad_()
    both = torch.autograd.grad(ppo_fast.kl_from_logits(x, r, impl=IMPL).sum(), (x, r))
    kl = ppo_fast.kl_from_logits(x, ref, impl=IMPL).sum()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(kl, x, retain_graph=True)[0], both[0])
    assert torch.equal(
        torch.autograd.grad(ppo_fast.kl_from_logits(logits, r, impl=IMPL).sum(), r)[0], both[1]
    )
    assert not ppo_fast.kl_from_logits(logits, ref, impl=IMPL).requires_grad


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, ref, grad = torch.randn(7, 5001), torch.randn(7, 5001), torch.randn(7)
    x = logits.clone().requires_grad_()
    whole = ppo_fast.kl_from_logits(x, ref, impl=IMPL)
    (gradient,) = torch.autograd.grad(whole, x, grad)
    for r in range(7):
        one = slice(r, r + 1)
        y = logits[one].clone().requires_grad_()
        alone = ppo_fast.kl_from_logits(y, ref[one].clone(), impl=IMPL)
        assert torch.equal(whole[one], alone)
        assert torch.equal(gradient[one], torch.autograd.grad(alone, y, grad[one])[0])


@pytest.mark.parametrize("learns", [(True, False), (False, True), (True, True)])
def test_operator_is_well_formed(learns: tuple[bool, bool]) -> None:
    logits, ref = (torch.randn(2, 3, 33).requires_grad_(wants) for wants in learns)
    for temperature in (torch.tensor(0.7), torch.rand(2, 3) + 0.5):
        numbers = temperature.to(fused_estimate.coefficient_dtype(IMPL))
        torch.library.opcheck(fused_kl.kl_rows, (logits, ref, numbers, IMPL))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the native kernel runs on the CPU")
def test_float64_and_dtypes_that_differ() -> None:
    """On a CPU alone: float64, and one that takes the other with it; two narrow dtypes meet in float32."""
    logits, ref = torch.randn(3, 2100), torch.randn(3, 2100)
    for one, other in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.float32),
    ):
        x, r = logits.to(one).requires_grad_(), ref.to(other).requires_grad_()
        got, truth = (
            ppo_fast.kl_from_logits(a, b, temperature=0.9, impl=impl)
            for a, b, impl in ((x, r, "cpu"), (x.double(), r.double(), "reference"))
        )
        wide = torch.float64 in (one, other)
        assert got.dtype == (torch.float64 if wide else torch.float32)
        torch.testing.assert_close(
            got.double(), truth, rtol=1e-12 if wide else 1e-5, atol=1e-12 if wide else 1e-5
        )
        for mine, exact in zip(*(torch.autograd.grad(k.sum(), (x, r)) for k in (got, truth)), strict=True):
            assert mine.dtype == exact.dtype
            torch.testing.assert_close(mine, exact, rtol=4 * torch.finfo(mine.dtype).eps, atol=1e-7)


def test_a_row_without_a_gradient_is_not_read() -> None:
    """Not its NaN, nor an infinite KL: zeros, where nothing comes down."""
    logits, ref = torch.randn(3, 50), torch.randn(3, 50)
    ref[1, 7] = -torch.inf
    x, r = logits.clone().requires_grad_(), ref.clone().requires_grad_()
    kl = ppo_fast.kl_from_logits(x, r, impl=IMPL)
    x.data[2] = torch.nan  # `.data`: behind autograd's back
    for gradient in torch.autograd.grad(kl, (x, r), torch.tensor([1.0, 0.0, 0.0])):
        assert bool((gradient[1:] == 0).all())
        assert bool(gradient[0].isfinite().all())


def test_a_reference_that_begins_with_a_tile_of_nothing(no_worse: Callable[..., None]) -> None:
    """Both impossible in the first tile, then the reference alone: infinite, whatever its first maximum was."""
    logits, ref = torch.randn(2, 9000), torch.randn(2, 9000)
    logits[:, :4096] = ref[:, :4096] = -torch.inf
    assert_parity(no_worse, three_ways(logits, ref))
    ref[0, :5000] = -torch.inf
    kl = ppo_fast.kl_from_logits(logits, ref, impl=IMPL)
    assert kl.isinf().tolist() == [True, False]


def test_more_rows_than_a_grid_once_had(monkeypatch: pytest.MonkeyPatch) -> None:
    if IMPL == "cpu":
        x = torch.randn(70_000, 3)
        assert ppo_fast.kl_from_logits(x, x + 1, impl="cpu").abs().max() < 1e-6
        return
    from ppo_fast.kernels import kl

    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda **_: None

    monkeypatch.setattr(kl, "kl_forward_kernel", Recorder())
    ppo_fast.kl_from_logits(torch.zeros(70_000, 3), torch.zeros(70_000, 3), impl="triton")
    assert grids == [(70_000,)]
