"""Gradients of every op: right in float64, in the input's dtype, zero on an empty mask, bounded by no NaN."""

import math

import pytest
import torch

import ppo_fast


def test_gradients_agree_with_finite_differences(calls, op: str) -> None:
    call = calls.examples()[op].with_gradients()
    names = [name for name in call.tensors if name in call.learns]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = calls.differentiable(call(**dict(zip(names, tensors, strict=True)), impl="reference"))
        assert out
        return tuple(out)

    assert torch.autograd.gradcheck(run, [call.tensors[name] for name in names], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_inputs_give_float32_results_and_their_own_gradients(calls, op: str, dtype: torch.dtype) -> None:
    call = calls.examples(dtype=dtype)[op].with_gradients()
    out = call(impl="reference")
    assert all(x.dtype == torch.float32 for x in calls.results(out))
    sum(x.sum() for x in calls.differentiable(out)).backward()
    for name in call.learns:
        assert call.tensors[name].grad.dtype == dtype
    exact = calls.results(call.to(torch.float64)(impl="reference"))
    for got, truth in zip(calls.results(out), exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=2e-5, atol=2e-5)


def test_float64_stays_float64(calls, op: str) -> None:
    assert all(x.dtype == torch.float64 for x in calls.results(calls.examples()[op]()))


def test_constants_get_no_gradient(calls, op: str) -> None:
    call = calls.examples()[op]
    fresh = {k: x.clone().requires_grad_(x.is_floating_point()) for k, x in call.tensors.items()}
    sum(x.sum() for x in calls.differentiable(call(**fresh, impl="reference"))).backward()
    assert {k for k, x in fresh.items() if x.grad is not None} == set(call.learns)


def test_of_a_loss_only_the_loss_carries_a_gradient(calls) -> None:
    for op in ("policy_loss", "policy_loss_from_logits", "linear_policy_loss", "value_loss"):
        out = calls.examples()[op].with_gradients()(impl="reference")
        assert calls.differentiable(out) == [out.loss]
        assert all(value.dim() == 0 for value in out.stats.values())


def test_an_empty_mask_gives_zero_everywhere(calls, masked_op: str) -> None:
    call = calls.examples()[masked_op].with_gradients()
    out = call(mask=torch.zeros_like(call.tensors["mask"]))
    for x in calls.results(out):
        assert torch.equal(x, torch.zeros_like(x))
    sum(x.sum() for x in calls.differentiable(out)).backward()
    for name in call.learns:
        assert torch.equal(call.tensors[name].grad, torch.zeros_like(call.tensors[name]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_batches_without_tokens(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    scores = torch.zeros(shape[0])
    assert ppo_fast.gae(x, x, x)[0].shape == shape
    assert ppo_fast.shaped_gae(x, x, scores, x, x).kl.shape == shape
    loss = ppo_fast.policy_loss(x, x, x, x).loss + ppo_fast.value_loss(x, x, x, x).loss
    loss.backward()
    assert loss.item() == 0.0


def test_an_overflowing_ratio_under_a_false_mask_or_a_zero_advantage_gives_zero() -> None:
    z = torch.tensor([[[0.0, 200.0], [0.0, 200.0], [0.0, 0.0]]], requires_grad=True)
    out = ppo_fast.policy_loss_from_logits(
        z,
        torch.tensor([[1, 1, 0]]),
        torch.tensor([[-500.0, -500.0, math.log(0.5)]]),
        torch.tensor([[-1.0, 0.0, -1.0]]),
        torch.tensor([[0, 1, 1]]),
    )
    out.loss.backward()
    assert out.loss.item() == 0.5  # the third token alone: ratio 1, over two tokens
    assert torch.equal(z.grad, torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.25, -0.25]]]))
