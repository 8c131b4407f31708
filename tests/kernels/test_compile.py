"""torch.compile goes through the operator in one graph, and a new temperature compiles nothing anew."""

import torch
import torch._dynamo.testing
from torch import Tensor

from ppo_fast.ops import fused_logprob


def loss(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logprobs, entropy = fused_logprob.logprobs_and_entropy(logits, labels, temperature, "cpu")
    return (2 * logprobs + entropy).sum()


def test_one_graph_and_no_recompilation_for_a_temperature() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    logits, labels = torch.randn(2, 3, 33, requires_grad=True), torch.randint(33, (2, 3))
    for temperature in (0.7, 0.8, 0.9, 1.0, 1.1):
        gradients = [torch.autograd.grad(f(logits, labels, temperature), logits)[0] for f in (compiled, loss)]
        assert torch.equal(*gradients)
    # One for the first value, one more where Dynamo learns that it varies; 1.0 is no special case.
    assert counter.frame_count == 2


def test_inductor() -> None:
    torch._dynamo.reset()
    logits, labels = torch.randn(2, 33, requires_grad=True), torch.randint(33, (2,))
    compiled = torch.compile(loss, fullgraph=True)
    gradients = [torch.autograd.grad(f(logits, labels, 0.7), logits)[0] for f in (compiled, loss)]
    torch.testing.assert_close(*gradients)
