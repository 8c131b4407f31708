"""Ops over tokens: the clipped policy and value losses and whitening, forward and backward.

    python -m pytest bench/test_tokens.py --benchmark-group-by=param:case,param:op

Least traffic: every input read forward and again backward, every result and the gradient written once.
"""

from functools import partial

import eager
import pytest
import torch
from cases import TOKENS, Case
from measure import DEVICE
from pytest_benchmark.fixture import BenchmarkFixture
from suite import BOTH, IMPL, Function, Subject, compiled, measure
from torch import Tensor

import ppo_fast
from ppo_fast import reference

# Tensors of one number a token: read in each direction, written in both together.
TRANSFERS = {"policy_loss": 4 + 4 + 1, "value_loss": 4 + 4 + 1, "masked_whiten": 2 + 3 + 2}
EAGER = {"policy_loss": eager.policy_loss, "value_loss": eager.value_loss, "masked_whiten": eager.whiten}


def eager_function(op: str, *tokens: Tensor) -> tuple[Tensor]:
    return (EAGER[op](*tokens),)


def function_of(module: object, op: str, *tokens: Tensor, **options: str) -> tuple[Tensor]:
    result = getattr(module, op)(*tokens, **options)
    return (result if op == "masked_whiten" else result.loss,)


def implementation(name: str, op: str) -> Function:
    if name == "fused":
        return partial(function_of, ppo_fast, op, impl=IMPL)
    function = partial(eager_function, op)
    return compiled(function) if name == "compile" else function


def inputs_of(op: str, case: Case) -> tuple[Tensor, ...]:
    shape = (case.rows, case.columns)
    mask = (torch.rand(shape, device=DEVICE) < 0.8).to(case.dtype)
    first, *others = (torch.randn(shape, device=DEVICE) for _ in range(3))
    return (first, mask) if op == "masked_whiten" else (0.3 * first, *others, mask)


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case.name)
@pytest.mark.parametrize("op", TRANSFERS)
@pytest.mark.parametrize("name", ["fused", "eager", "compile"])
def test_tokens(benchmark: BenchmarkFixture, case: Case, op: str, name: str) -> None:
    torch.manual_seed(0)
    inputs = inputs_of(op, case)
    subject = Subject(
        name=op,
        case=case,
        work=BOTH,
        inputs=inputs,
        few=tuple(x[:8] for x in inputs),
        truth=partial(function_of, reference, op),
        moved=TRANSFERS[op] * case.bytes,
    )
    measure(benchmark, implementation(name, op), implementation("eager", op), subject)
