"""Exact KL(pi || ref) of two logits, with its gradient for the policy.

    python -m pytest bench/test_kl.py --benchmark-group-by=param:case,param:work

Least traffic: both read forward; both read and one written backward.
"""

import eager
import pytest
import torch
from cases import LOGITS, Case
from measure import DEVICE
from pytest_benchmark.fixture import BenchmarkFixture
from suite import BOTH, FORWARD, IMPL, Subject, compiled, measure
from torch import Tensor

import ppo_fast
from ppo_fast import reference

TEMPERATURE = 0.7
TRANSFERS = {FORWARD: 2, BOTH: 5}


def eager_kl(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor]:
    return (eager.kl(logits, ref_logits, TEMPERATURE),)


def truth_kl(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor]:
    return (reference.kl_from_logits(logits, ref_logits, temperature=TEMPERATURE),)


def fused_kl(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor]:
    return (ppo_fast.kl_from_logits(logits, ref_logits, temperature=TEMPERATURE, impl=IMPL),)


@pytest.mark.parametrize("case", LOGITS, ids=lambda case: case.name)
@pytest.mark.parametrize("work", TRANSFERS)
@pytest.mark.parametrize("name", ["fused", "eager", "compile"])
def test_kl(benchmark: BenchmarkFixture, case: Case, work: str, name: str) -> None:
    torch.manual_seed(0)
    ref_logits = torch.randn(case.rows, case.columns, device=DEVICE).mul_(3).to(case.dtype)
    logits = ref_logits + torch.randn_like(ref_logits).mul_(0.3)
    subject = Subject(
        name="kl",
        case=case,
        work=work,
        inputs=(logits, ref_logits),
        few=(logits[:8], ref_logits[:8]),
        truth=truth_kl,
        moved=TRANSFERS[work] * case.bytes,
    )
    function = compiled(eager_kl) if name == "compile" else {"fused": fused_kl, "eager": eager_kl}[name]
    measure(benchmark, function, eager_kl, subject)
