"""One benchmark of one implementation: parity with float64 first, then time, memory and bandwidth."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Case
from measure import DEVICE, assert_near, best_of, extra_bytes, facts, synchronise, synchronised
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

ROUNDS = 10 if DEVICE == "cuda" else 5
IMPL = "triton" if DEVICE == "cuda" else "auto"  # what `fused` asks for

Function = Callable[..., tuple[Tensor, ...]]
FORWARD, BOTH = "forward", "forward and backward"

_eager_seconds: dict[tuple[str, Case, str], float] = {}


@dataclass(frozen=True)
class Subject:
    """An op with its inputs; the first input learns, and its results are summed with fixed weights.

    `few` cuts the inputs to what parity is checked on, `moved` is the least traffic in bytes, `overwrites` says that
    an implementation may leave something else in the first input.
    """

    name: str
    case: Case
    work: str
    inputs: tuple[Tensor, ...]
    few: tuple[Tensor, ...]
    truth: Function
    moved: int
    overwrites: bool = False


def total(results: tuple[Tensor, ...]) -> Tensor:
    """A scalar whose upstream gradients differ from one element to the next."""
    weights = [torch.linspace(0.5, 1.5, x.numel(), device=x.device).view_as(x) for x in results]
    return torch.stack([(w * x).sum() for w, x in zip(weights, results, strict=True)]).sum()


def runner(function: Function, work: str, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    first, *others = inputs

    def forward() -> None:
        with torch.no_grad():
            function(first, *others)

    def both() -> None:
        total(function(first.detach().requires_grad_(), *others)).backward()

    return forward if work == FORWARD else both


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def outcome(function: Function, work: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, and the gradient where the work has a backward."""
    if work == FORWARD:
        with torch.no_grad():
            return list(function(*inputs))
    leaf = inputs[0].detach().clone().requires_grad_()
    results = function(leaf, *inputs[1:])
    (gradient,) = torch.autograd.grad(total(results), leaf)
    return [*(x.detach() for x in results), gradient]


def assert_parity(function: Function, subject: Subject) -> None:
    got = outcome(function, subject.work, subject.few)
    truth = outcome(subject.truth, subject.work, tuple(map(wide, subject.few)))
    rounding = torch.finfo(subject.case.dtype).eps  # a gradient has the dtype of what learns
    tolerances = [max(1e-5, rounding) if x.shape == subject.few[0].shape else 2e-5 for x in got]
    assert_near(got, truth, tolerances)


def compiled(function: Function) -> Function:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def measure(benchmark: BenchmarkFixture, function: Function, eager: Function, subject: Subject) -> None:
    """Check, then time `function`; eager's time is taken once for each case."""
    assert_parity(function, subject)
    inputs = subject.inputs
    key = (subject.name, subject.case, subject.work)
    if key not in _eager_seconds:
        run = runner(eager, subject.work, inputs)
        run()
        _eager_seconds[key] = best_of(run)

    pristine = inputs[0].clone() if subject.overwrites else None

    def restore() -> None:
        if pristine is not None:
            inputs[0].copy_(pristine)
        synchronise()

    run = runner(function, subject.work, inputs)
    run()  # compile and allocate outside the clock
    restore()
    memory = extra_bytes(run)
    benchmark.pedantic(synchronised(run), setup=restore, rounds=ROUNDS, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info |= facts(seconds, _eager_seconds[key], subject.moved, memory)
