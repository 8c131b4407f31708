"""The native ops on a CPU against what they replace, all of it side by side in one run: ratios, not times.

    python -m pytest bench/test_ratios.py -s

In every round each function runs once, in turn, so that what slows the machine slows them alike; medians and best
times over the rounds are both reported. `source` is the eager code of RLHF trainers: log-softmax, gather, clipped loss.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import eager
import pytest
import torch
from cases import RATIOS, SMOKE, Case
from measure import DEVICE, assert_near, resident_bytes, three_digits
from pytest_benchmark.fixture import BenchmarkFixture
from suite import compiled
from torch import Tensor

import ppo_fast

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the native CPU backend is measured on a CPU")

ROUNDS = 9
Run = Callable[[], None]


def in_turn(runs: dict[str, Run], before: Run) -> dict[str, list[float]]:
    """Seconds of each function in each round; one more round before them, for compilers and allocators."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            before()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def report(benchmark: BenchmarkFixture, runs: dict[str, Run], unit: str, before: Run = lambda: None) -> None:
    """Time of `unit` as the benchmark, of the others as multiples of it."""
    seconds = in_turn(runs, before)
    for name, times in seconds.items():
        benchmark.extra_info |= {
            f"{name} / {unit}, median": three_digits(
                statistics.median(times) / statistics.median(seconds[unit])
            ),
            f"{name} / {unit}, best": three_digits(min(times) / min(seconds[unit])),
            f"{name}, best ms": three_digits(1e3 * min(times)),
        }
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.pedantic(runs[unit], rounds=1)
    print("\n" + ", ".join(f"{name}: {value}" for name, value in benchmark.extra_info.items()))


def logits_of(case: Case) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(case.rows, case.columns).mul_(3).to(case.dtype)
    return logits, torch.randint(case.columns, (case.rows,))


def eager_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return eager.pick(eager.log_softmax(logits, 1.0), labels)


def backwards(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """Forward and backward; returns the gradient."""
    leaf = logits.detach().requires_grad_()
    function(leaf, *others).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("case", RATIOS, ids=lambda case: case.name)
def test_logprobs_forward_and_backward(benchmark: BenchmarkFixture, case: Case) -> None:
    logits, labels = logits_of(case)
    functions = {"fused": ppo_fast.logprobs_from_logits, "eager": eager_logprobs}
    if case != SMOKE:
        functions["compile"] = compiled(eager_logprobs)
    check(functions["fused"], logits, labels)
    report(
        benchmark, {name: lambda f=f: backwards(f, logits, labels) for name, f in functions.items()}, "fused"
    )


@pytest.mark.parametrize("case", RATIOS, ids=lambda case: case.name)
def test_logprobs_forward(benchmark: BenchmarkFixture, case: Case) -> None:
    """Against a plain sum over the same logits: less than that no op that reads them can take."""
    logits, labels = logits_of(case)
    check(ppo_fast.logprobs_from_logits, logits, labels)
    runs = {
        "sum": lambda: logits.sum(-1),
        "fused": lambda: ppo_fast.logprobs_from_logits(logits, labels),
        "with the entropy": lambda: ppo_fast.logprobs_and_entropy_from_logits(logits, labels),
    }
    with torch.no_grad():
        report(benchmark, runs, "sum")


def tokens_of(case: Case) -> tuple[Tensor, ...]:
    """Old logprobs, advantages, mask of 8 sequences."""
    shape = (8, case.rows // 8)
    old = -11 + 0.1 * torch.randn(shape)
    return old, torch.randn(shape), (torch.arange(case.rows).view(shape) % 8 != 3).float()


def fused_loss(logits: Tensor, labels: Tensor, *tokens: Tensor) -> Tensor:
    return ppo_fast.policy_loss_from_logits(logits, labels, *tokens).loss


def loss_in_place(logits: Tensor, labels: Tensor, *tokens: Tensor) -> Tensor:
    return ppo_fast.policy_loss_from_logits(logits, labels, *tokens, inplace_backward=True).loss


def source_loss(logits: Tensor, labels: Tensor, *tokens: Tensor) -> Tensor:
    return eager.policy_loss(eager_logprobs(logits, labels), *tokens)


@pytest.mark.parametrize("case", RATIOS, ids=lambda case: case.name)
def test_policy_loss_forward_and_backward(benchmark: BenchmarkFixture, case: Case) -> None:
    logits, labels = logits_of(case)
    tokens = tokens_of(case)
    logits, labels = logits.view(*tokens[0].shape, -1), labels.view(tokens[0].shape)
    pristine = logits.clone()
    few = (pristine[:, :2], labels[:, :2], *(x[:, :2] for x in tokens))
    mine = backwards(fused_loss, *few)
    truth = backwards(source_loss, *(x.double() if x.is_floating_point() else x for x in few))
    assert_near([mine], [truth], [max(1e-4, torch.finfo(case.dtype).eps)])
    runs = {
        "fused": lambda: backwards(fused_loss, pristine, labels, *tokens),
        "fused in place": lambda: backwards(loss_in_place, logits, labels, *tokens),
        "source": lambda: backwards(source_loss, pristine, labels, *tokens),
    }
    report(benchmark, runs, "fused", before=lambda: logits.copy_(pristine))


MEMORY = (
    "import sys; sys.path.insert(0, '.'); import test_ratios; test_ratios.print_extra_memory(*sys.argv[1:])"
)
LOSSES = {"fused in place": loss_in_place, "fused": fused_loss, "source": source_loss}


def print_extra_memory(name: str, rows: str, columns: str, dtype: str) -> None:
    """In a process of its own: what its memory grows by, at the peak of a loss with its backward, in bytes."""
    case = Case(int(rows), int(columns), getattr(torch, dtype))
    for size in (Case(8, 64, case.dtype), case):  # libraries and threads first
        logits, labels = logits_of(size)
        tokens = tokens_of(size)
        inputs = (logits.view(*tokens[0].shape, -1), labels.view(tokens[0].shape), *tokens)
        extra = resident_bytes(partial(backwards, LOSSES[name], *inputs))
    print(extra)


@pytest.mark.parametrize("case", RATIOS, ids=lambda case: case.name)
def test_policy_loss_memory(benchmark: BenchmarkFixture, case: Case) -> None:
    for name in LOSSES:
        dtype = str(case.dtype).removeprefix("torch.")
        command = [sys.executable, "-c", MEMORY, name, str(case.rows), str(case.columns), dtype]
        extra = int(
            benchmark.pedantic(child, args=(command,), rounds=1) if name == "source" else child(command)
        )
        benchmark.extra_info[f"{name}, extra memory / logits"] = three_digits(extra / case.bytes)
    print("\n" + ", ".join(f"{name}: {value}" for name, value in benchmark.extra_info.items()))


def child(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout


def check(function: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> None:
    """The first rows against float64, value and gradient."""
    few = (logits[:4], labels[:4])
    truth = backwards(eager_logprobs, few[0].double(), few[1])
    got = backwards(function, *few)
    assert_near([got], [truth], [max(1e-5, torch.finfo(logits.dtype).eps)])
