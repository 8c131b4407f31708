"""The globals of TRL 1.12's PPO trainer, and the formulas that it holds inline."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from trl.experimental.ppo import ppo_trainer as theirs

from ppo_fast.integrations.trl import ppo as ours

Check = Callable[..., None]
MASKS = {
    "bool": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]).bool(),
    "long": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]]),
    "weights": torch.tensor([[0.5, 1, 0, 2], [0, 0.25, 1, 0]]),
    "one": torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]).bool(),
    "all": torch.ones(2, 4).bool(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_var_and_whiten(same: Check, mask: str, dtype: torch.dtype) -> None:
    values = (3 * torch.randn(2, 4) + 2).to(dtype)
    for unbiased in (True, False):
        # The variance of one slot is NaN, and so is what its gradient would be.
        same(
            ours.masked_var,
            theirs.masked_var,
            [values],
            MASKS[mask],
            unbiased=unbiased,
            gradients=mask != "one",
        )
    for shift_mean in (True, False):
        same(
            ours.masked_whiten,
            theirs.masked_whiten,
            [values],
            MASKS[mask],
            shift_mean=shift_mean,
            gradients=mask != "one",
        )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("slot", [(0, 0), (0, 2)], ids=["counted", "masked"])
def test_what_a_nan_spoils(same: Check, bad: float, slot: tuple[int, int]) -> None:
    values = torch.randn(2, 4)
    values[slot] = bad
    for function in ("masked_var", "masked_whiten"):
        same(getattr(ours, function), getattr(theirs, function), [values], MASKS["bool"], gradients=False)


def test_an_empty_mask(same: Check, same_error: Check) -> None:
    values, nothing = torch.randn(2, 4), torch.zeros(2, 4).bool()
    same_error(ours.masked_var, theirs.masked_var, values, nothing)
    same_error(ours.masked_whiten, theirs.masked_whiten, values, nothing)
    same(ours.masked_var, theirs.masked_var, [values], nothing, unbiased=False, gradients=False)


def test_a_mask_that_broadcasts(same: Check) -> None:
    values, mask = torch.randn(3, 2, 4), MASKS["bool"]
    same(ours.masked_var, theirs.masked_var, [values], mask)


# What the trainer does inline, written out in float64.


def padded(batch: int = 4, width: int = 6) -> dict[str, Tensor]:
    """Responses of length 6 (full), 3, 1 and 0; lengths count to the last token, so one less."""
    return {
        "logprobs": -3 * torch.rand(batch, width),
        "ref_logprobs": -3 * torch.rand(batch, width),
        "values": torch.randn(batch, width),
        "scores": 4 * torch.randn(batch),
        "sequence_lengths": torch.tensor([5, 2, 0, -1]),
    }


def truth(
    raw: dict[str, Tensor], kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool
) -> tuple:
    logprobs, ref, values = (raw[name].double().clone() for name in ("logprobs", "ref_logprobs", "values"))
    batch, width = logprobs.shape
    kl, rewards = torch.zeros(batch, width).double(), torch.zeros(batch, width).double()
    token = torch.zeros(batch, width).bool()
    valued = token.clone()
    for b, last in enumerate(raw["sequence_lengths"].tolist()):
        for t in range(width):
            token[b, t], valued[b, t] = t <= last, t <= last + 1
            if not token[b, t]:
                logprobs[b, t] = ref[b, t] = 1.0
            if not valued[b, t]:
                values[b, t] = 0
            gap = ref[b, t] - logprobs[b, t]
            kl[b, t] = -gap if estimator == "k1" else gap.exp() - 1 - gap
        rewards[b] = -kl_coef * kl[b]
        rewards[b, last + 1 if last + 1 < width else last] += raw["scores"][b].double()
    if whiten:
        counted = rewards[valued]
        rewards = (rewards - counted.mean()) / (counted.var() + 1e-8).sqrt() + counted.mean()
        rewards[~valued] = 0
    advantages = torch.zeros_like(rewards)
    for b in range(batch):
        running = 0.0
        for t in reversed(range(width)):
            following = values[b, t + 1] if t + 1 < width else 0.0
            running = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * running
            advantages[b, t] = running
    returns = advantages + values
    counted = advantages[token]
    advantages = (advantages - counted.mean()) / (counted.var() + 1e-8).sqrt()
    advantages[~token] = 0
    return kl, advantages, returns


OPTIONS = list(product([0.05, 0.0], ["k1", "k3"], [1.0, 0.9], [0.95, 0.0, 1.0], [False, True]))


@pytest.mark.parametrize(("kl_coef", "estimator", "gamma", "lam", "whiten"), OPTIONS)
def test_estimates(kl_coef: float, estimator: str, gamma: float, lam: float, whiten: bool) -> None:
    raw = padded()
    rollout = ours.rollout_of(**raw)
    got = ours.estimate(
        rollout, kl_coef=kl_coef, kl_estimator=estimator, gamma=gamma, lam=lam, whiten_rewards=whiten
    )
    kl, advantages, returns = truth(raw, kl_coef, estimator, gamma, lam, whiten)
    for a, b in ((got.kl, kl), (got.advantages, advantages), (got.returns, returns)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.non_score_reward, -kl_coef * got.kl)


def loss_truth(
    logits: Tensor,
    values: Tensor,
    responses: Tensor,
    old: ours.Rollout,
    learned: ours.Estimates,
    clip: tuple[float, float],
) -> dict:
    """Loss and statistics as the trainer writes them, in float64, vf_coef 0.3."""
    scaled = logits / (0.7 + 1e-7)
    logp = scaled.log_softmax(-1)
    logprobs = logp.gather(-1, responses.unsqueeze(-1)).squeeze(-1).masked_fill(old.padding, 1.0)
    values = values.masked_fill(old.value_padding, 0)
    old_values, returns, advantages = (x.double() for x in (old.values, learned.returns, learned.advantages))
    clipped = values.clamp(old_values - clip[1], old_values + clip[1])
    first, second = (values - returns) ** 2, (clipped - returns) ** 2
    valued, token = ~old.value_padding, ~old.padding
    value = 0.5 * torch.max(first, second)[valued].mean()
    gap = logprobs - old.logprobs.double()
    plain, bounded = -advantages * gap.exp(), -advantages * gap.exp().clamp(1 - clip[0], 1 + clip[0])
    policy = torch.max(plain, bounded)[token].mean()
    return {
        "loss": policy + 0.3 * value,
        "policy": policy,
        "value": value,
        "policy_clip_fraction": (bounded > plain)[token].double().mean(),
        "value_clip_fraction": (second > first)[valued].double().mean(),
        "approx_kl": 0.5 * (gap**2).mean(),
        "ratio": gap.exp().mean(),
        "entropy": -(logp.exp() * logp).sum(-1).mean(),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [(0.2, 0.1), (0.0, 0.0), (1.5, 9.0)], ids=str)
def test_losses(dtype: torch.dtype, clip: tuple[float, float]) -> None:
    raw = padded()
    old = ours.rollout_of(**raw)
    learned = ours.estimate(old, kl_coef=0.05, kl_estimator="k1", gamma=1.0, lam=0.95, whiten_rewards=False)
    logits, values = torch.randn(4, 6, 50).to(dtype), torch.randn(4, 6).to(dtype)
    responses = torch.randint(50, (4, 6))
    options = {"temperature": 0.7 + 1e-7, "cliprange": clip[0], "cliprange_value": clip[1], "vf_coef": 0.3}
    leaf, head = logits.clone().requires_grad_(), values.clone().requires_grad_()
    got = ours.losses(leaf, head, responses, old, learned, **options)
    got.loss.backward()
    wide, wide_head = logits.double().requires_grad_(), values.double().requires_grad_()
    want = loss_truth(wide, wide_head, responses, old, learned, clip)
    want["loss"].backward()
    slack = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for name, number in want.items():
        torch.testing.assert_close(
            getattr(got, name).double(), number, rtol=slack, atol=slack, check_dtype=False
        )
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=slack, atol=slack)
    torch.testing.assert_close(head.grad.double(), wide_head.grad, rtol=slack, atol=slack)


def test_nothing_but_padding_gives_nan() -> None:
    raw = padded() | {"sequence_lengths": torch.full((4,), -1)}
    old = ours.rollout_of(**raw)
    zeros = torch.zeros(4, 6)
    learned = ours.Estimates(zeros, zeros, zeros, zeros)
    options = {"temperature": 1.0, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
    got = ours.losses(
        torch.randn(4, 6, 9), zeros, torch.zeros(4, 6, dtype=torch.int64), old, learned, **options
    )
    assert got.policy.isnan()
    assert got.policy_clip_fraction.isnan()
    assert got.loss.isnan()
    assert got.value.isfinite()  # a value counts one slot longer
