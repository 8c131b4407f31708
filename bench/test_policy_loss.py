"""Logits to the clipped policy loss and its gradient; plain, and with an entropy bonus and the exact KL to a reference.

    python -m pytest bench/test_policy_loss.py --benchmark-group-by=param:case,param:objective

Least traffic: one read of the logits (and of the reference's), one write of the gradient; `fused in place` overwrites
the logits.
"""

from functools import partial

import eager
import pytest
import torch
from cases import LOGITS, Case
from measure import DEVICE
from pytest_benchmark.fixture import BenchmarkFixture
from suite import BOTH, IMPL, Function, Subject, compiled, measure
from torch import Tensor

import ppo_fast
from ppo_fast import reference

TEMPERATURE = 0.7
ENTROPY, KL = 0.01, 0.1
TRANSFERS = {"clip": 2, "clip, entropy and KL": 3}
SEQUENCES = 8
NAMES = ("fused in place", "fused", "eager", "compile")


def eager_loss(
    logits: Tensor, ref_logits: Tensor, labels: Tensor, *numbers: Tensor, terms: bool
) -> tuple[Tensor]:
    logp = eager.log_softmax(logits, TEMPERATURE)
    loss = eager.policy_loss(eager.pick(logp, labels), *numbers)
    if terms:
        mask = numbers[-1]
        loss = loss - ENTROPY * eager.masked_mean(eager.entropy_of(logp), mask)
        loss = loss + KL * eager.masked_mean(eager.kl(logits, ref_logits, TEMPERATURE), mask)
    return (loss,)


def loss_of(
    module: object, logits: Tensor, ref_logits: Tensor, *tokens: Tensor, terms: bool, **options: object
) -> tuple[Tensor]:
    """By `ppo_fast` or its reference."""
    if terms:
        options |= {"entropy_coef": ENTROPY, "kl_coef": KL, "ref_logits": ref_logits}
    return (module.policy_loss_from_logits(logits, *tokens, temperature=TEMPERATURE, **options).loss,)


def implementation(name: str, terms: bool) -> Function:
    if name.startswith("fused"):
        inplace = name == "fused in place"
        return partial(loss_of, ppo_fast, terms=terms, impl=IMPL, inplace_backward=inplace)
    function = partial(eager_loss, terms=terms)
    return compiled(function) if name == "compile" else function


def inputs_of(case: Case) -> tuple[Tensor, ...]:
    """Logits, the reference's, labels, old logprobs near the policy's, advantages, and a mask of 7 in 8."""
    shape = (SEQUENCES, case.rows // SEQUENCES)
    ref_logits = torch.randn(*shape, case.columns, device=DEVICE).mul_(3).to(case.dtype)
    logits = ref_logits + torch.randn_like(ref_logits).mul_(0.3)
    labels = torch.randint(case.columns, shape, device=DEVICE)
    with torch.no_grad():
        rows = zip(logits.flatten(0, 1).split(256), labels.flatten().split(256), strict=True)
        old = torch.cat([eager.pick(eager.log_softmax(x, TEMPERATURE), y) for x, y in rows]).view(shape)
    old += 0.1 * torch.randn_like(old)
    mask = (torch.arange(case.rows, device=DEVICE).view(shape) % 8 != 3).float()
    return logits, ref_logits, labels, old, torch.randn(shape, device=DEVICE), mask


@pytest.mark.parametrize("case", LOGITS, ids=lambda case: case.name)
@pytest.mark.parametrize("objective", TRANSFERS)
@pytest.mark.parametrize("name", NAMES)
def test_policy_loss(benchmark: BenchmarkFixture, case: Case, objective: str, name: str) -> None:
    torch.manual_seed(0)
    inputs = inputs_of(case)
    terms = objective != "clip"
    subject = Subject(
        name=objective,
        case=case,
        work=BOTH,
        inputs=inputs,
        few=tuple(x[:, :2].contiguous() for x in inputs),
        truth=partial(loss_of, reference, terms=terms),
        moved=TRANSFERS[objective] * case.bytes,
        overwrites=name == "fused in place",
    )
    measure(benchmark, implementation(name, terms), implementation("eager", terms), subject)
