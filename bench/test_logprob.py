"""Log-probability, entropy, and both in one pass, from logits.

    python -m pytest bench/test_logprob.py --benchmark-group-by=param:case,param:op,param:work

Least traffic: one read forward; one read and one write backward.
"""

import eager
import peer
import pytest
import torch
from cases import LOGITS, Case
from measure import DEVICE
from pytest_benchmark.fixture import BenchmarkFixture
from suite import BOTH, FORWARD, IMPL, Function, Subject, compiled, measure
from torch import Tensor

import ppo_fast
from ppo_fast import reference

TEMPERATURE = 0.7  # not 1, so that no implementation skips the division
TRANSFERS = {FORWARD: 1, BOTH: 3}


def eager_function(op: str) -> Function:
    def function(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logp = eager.log_softmax(logits, TEMPERATURE)
        logprobs = () if op == "entropy" else (eager.pick(logp, labels),)
        return logprobs if op == "logprobs" else (*logprobs, eager.entropy_of(logp))

    return function


def function_of(op: str, module: object, **options: str) -> Function:
    """The op of `ppo_fast` or of its reference."""

    def function(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        method = getattr(module, f"{op}_from_logits")
        results = method(logits, *([] if op == "entropy" else [labels]), temperature=TEMPERATURE, **options)
        return results if isinstance(results, tuple) else (results,)

    return function


def implementation(name: str, op: str) -> Function:
    if name == "fused":
        return function_of(op, ppo_fast, impl=IMPL)
    if name in ("eager", "compile"):
        return eager_function(op) if name == "eager" else compiled(eager_function(op))
    return peer.rows(name, op, TEMPERATURE)


COMBINATIONS = [
    (op, work, name)
    for name in ("fused", "eager", *peer.NAMES, "compile")  # compile last: it takes the longest to start
    for op in ("logprobs_and_entropy", "logprobs", "entropy")
    for work in TRANSFERS
    if name not in peer.NAMES or peer.has(name, op, work == BOTH)
]


@pytest.mark.parametrize("case", LOGITS, ids=lambda case: case.name)
@pytest.mark.parametrize(("op", "work", "name"), COMBINATIONS)
def test_logprob(benchmark: BenchmarkFixture, case: Case, op: str, work: str, name: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(case.rows, case.columns, device=DEVICE).mul_(3).to(case.dtype)
    labels = torch.randint(case.columns, (case.rows,), device=DEVICE)
    subject = Subject(
        name=op,
        case=case,
        work=work,
        inputs=(logits, labels),
        few=(logits[:8], labels[:8]),
        truth=function_of(op, reference),
        moved=TRANSFERS[work] * case.bytes,
    )
    measure(benchmark, implementation(name, op), eager_function(op), subject)
