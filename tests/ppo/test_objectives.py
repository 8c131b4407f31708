"""The scalar rules, by arithmetic."""

from __future__ import annotations

import pytest
import torch

import ppo_fast
from ppo_fast.ppo.config import ObjectiveConfig, OptimizerConfig, PPOConfig, RolloutConfig
from ppo_fast.ppo.objectives import AdaptiveKLController, policy_gradient_loss, update_penalty_coef


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target: unchanged
        (6.6, 0.15 * (1 + 0.1 * 64 / 10_000)),  # 10% over: error 0.1
        (60.0, 0.15 * (1 + 0.2 * 64 / 10_000)),  # error 9 clipped to 0.2
        (0.0, 0.15 * (1 - 0.2 * 64 / 10_000)),  # error -1 clipped to -0.2
    ],
)
def test_adaptive_kl(kl: float, expected: float) -> None:
    controller = AdaptiveKLController(coef=0.15, target=6.0, horizon=10_000)
    controller.update(kl, 64)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_fixed_kl() -> None:
    controller = AdaptiveKLController(coef=0.1, target=None, horizon=10_000)
    controller.update(100.0, 64)
    assert controller.coef == 0.1


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(1.5, 0.4), (1.51, 0.8), (0.66, 0.2), (0.67, 0.4), (1.0, 0.4)],  # target 1: thresholds 1.5 and 0.667
)
def test_penalty_coefficient(kl: float, expected: float) -> None:
    assert update_penalty_coef(0.4, kl, target=1.0) == expected


def test_policy_gradient_by_hand() -> None:
    # -(2 * -0.5 + -1 * -2) / 2 = -(-1 + 2) / 2 = -0.5; the masked slot holds rubbish.
    logprobs = torch.tensor([[-0.5, -2.0, float("nan")]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[2.0, -1.0, float("inf")]], dtype=torch.float64)
    loss = policy_gradient_loss(logprobs, advantages, torch.tensor([[1, 1, 0]]))
    assert loss.item() == pytest.approx(-0.5)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.5, 0.0]]  # -A / 2


def test_the_first_ppo_gradient_is_the_policy_gradient() -> None:
    torch.manual_seed(0)
    old, advantages = -torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    grads = []
    for loss in (
        lambda x: ppo_fast.policy_loss(x, old, advantages, mask).loss,
        lambda x: policy_gradient_loss(x, advantages, mask),
    ):
        logprobs = old.clone().requires_grad_()
        loss(logprobs).backward()
        grads.append(logprobs.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_ppo2_normalises_advantages_and_clips_values() -> None:
    """Whitened advantages have mean 0 and variance 1; a value beyond the clip is judged where it hurts more."""
    advantages = torch.tensor(
        [[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64
    )  # mean 3, variance (4+1+0+9)/4 = 3.5
    white = ppo_fast.masked_whiten(advantages, torch.ones(1, 4))
    torch.testing.assert_close(white, (advantages - 3) / (3.5 + 1e-8) ** 0.5)
    one = torch.ones(1, 1)
    # v = 1, old 0, c 0.2: clipped 0.2; against R = 1: max(0, 0.64) / 2 = 0.32
    assert ppo_fast.value_loss(one, 0 * one, one, one, clip=0.2).loss.item() == pytest.approx(0.32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ObjectiveConfig(kl_coef=-1.0), "objective.kl_coef is -1.0, expected a number >= 0"),
        (lambda: ObjectiveConfig(gamma=1.5), r"objective.gamma is 1.5, expected a number in \[0, 1\]"),
        (lambda: ObjectiveConfig(dual_clip=1.0), "objective.dual_clip is 1.0, expected > 1"),
        (lambda: ObjectiveConfig(clip_low=1.5), "objective.clip_low is 1.5, expected at most 1"),
        (lambda: RolloutConfig(missing_eos_penalty=float("nan")), "rollout.missing_eos_penalty is nan"),
        (lambda: PPOConfig(seed=-1), "seed is -1, expected an integer"),
        (lambda: ObjectiveConfig(epochs=0), "objective.epochs is 0, expected a number > 0"),
        (lambda: ObjectiveConfig(entropy_coef=float("nan")), "objective.entropy_coef is nan"),
        (lambda: RolloutConfig(temperature=0.0), "rollout.temperature is 0.0, expected a number > 0"),
        (lambda: RolloutConfig(top_p=0.0), r"rollout.top_p is 0.0, expected a number in \(0, 1\]"),
        (lambda: RolloutConfig(top_k=-1), "rollout.top_k is -1"),
        (lambda: OptimizerConfig(actor_lr=-1e-5), "optimizer.actor_lr is -1e-05"),
        (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2 is 1.0"),
        (lambda: PPOConfig(steps=0), "steps is 0, expected a number > 0"),
        (
            lambda: PPOConfig(rollout=RolloutConfig(batch_size=10), objective=ObjectiveConfig(minibatches=4)),
            r"objective.minibatches is 4, expected a divisor of rollout.batch_size \(10\)",
        ),
    ],
)
def test_settings_out_of_range(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("kl", [float("nan"), float("inf"), -float("inf")])
def test_adaptive_kl_is_not_moved_by_a_divergence_that_is_not_finite(kl: float) -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
    controller.update(kl, 10)
    assert controller.coef == 0.1
