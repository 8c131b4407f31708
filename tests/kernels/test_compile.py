"""torch.compile goes through the ops in one graph, and a new coefficient compiles nothing anew."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_logprob

VALUES = (0.7, 0.8, 0.9, 1.0, 1.1)


def loss(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logprobs, entropy = fused_logprob.logprobs_and_entropy(logits, labels, temperature, "cpu")
    return (2 * logprobs + entropy).sum()


def compiled_once(function: Callable[..., Tensor], learns: Tensor, *constants: Tensor) -> None:
    """One graph for the first value, one more where Dynamo learns that it varies; 1.0 is no special case."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for value in VALUES:
        gradients = [
            torch.autograd.grad(f(learns, *constants, value), learns)[0] for f in (compiled, function)
        ]
        assert torch.equal(*gradients)
    assert counter.frame_count == 2


def test_the_fused_operator() -> None:
    compiled_once(loss, torch.randn(2, 3, 33, requires_grad=True), torch.randint(33, (2, 3)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the native kernel runs on the CPU")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_public_row_ops(impl: str) -> None:
    def function(logits: Tensor, labels: Tensor, value: float) -> Tensor:
        logprobs, entropy = ppo_fast.logprobs_and_entropy_from_logits(
            logits, labels, temperature=value, impl=impl
        )
        alone = ppo_fast.logprobs_from_logits(logits, labels, temperature=value, impl=impl)
        return (
            2 * logprobs
            + entropy
            + alone
            + ppo_fast.entropy_from_logits(logits, temperature=value, impl=impl)
        ).sum()

    compiled_once(function, torch.randn(2, 3, 33, requires_grad=True), torch.randint(33, (2, 3)))


def test_exact_kl() -> None:
    def function(logits: Tensor, ref: Tensor, value: float) -> Tensor:
        return ppo_fast.kl_from_logits(logits, ref, temperature=value, impl="triton").sum()

    compiled_once(function, torch.randn(2, 3, 33, requires_grad=True), torch.randn(2, 3, 33))


COEFFICIENTS: list[dict[str, Callable[[float], Any]]] = [
    {"temperature": lambda v: v},
    {"clip_low": lambda v: v - 0.7, "clip_high": lambda v: v - 0.5},
    {"entropy_coef": lambda v: v - 0.9, "kl_coef": lambda v: v},
    {"dual_clip": lambda v: v + 1, "log_ratio_clamp": lambda v: v, "normalizer": lambda v: 3 * v},
]


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=lambda c: ",".join(c))
def test_policy_loss_from_logits(coefficients: dict[str, Callable[[float], Any]]) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def function(
        logits: Tensor, ref: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, value: float
    ) -> Tensor:
        changed = {name: of(value) for name, of in coefficients.items()}
        return ppo_fast.policy_loss_from_logits(
            logits, labels, old, advantages, mask, ref_logits=ref, impl="triton", **changed
        ).loss

    compiled_once(
        function,
        torch.randn(2, 3, 33, requires_grad=True),
        torch.randn(2, 3, 33),
        torch.randint(33, (2, 3)),
        torch.randn(2, 3) - 3,
        torch.randn(2, 3),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the native kernel runs on the CPU")
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_losses_over_tokens(impl: str) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def function(now: Tensor, old: Tensor, target: Tensor, value: float) -> Tensor:
        policy = ppo_fast.policy_loss(
            now, old, target, mask, clip_low=value - 0.7, dual_clip=1 + value, normalizer=value, impl=impl
        )
        critic = ppo_fast.value_loss(now, old, target, mask, clip=value, normalizer=value, impl=impl)
        return policy.loss + critic.loss

    compiled_once(function, torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.randn(2, 3))


def test_inductor() -> None:
    torch._dynamo.reset()
    logits, labels = torch.randn(2, 33, requires_grad=True), torch.randint(33, (2,))
    compiled = torch.compile(loss, fullgraph=True)
    gradients = [torch.autograd.grad(f(logits, labels, 0.7), logits)[0] for f in (compiled, loss)]
    torch.testing.assert_close(*gradients)
