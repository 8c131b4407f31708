"""From hidden states to loss, log-probabilities or KL, forward and backward into hidden states and head.

    python -m pytest bench/test_linear.py --benchmark-group-by=param:case,param:work

`peak_extra_bytes` is what a run takes beyond its inputs and one copy of the gradients;
`memory_eager_over_this` compares it with whole logits, `times_products` the time with that of the bare matrix products
(three for a loss, four for what makes its logits anew). Least traffic: one read of the inputs, one write of gradients.
"""

from collections.abc import Callable
from functools import lru_cache

import heads
import pytest
import torch
from cases import HEADS, HeadCase
from measure import DEVICE, assert_near, best_of, extra_bytes, facts, synchronised, three_digits
from pytest_benchmark.fixture import BenchmarkFixture

from ppo_fast.ops.linear_chunks import logits_buffer, rows_of_a_chunk

ROUNDS = 10 if DEVICE == "cuda" else 3
PRODUCTS = {"loss": 3, "logprobs": 4, "kl": 4}
WORKS = [(work, name) for work in PRODUCTS for name in heads.names_of(work)]


@lru_cache
def eager_costs(work: str, case: HeadCase) -> tuple[float, int | None]:
    """Seconds and bytes."""
    run = heads.run_of(heads.implementation(work, "eager"), heads.inputs_of(work, case))
    run()
    return best_of(run, times=2), peak(run, case)


def peak(run: Callable[[], object], case: HeadCase) -> int | None:
    """Bytes beyond the inputs and one copy of the gradients."""
    memory = extra_bytes(run)
    return None if memory is None else max(1, memory - case.bytes)


@lru_cache
def products_seconds(case: HeadCase) -> float:
    """The three products of a chunk, over all chunks: logits, and the gradients of hidden states and of the head."""
    device, vocab = torch.device(DEVICE), case.columns
    row_bytes = vocab * case.dtype.itemsize
    size = rows_of_a_chunk(case.rows, vocab * case.width * case.dtype.itemsize, row_bytes, device, 0)
    x = torch.randn(size, case.width, device=device).to(case.dtype)
    weight = torch.randn(vocab, case.width, device=device).to(case.dtype)
    logits = logits_buffer(size, vocab, case.dtype, device)

    def run() -> None:
        for _ in range(0, case.rows, size):
            torch.mm(x, weight.t(), out=logits)
            torch.mm(logits, weight)
            torch.mm(logits.t(), x)

    run()
    return best_of(run)


def assert_parity(work: str, name: str, dtype: torch.dtype) -> None:
    """On few rows; an eps of the dtype, which logits and gradients are rounded to, is the size of what may differ."""
    inputs = heads.inputs_of(work, HeadCase(16, 1031, dtype, 16))
    got = heads.run_of(heads.implementation(work, name), inputs)()
    exact = heads.truth_of(work, inputs)
    rounding = torch.finfo(dtype).eps
    assert_near([x.double() for x in got], exact, [max(5e-5, 4 * rounding)] * len(got))


def timed(benchmark: BenchmarkFixture, work: str, case: HeadCase, name: str, active: float = 1.0) -> None:
    assert_parity(work, name, case.dtype)
    run = heads.run_of(heads.implementation(work, name), heads.inputs_of(work, case, active=active))
    run()
    memory = peak(run, case)
    benchmark.pedantic(synchronised(run), rounds=ROUNDS)
    seconds = benchmark.stats.stats.min
    eager_seconds, whole = eager_costs(work, case)
    floor = products_seconds(case) * PRODUCTS[work] / 3
    benchmark.extra_info |= facts(seconds, eager_seconds, 2 * case.bytes, memory)
    benchmark.extra_info["times_products"] = three_digits(seconds / floor)
    if memory is not None and whole is not None:
        benchmark.extra_info["memory_eager_over_this"] = three_digits(whole / memory)


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
@pytest.mark.parametrize(("work", "name"), WORKS)
def test_linear(benchmark: BenchmarkFixture, case: HeadCase, work: str, name: str) -> None:
    timed(benchmark, work, case, name)


@pytest.mark.parametrize("case", HEADS, ids=lambda case: case.name)
@pytest.mark.parametrize("active", [1.0, 0.25])
def test_active_rows(benchmark: BenchmarkFixture, case: HeadCase, active: float) -> None:
    """A loss to which that share of the tokens contributes; one after the other, for their ratio."""
    timed(benchmark, "loss", case, "fused", active)
