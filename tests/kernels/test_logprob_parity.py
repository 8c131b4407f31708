"""Logprob and entropy of both backends against float64, with eager torch in the tested dtype as the yardstick."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ppo_fast import reference
from ppo_fast.ops import backends, fused_logprob
from ppo_fast.ops.row_grid import row_grid

# numpy, under Triton's interpreter, warns of the very NaNs and infinities that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

ON_GPU = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu") != "cpu"
IMPLS = ["triton"] if ON_GPU else ["cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    ((1, 1), "a vocabulary of one: logprob and entropy are 0"),
    ((0, 5), "no rows"),
    ((3, 2), "narrower than any register"),
    ((3, 127), "one short of a power of two: the tail"),
    ((2, 3, 1025), "one past a block of the native kernel"),
    ((2, 50257), "GPT-2: odd, so rows start at every alignment"),
    ((1, 151936), "Qwen 2.5: many tiles"),
]


@dataclass(frozen=True)
class Result:
    logprobs: Tensor
    entropy: Tensor
    gradient: Tensor


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    reason = backends.unavailable(request.param, torch.empty(1, 2))
    assert reason is None, reason
    return request.param


def run(f: Callable[[Tensor], tuple[Tensor, Tensor]], logits: Tensor, grads: tuple[Tensor, Tensor]) -> Result:
    logits = logits.detach().requires_grad_()
    logprobs, entropy = f(logits)
    outputs, upstream = (logprobs, entropy), tuple(g.to(logprobs.dtype) for g in grads)
    (gradient,) = torch.autograd.grad(outputs, logits, upstream)
    return Result(logprobs.detach(), entropy.detach(), gradient)


def three_ways(
    impl: str, logits: Tensor, labels: Tensor, temperature: float | Tensor, view: Callable[[Tensor], Tensor]
) -> tuple[Result, Result, Result]:
    """(fused, eager in the same dtype, float64) with upstream gradients that differ from row to row."""
    grads = (torch.randn(labels.shape), torch.randn(labels.shape))
    fused = run(
        lambda x: fused_logprob.logprobs_and_entropy(view(x), labels, temperature, impl), logits, grads
    )

    def oracle(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.logprobs_and_entropy_from_logits(view(x), labels, temperature=temperature)

    return fused, run(oracle, logits, grads), run(oracle, logits.double(), grads)


def assert_parity(
    no_worse: Callable[..., None], results: tuple[Result, Result, Result], slack: float = 0.0
) -> None:
    no_worse(*(result.logprobs for result in results), "logprobs")
    no_worse(*(result.entropy for result in results), "entropy")
    no_worse(*(result.gradient for result in results), "gradient", slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=[str(shape) for shape, _ in SHAPES])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.usefixtures("poisoned_empty")
def test_no_worse_than_eager(
    impl: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    temperature: float,
    no_worse: Callable[..., None],
) -> None:
    if impl == "triton" and dtype == torch.float64:
        assert "no kernel for torch.float64" in str(
            backends.unavailable(impl, torch.empty(1, 2, dtype=dtype))
        )
        return
    logits = (torch.randn(shape) * 4).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1])
    # Triton's interpreter cuts a bfloat16 off where the hardware rounds it: one unit in the last place.
    cut_off = torch.finfo(dtype).eps if (impl, dtype) == ("triton", torch.bfloat16) and not ON_GPU else 0.0
    assert_parity(no_worse, three_ways(impl, logits, labels, temperature, lambda x: x), cut_off)


def test_temperature_of_each_row(impl: str, no_worse: Callable[..., None]) -> None:
    logits, labels = torch.randn(2, 3, 67) * 4, torch.randint(67, (2, 3))
    temperature = torch.rand(2, 3) + 0.5
    assert_parity(no_worse, three_ways(impl, logits, labels, temperature, lambda x: x))


VIEWS = {
    "without the last token": lambda x: x[:, :-1],
    "every other row": lambda x: x[:, ::2],
    "rows swapped": lambda x: x.transpose(0, 1),
    "columns strided": lambda x: x[..., ::2],
    "columns reversed in memory": lambda x: x.transpose(1, 2),
    "one row for all": lambda x: x[:1].expand(4, -1, -1),
    "three levels of stride": lambda x: x[:4].view(2, 2, 6, 40).transpose(0, 1)[:, :, ::2],
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_any_strides(impl: str, view: Callable[[Tensor], Tensor], no_worse: Callable[..., None]) -> None:
    logits = torch.randn(5, 6, 40)
    shape = view(logits).shape
    labels = torch.randint(shape[-1], shape[:-1])
    assert_parity(no_worse, three_ways(impl, logits, labels, 1.3, view))


def test_rows_past_two_to_the_31_elements(impl: str) -> None:
    """The stride fits in 32 bits, the third row's offset does not; of the 4 GiB between, no page is touched."""
    stride, vocab = 2**30 + 8, 33
    far = torch.empty(2 * stride + vocab, dtype=torch.bfloat16).as_strided((3, vocab), (stride, 1))
    far.copy_(torch.randn(3, vocab))
    near, labels = far.contiguous(), torch.tensor([1, 2, 0])
    grads = (torch.randn(3), torch.randn(3))
    a, b = (
        run(lambda x: fused_logprob.logprobs_and_entropy(x, labels, 0.9, impl), x, grads) for x in (far, near)
    )
    assert all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("logprobs", "entropy", "gradient")
    )


