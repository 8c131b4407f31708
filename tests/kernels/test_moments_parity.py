"""Masked moments, C++ and Triton, against float64 with eager torch in the tested dtype as the yardstick."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast

# numpy, under Triton's interpreter, warns of the very NaNs and infinities that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

CPU = [] if torch.cuda.is_available() else ["cpu"]
IMPLS = [*CPU, "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((1,), "one element: no variance"),
    ((3, 127), "one short of a power of two: the tail"),
    ((2, 3, 257), "three axes, of which the first leaves many columns"),
    ((5, 1025), "more than two tiles in all, one past a tile of columns"),
]
OPS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"mean over {axis}": ("masked_mean", {"axis": axis}) for axis in (None, 0, -1)},
    **{
        f"{'unbiased ' if unbiased else ''}var over {axis}": (
            "masked_var",
            {"axis": axis, "unbiased": unbiased},
        )
        for axis in (None, 0, -1)
        for unbiased in (False, True)
    },
    **{
        f"{'unbiased ' if unbiased else ''}{op}": (op, {"unbiased": unbiased})
        for op in ("masked_whiten", "masked_rescale")
        for unbiased in (False, True)
    },
}
OVER_ALL = [name for name, (_, options) in OPS.items() if options.get("axis") is None]

native = pytest.mark.skipif(not CPU, reason="the native kernels run on the CPU")
every_op = pytest.mark.parametrize("op", OPS)
every_op_over_all = pytest.mark.parametrize("op", OVER_ALL)


@dataclass(frozen=True)
class Result:
    value: Tensor
    gradient: Tensor


def call(op: str, x: Tensor, mask: Tensor, impl: str) -> Tensor:
    name, options = OPS[op]
    return getattr(ppo_fast, name)(x, mask, **options, impl=impl)


def upstream(op: str, x: Tensor) -> Tensor:
    """Not uniform, and not centred: a mean of gradients that is dropped must show."""
    shape = call(op, torch.zeros(x.shape), torch.ones(x.shape), "reference").shape
    return torch.randn(shape) + 0.5


def run(
    op: str,
    x: Tensor,
    mask: Tensor,
    grad: Tensor,
    impl: str,
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> Result:
    x = x.detach().requires_grad_()
    value = call(op, view(x), mask, impl)
    (gradient,) = torch.autograd.grad(value, x, grad.to(value.dtype))
    return Result(value.detach(), gradient)


def three_ways(op: str, x: Tensor, mask: Tensor, impl: str, **more: Any) -> tuple[Result, Result, Result]:
    """(`impl`, eager in the same dtype, float64)."""
    grad = upstream(op, more.get("view", lambda x: x)(x))
    return (
        run(op, x, mask, grad, impl, **more),
        run(op, x, mask, grad, "reference", **more),
        run(op, x.double(), mask, grad, "reference", **more),
    )


def assert_parity(no_worse: Callable[..., None], results: tuple[Result, Result, Result]) -> None:
    # Triton's interpreter cuts a bfloat16 off where the hardware rounds it: up to a whole unit in the last place is
    # lost, and with few distinct values eager's own error need not reach the half that rounding loses.
    dtype = results[0].gradient.dtype
    cut_off = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    no_worse(*(result.value for result in results), "value")
    no_worse(*(result.gradient for result in results), "gradient", cut_off)


def draw(*shape: int) -> tuple[Tensor, Tensor]:
    """Values off centre, and a mask with holes."""
    return torch.randn(shape) * 2 + 0.3, torch.rand(shape) > 0.3


@every_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=[str(shape) for shape, _ in SHAPES])
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLS)
def test_no_worse_than_eager(
    impl: str, op: str, dtype: torch.dtype, shape: tuple[int, ...], no_worse: Callable[..., None]
) -> None:
    x, mask = draw(*shape)
    assert_parity(no_worse, three_ways(op, x.to(dtype), mask, impl))


@pytest.mark.parametrize(
    ("op", "shape"),
    [*((op, (3, 7000)) for op in OVER_ALL), ("var over 0", (300, 3)), ("var over -1", (2, 5000))],
)
@pytest.mark.parametrize("most_chunks", [1024, 4, 1], ids=["many chunks", "few chunks", "one chunk"])
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLS)
def test_tiles_and_chunks_merge(
    impl: str,
    op: str,
    shape: tuple[int, int],
    most_chunks: int,
    no_worse: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ramp, so that tiles differ in mean; the first tile and a run across several in the middle do not count."""
    from ppo_fast.kernels import moments

    monkeypatch.setattr(moments, "MOST_CHUNKS", most_chunks)
    x, mask = draw(*shape)
    long = shape.index(max(shape))
    ramp = torch.linspace(0, 20, shape[long])
    x += ramp if long == 1 else ramp[:, None]
    flat = mask.view(-1) if op in OVER_ALL else mask.transpose(0, long)
    flat[: len(flat) // 8] = False
    flat[len(flat) // 3 : 2 * len(flat) // 3] = False
    x[~mask] = torch.nan
    assert_parity(no_worse, three_ways(op, x, mask, impl))


@every_op
@pytest.mark.parametrize("offset", [1.5 * 2**14, -1.5 * 2**20])
@pytest.mark.parametrize("impl", IMPLS)
def test_variance_survives_a_common_offset(impl: str, op: str, offset: float) -> None:
    """Far below what eager reaches here: its error is that of the rounded mean, 1e-3 and 6e-2 at these offsets."""
    shape = (3, 7000) if op in OVER_ALL else (4, 300)
    x, mask = draw(*shape)
    x += offset
    grad = upstream(op, x)
    got, truth = run(op, x, mask, grad, impl), run(op, x.double(), mask, grad, "reference")
    # A result that contains the mean is right to one rounding at its size, half of eps times the power of two below.
    rounding = torch.finfo(torch.float32).eps * abs(offset) / 3 if "mean" in op or "rescale" in op else 0.0
    torch.testing.assert_close(got.value.double(), truth.value, rtol=0.0, atol=1.01 * rounding + 2e-6)
    torch.testing.assert_close(got.gradient.double(), truth.gradient, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("op", ["mean over None", "var over None", "masked_whiten"])
@pytest.mark.parametrize("most_chunks", [1024, 1], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_variance_past_float32_is_infinite(
    impl: str, op: str, most_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tiles and chunks follow that do not count: 0 of them times an infinite square must not be NaN."""
    from ppo_fast.kernels import moments

    monkeypatch.setattr(moments, "MOST_CHUNKS", most_chunks)
    x, mask = draw(3, 7000)
    x = 1e30 * (x + torch.linspace(1, 5, 7000))
    mask[1, 1000:] = False
    value = call(op, x, mask, impl)
    torch.testing.assert_close(value, call(op, x, mask, "reference"))
    assert {"mean over None": value.isfinite(), "var over None": value.isinf(), "masked_whiten": value == 0}[
        op
    ].all()


@every_op
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_does_not_count_reaches_nothing(impl: str, op: str, garbage: float) -> None:
    x, mask = draw(4, 300)
    grad = upstream(op, x)
    clean = run(op, x.masked_fill(~mask, 0.0), mask, grad, impl)
    if grad.shape == x.shape:
        grad = grad.masked_fill(~mask, garbage)
    dirty = run(op, x.masked_fill(~mask, garbage), mask, grad, impl)
    assert torch.equal(dirty.value, clean.value)
    assert torch.equal(dirty.gradient, clean.gradient)
    assert bool(dirty.value.isfinite().all())
    assert bool((dirty.gradient[~mask] == 0).all())
    if dirty.value.shape == x.shape:
        assert bool((dirty.value[~mask] == 0).all())


@every_op
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_counts(impl: str, op: str) -> None:
    x = torch.full((3, 5), torch.nan)
    result = run(op, x, torch.zeros(3, 5), upstream(op, x), impl)
    assert torch.equal(result.value, torch.zeros_like(result.value))
    assert torch.equal(result.gradient, torch.zeros(3, 5))


@every_op_over_all
@pytest.mark.parametrize("impl", IMPLS)
def test_one_element_counts(impl: str, op: str) -> None:
    x, mask = draw(3, 5)
    mask = torch.zeros_like(mask)
    mask[1, 2] = True
    grad = upstream(op, x)
    result = run(op, x, mask, grad, impl)
    keeps = "mean" in op or "rescale" in op  # mean and rescale return the value, variance and whiten 0
    at = result.value[mask] if result.value.dim() else result.value
    assert torch.equal(at, x[mask].view(at.shape) if keeps else torch.zeros_like(at))
    of_value = grad[mask].view(()) if grad.dim() else grad
    assert result.gradient[1, 2] == (of_value if keeps else 0.0)
    assert bool((result.gradient[~mask] == 0).all())


@pytest.mark.parametrize("op", [op for op in OPS if op not in OVER_ALL])
@pytest.mark.parametrize("impl", IMPLS)
def test_columns_with_none_one_and_two_counted(impl: str, op: str, no_worse: Callable[..., None]) -> None:
    x = torch.randn(3, 3)
    ladder = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1]])
    assert_parity(no_worse, three_ways(op, x, ladder if "-1" in op else ladder.T, impl))


@pytest.mark.parametrize("op", ["masked_whiten", "masked_rescale", "var over None", "mean over None"])
@pytest.mark.parametrize("scale", [0.0, 1e-4], ids=["no variance", "variance of the epsilon's size"])
@pytest.mark.parametrize("impl", IMPLS)
def test_small_variance(impl: str, op: str, scale: float, no_worse: Callable[..., None]) -> None:
    x, mask = draw(3, 50)
    assert_parity(no_worse, three_ways(op, scale * x + 0.1, mask, impl))


VIEWS = {
    "transposed": lambda x: x.transpose(0, 2),
    "every other element": lambda x: x[..., ::2],
    "without the last": lambda x: x[:, :-1],
    "one row for all": lambda x: x[:1].expand(4, -1, -1),
    "reversed": lambda x: x.flip(1).transpose(1, 2),
}


@every_op
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(
    impl: str, op: str, view: Callable[[Tensor], Tensor], no_worse: Callable[..., None]
) -> None:
    x, mask = draw(4, 6, 10)
    assert_parity(no_worse, three_ways(op, x, view(mask), impl, view=view))


@every_op
@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_of_the_upstream_gradient(impl: str, op: str) -> None:
    x, mask = draw(4, 6)
    grad = upstream(op, x)
    strided = torch.stack([grad, torch.full_like(grad, torch.nan)], dim=-1)[..., 0]
    a, b = run(op, x, mask, grad, impl), run(op, x, mask, strided, impl)
    assert torch.equal(a.gradient, b.gradient)
    ones = torch.ones_like(grad)
    expanded = torch.ones(()).expand(grad.shape)
    assert torch.equal(run(op, x, mask, ones, impl).gradient, run(op, x, mask, expanded, impl).gradient)


MASK_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOAT_MASK_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("op", ["unbiased var over 0", "unbiased masked_rescale"])
@pytest.mark.parametrize("dtype", MASK_DTYPES + FLOAT_MASK_DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_mask_dtype(impl: str, op: str, dtype: torch.dtype) -> None:
    """Nonzero counts once whatever its size, NaN too; a negative zero does not."""
    x, mask = draw(3, 40)
    weights = (3 * mask).to(torch.float32)
    if dtype in FLOAT_MASK_DTYPES:
        weights[mask] = torch.where(torch.arange(int(mask.sum())) % 2 == 0, torch.nan, 0.125)
        weights[~mask] = -0.0
    grad = upstream(op, x)
    plain, other = run(op, x, mask, grad, impl), run(op, x, weights.to(dtype), grad, impl)
    assert torch.equal(plain.value, other.value)
    assert torch.equal(plain.gradient, other.gradient)


@every_op
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_no_elements(impl: str, op: str, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    grad = upstream(op, x)
    got, eager = (run(op, x, torch.ones(shape), grad, name) for name in (impl, "reference"))
    for a, b in ((got.value, eager.value), (got.gradient, eager.gradient)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@every_op
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_counts_and_is_not_finite_shows_as_in_the_reference(impl: str, op: str, bad: float) -> None:
    x = torch.randn(3, 5)
    x[1, 2] = bad
    values = [call(op, x, torch.ones(3, 5), name) for name in (impl, "reference")]
    torch.testing.assert_close(*values, equal_nan=True)
    assert not values[0].isfinite().all()
    values = [call(op, torch.full((3, 5), bad), torch.ones(3, 5), name) for name in (impl, "reference")]
    torch.testing.assert_close(*values, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_literals(impl: str) -> None:
    """Of 1, 2, 4: mean 7/3; sum (x - mean)^2 = (16 + 1 + 25) / 9 = 14/3, so var 14/9, unbiased 7/3."""
    x, mask = torch.tensor([1.0, 2.0, 9.0, 4.0]), torch.tensor([1, 1, 0, 1])
    assert call("mean over None", x, mask, impl).item() == pytest.approx(7 / 3)
    assert call("var over -1", x, mask, impl).item() == pytest.approx(14 / 9)
    assert call("unbiased var over None", x, mask, impl).item() == pytest.approx(7 / 3)
    # (1 - 7/3) / sqrt(14/9) = -4 / sqrt(14)
    whitened = torch.tensor([-1.0690450, -0.2672612, 0.0, 1.3363062])
    torch.testing.assert_close(call("masked_whiten", x, mask, impl), whitened)
    torch.testing.assert_close(call("masked_rescale", x, mask, impl), whitened + 7 / 3 * mask)


@every_op
@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_twice(impl: str, op: str) -> None:
    x, mask = draw(3, 3000) if op in OVER_ALL else draw(3, 300)
    grad = upstream(op, x)
    first, second = run(op, x, mask, grad, impl), run(op, x.clone(), mask.clone(), grad, impl)
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.gradient, second.gradient)


@pytest.mark.parametrize("op", ["mean over -1", "unbiased var over -1"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_does_not_depend_on_its_batch(impl: str, op: str) -> None:
    x, mask = draw(5, 5000)
    whole = call(op, x, mask, impl)
    for row in range(5):
        assert torch.equal(call(op, x[row], mask[row], impl), whole[row])


@every_op
@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_and_no_gradient(impl: str, op: str) -> None:
    x, mask = draw(3, 5)
    value = call(op, x.requires_grad_(), mask, impl)
    first, second = (torch.autograd.grad(value.square().sum(), x, retain_graph=True)[0] for _ in "ab")
    assert torch.equal(first, second)
    assert not call(op, x.detach(), mask, impl).requires_grad


@native
@every_op
@pytest.mark.parametrize("shape", [(3, 127), (2, 3, 257), (300, 3), (2, 9000)], ids=str)
def test_float64(op: str, shape: tuple[int, ...], no_worse: Callable[..., None]) -> None:
    x, mask = draw(*shape)
    x = x.double() + 2.0**20
    grad = upstream(op, x)
    got, truth = run(op, x, mask, grad, "cpu"), run(op, x, mask, grad, "reference")
    # The reference's mean is a rounded sum's, and its variance is taken about that.
    assert got.value.dtype == got.gradient.dtype == torch.float64
    torch.testing.assert_close(got.value, truth.value, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got.gradient, truth.gradient, rtol=1e-8, atol=1e-8)
    centred = x - 2.0**20  # exact
    if "mean" not in op and "rescale" not in op:
        a, b = run(op, centred, mask, grad, "cpu"), run(op, centred, mask, grad, "reference")
        no_worse(a.value, b.value, b.value, "value")
        no_worse(a.gradient, b.gradient, b.gradient, "gradient")


@native
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_op
def test_what_is_not_finite_shows_across_chunks(op: str, bad: float) -> None:
    """A mean that is infinite stays so when finite tiles and chunks are merged into it, before and after."""
    for shape, at in (((2, 9000), (1, 600)), ((300, 3), (150, 1))):
        x = torch.randn(shape)
        x[at] = bad
        values = [call(op, x, torch.ones(shape), impl) for impl in ("cpu", "reference")]
        torch.testing.assert_close(*values, equal_nan=True)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_vary_has_no_variance(dtype: torch.dtype) -> None:
    x = torch.full((3, 9000), 0.1, dtype=dtype)
    assert call("var over None", x, torch.rand(3, 9000) > 0.3, "cpu").item() == 0.0
    assert torch.equal(call("masked_whiten", x, torch.ones(3, 9000), "cpu"), torch.zeros_like(x))
