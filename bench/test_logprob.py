"""Logprob and entropy from logits: eager torch, torch.compile of the same, and the fused op.

    python -m pytest bench/test_logprob.py --benchmark-group-by=param:case,param:work

A case is timed only after its result has been compared with float64. `extra_info` holds the thread count, the traffic
that the fused op needs at least (one read forward; one read and one write backward) over the best time, in GB/s, and
how many times faster than eager that best time is.
"""

import time
from collections.abc import Callable

import pytest
import torch
from cases import CASES, Case
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import ppo_fast
from ppo_fast import build, reference

TEMPERATURE = 0.7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRANSFERS = {"forward": 1, "forward and backward": 3}

Rows = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return reference.logprobs_and_entropy_from_logits(logits, labels, temperature=TEMPERATURE)


def fused(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    impl = "triton" if DEVICE == "cuda" else "cpu"
    return ppo_fast.logprobs_and_entropy_from_logits(logits, labels, temperature=TEMPERATURE, impl=impl)


def implementation(name: str) -> Rows:
    torch._dynamo.reset()
    return {"eager": eager, "compile": torch.compile(eager), "fused": fused}[name]


def workload(rows: Rows, work: str, logits: Tensor, labels: Tensor) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            rows(logits, labels)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def both() -> None:
        leaf = logits.detach().requires_grad_()
        logprobs, entropy = rows(leaf, labels)
        (logprobs.sum() - 0.01 * entropy.sum()).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return forward if work == "forward" else both


def assert_parity(rows: Rows, logits: Tensor, labels: Tensor) -> None:
    few, few_labels = logits[:8].detach().requires_grad_(), labels[:8]
    truth_few = few.detach().double().requires_grad_()
    results = []
    for f, x in ((rows, few), (eager, truth_few)):
        logprobs, entropy = f(x, few_labels)
        (gradient,) = torch.autograd.grad((logprobs - 0.01 * entropy).sum(), x)
        results.append((logprobs.detach(), entropy.detach(), gradient))
    half = torch.finfo(logits.dtype).eps  # the gradient is rounded to the dtype of the logits
    for got, truth, tolerance in zip(*results, (1e-5, 1e-5, max(1e-5, half)), strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)


def best_of(run: Callable[[], None], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def three_digits(x: float) -> float:
    return float(f"{x:.3g}")


@pytest.mark.parametrize("name", ["eager", "compile", "fused"])
@pytest.mark.parametrize("work", TRANSFERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logprob(benchmark: BenchmarkFixture, case: Case, work: str, name: str) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(case.rows, case.vocab, device=DEVICE) * 3).to(case.dtype)
    labels = torch.randint(case.vocab, (case.rows,), device=DEVICE)
    rows = implementation(name)
    assert_parity(rows, logits, labels)
    run = workload(rows, work, logits, labels)
    run()  # compile and allocate outside the clock
    eager_seconds = best_of(workload(eager, work, logits, labels))
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info |= {
        "device": DEVICE,
        "threads": torch.get_num_threads(),
        "isa": build.build_info()["isa"],
        "torch": torch.__version__,
        "gigabytes_per_second": three_digits(TRANSFERS[work] * case.logits_bytes / seconds / 1e9),
        "times_eager": three_digits(eager_seconds / seconds),
    }