def test_dropping_a_token_copies_nothing() -> None:
    logits = torch.randn(2, 4, 8)
    rows = row_grid(logits[:, :-1])
    assert rows.logits.data_ptr() == logits.data_ptr()
    assert (rows.inner_rows, rows.outer_stride, rows.inner_stride) == (3, 4 * 8, 8)


def test_strided_labels(impl: str, no_worse: Callable[..., None]) -> None:
    labels = torch.randint(40, (3, 8))[:, ::2]
    assert_parity(no_worse, three_ways(impl, torch.randn(3, 4, 40), labels, 1.0, lambda x: x))


def test_peaked_negative_logits_keep_the_tail_out(impl: str, no_worse: Callable[..., None]) -> None:
    """Logits near -50: a padded column counted as exp(0) would outweigh the whole row."""
    logits = torch.randn(3, 130) - 50
    logits[:, 7] += 20
    labels = torch.tensor([7, 0, 129])
    assert_parity(no_worse, three_ways(impl, logits, labels, 1.0, lambda x: x))


@pytest.mark.parametrize("offset", [2.0**14, -(2.0**14), 2.0**20])
def test_common_offset_cancels(impl: str, offset: float) -> None:
    """Logits on a grid of 1/8 stay exact under these offsets, so nothing at all may change."""
    logits = (torch.randn(3, 200) * 8).round() / 8
    labels = torch.randint(200, (3,))
    grads = (torch.randn(3), torch.randn(3))
    plain, moved = (
        run(lambda x: fused_logprob.logprobs_and_entropy(x, labels, 0.5, impl), logits + c, grads)
        for c in (0.0, offset)
    )
    for name in ("logprobs", "entropy", "gradient"):
        assert torch.equal(getattr(plain, name), getattr(moved, name)), name


def test_certain_token(impl: str, no_worse: Callable[..., None]) -> None:
    """p = 1 - 3 e^-12: the gradient of the target is the small 1 - p, which must not be lost to the big p."""
    logits = torch.zeros(1, 4)
    logits[0, 2] = 12.0
    results = three_ways(impl, logits, torch.tensor([2]), 1.0, lambda x: x)
    assert_parity(no_worse, results)
    assert results[0].logprobs.item() < 0


def with_infinities(kind: str) -> Tensor:
    logits = torch.randn(2, 9000)
    if kind == "leading":  # longer than one block of either kernel
        logits[:, :8200] = -torch.inf
    elif kind == "scattered":
        logits[:, ::3] = -torch.inf
    else:  # only the label's column is possible
        logits[:, :-1] = -torch.inf
    return logits


@pytest.mark.parametrize("kind", ["leading", "scattered", "single"])
def test_impossible_tokens(impl: str, kind: str, no_worse: Callable[..., None]) -> None:
    logits = with_infinities(kind)
    results = three_ways(impl, logits, torch.tensor([8999, 8999]), 0.8, lambda x: x)
    assert_parity(no_worse, results)
    assert bool((results[0].gradient[logits == -torch.inf] == 0).all())


