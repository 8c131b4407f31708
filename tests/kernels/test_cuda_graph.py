"""On a GPU: every op can be captured in a CUDA graph, and a replay computes with what stands in its inputs then."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ppo_fast

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.get_default_device().type != "cuda",
    reason="CUDA graphs need an NVIDIA GPU (make gpu runs this)",
)

B, T, V = 4, 8, 1000


def from_logits(logits: Tensor, numbers: Tensor, mask: Tensor, labels: Tensor) -> list[Tensor]:
    logprobs, entropy = ppo_fast.logprobs_and_entropy_from_logits(logits, labels, temperature=0.7)
    kl = ppo_fast.kl_from_logits(logits, logits.detach().flip(-1))
    loss = ppo_fast.policy_loss_from_logits(
        logits, labels, numbers, numbers, mask, entropy_coef=0.01, normalizer=3.0
    )
    gradient = torch.autograd.grad(logprobs.sum() + entropy.sum() + kl.sum() + loss.loss, logits)
    return [logprobs.detach(), entropy.detach(), kl.detach(), loss.loss.detach(), *gradient]


def over_tokens(logits: Tensor, numbers: Tensor, mask: Tensor, labels: Tensor) -> list[Tensor]:
    out = ppo_fast.shaped_gae(numbers, numbers + 0.1, numbers[:, 0], numbers, mask)
    policy = ppo_fast.policy_loss(numbers, numbers - 0.1, out.advantages, mask, log_ratio_clamp=20.0)
    value = ppo_fast.value_loss(numbers, numbers - 0.1, out.returns, mask)
    return [*out, policy.loss, value.loss, ppo_fast.masked_whiten(numbers, mask)]


@pytest.mark.parametrize("function", [from_logits, over_tokens])
def test_capture_and_replay(function: Callable[..., list[Tensor]]) -> None:
    logits = torch.randn(B, T, V, requires_grad=True)
    numbers, mask = torch.randn(B, T), torch.rand(B, T) < 0.8
    labels = torch.randint(V, (B, T))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, outside the graph
            function(logits, numbers, mask, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(logits, numbers, mask, labels)
    with torch.no_grad():
        logits.copy_(torch.randn(B, T, V))
        numbers.copy_(torch.randn(B, T))
    graph.replay()
    expected = function(logits, numbers, mask, labels)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