def test_impossible_label_is_minus_infinity_with_a_finite_gradient(impl: str) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    result = run(
        lambda x: fused_logprob.logprobs_and_entropy(x, torch.tensor([1]), 1.0, impl),
        logits,
        (torch.ones(1), torch.ones(1)),
    )
    assert result.logprobs.item() == -torch.inf
    # p = (1/2, 0, 1/2): the entropy is flat there, so [j = label] - p = (-1/2, 1, -1/2) remains
    torch.testing.assert_close(result.gradient, torch.tensor([[-0.5, 1.0, -0.5]]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_row_shows_and_stays_alone(impl: str, bad: float) -> None:
    logits = torch.randn(3, 5000)
    logits[1, 17] = bad
    labels = torch.zeros(3, dtype=torch.int64)
    ones = torch.ones(3)
    result = run(lambda x: fused_logprob.logprobs_and_entropy(x, labels, 1.0, impl), logits, (ones, ones))
    for tensor in (result.logprobs, result.entropy, result.gradient.sum(-1)):
        assert tensor.isnan().tolist() == [False, True, False]


def test_literal(impl: str) -> None:
    """z = (ln 1, ln 2, ln 5): p = (1, 2, 5) / 8, log p_1 = -ln 4, H = (ln 8 + 2 ln 4 + 5 ln 1.6) / 8 = 0.900256."""
    result = run(
        lambda x: fused_logprob.logprobs_and_entropy(x, torch.tensor([1]), 1.0, impl),
        torch.tensor([[1.0, 2.0, 5.0]]).log(),
        (torch.ones(1), torch.zeros(1)),
    )
    assert result.logprobs.item() == pytest.approx(-1.3862944, abs=1e-6)
    assert result.entropy.item() == pytest.approx(0.9002561, abs=1e-6)
    torch.testing.assert_close(result.gradient, torch.tensor([[-0.125, 0.75, -0.625]]))


@pytest.mark.parametrize("used", ["logprobs", "entropy"])
def test_one_output_alone(impl: str, used: str, no_worse: Callable[..., None]) -> None:
    logits, labels = torch.randn(3, 50), torch.randint(50, (3,))
    grad = torch.randn(3)

    def gradient(f: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        output = f(x)[0 if used == "logprobs" else 1]
        return torch.autograd.grad(output, x, grad.to(output.dtype))[0]

    def oracle(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.logprobs_and_entropy_from_logits(x, labels)

    fused = gradient(lambda x: fused_logprob.logprobs_and_entropy(x, labels, 1.0, impl), logits)
    no_worse(fused, gradient(oracle, logits), gradient(oracle, logits.double()), used)


def test_rows_without_upstream_gradient_are_not_read(impl: str) -> None:
    """A masked row may hold anything, NaN included: its gradient is 0."""
    logits = torch.randn(3, 50)
    logits[1] = torch.nan
    gate = torch.tensor([1.0, 0.0, 1.0])
    labels = torch.randint(50, (3,))
    result = run(lambda x: fused_logprob.logprobs_and_entropy(x, labels, 1.0, impl), logits, (gate, gate))
    assert bool((result.gradient[1] == 0).all())
    assert bool(result.gradient[[0, 2]].isfinite().all())


def test_backward_twice_and_no_gradient(impl: str) -> None:
    logits = torch.randn(3, 50, requires_grad=True)
    labels = torch.randint(50, (3,))
    logprobs, entropy = fused_logprob.logprobs_and_entropy(logits, labels, 1.0, impl)
    first, second = (
        torch.autograd.grad((logprobs + entropy).sum(), logits, retain_graph=True)[0] for _ in "ab"
    )
    assert torch.equal(first, second)
    assert not fused_logprob.logprobs_and_entropy(logits.detach(), labels, 1.0, impl)[0].requires_grad


def test_a_row_does_not_depend_on_its_batch(impl: str) -> None:
    """Bitwise: alone, in a batch, and at an odd place of it, so that the ratio of an on-policy update is exactly 1."""
    logits, labels = torch.randn(7, 3001), torch.randint(3001, (7,))
    grads = (torch.randn(7), torch.randn(7))
    whole = run(lambda x: fused_logprob.logprobs_and_entropy(x, labels, 0.9, impl), logits, grads)
    for r in range(7):
        one = slice(r, r + 1)
        alone = run(
            lambda x, one=one: fused_logprob.logprobs_and_entropy(x, labels[one], 0.9, impl),
            logits[one].clone(),
            (grads[0][one], grads[1][one]),
        )
        for name in ("logprobs", "entropy", "gradient"):
            assert torch.equal(getattr(whole, name)[one], getattr(alone, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_operator_is_well_formed(impl: str, dtype: torch.dtype, per_row: bool) -> None:
    logits = torch.randn(2, 3, 33).to(dtype).requires_grad_()
    labels = torch.randint(33, (2, 3))
    temperature = torch.rand(2, 3) + 0.5 if per_row else torch.tensor(0.7)
    torch.library.opcheck(fused_logprob.logprob_entropy, (logits, labels, temperature, impl))
