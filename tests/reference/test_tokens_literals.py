"""KL estimates, rewards, GAE and moments against hand arithmetic."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ppo_fast import reference


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "up", "down"),
    [
        ("k1", 0.5, -0.5),
        ("k2", 0.125, 0.125),  # .5^2 / 2
        ("k3", 0.10653066, 0.14872127),  # e^-.5 - 1 + .5 and e^.5 - 1 - .5
        ("abs", 0.5, 0.5),
    ],
)
def test_kl_estimates(kind: str, up: float, down: float) -> None:
    got = reference.kl_estimate(rows([-1.0, -2.0]), rows([-1.5, -1.5]), kind=kind)
    assert_close(got, rows([up, down]))


def test_kl_clamps_act_on_the_difference_and_on_the_estimate() -> None:
    new, ref = rows([-1.0, -4.0]), rows([-2.0, -2.0])  # d = 1, -2
    assert_close(reference.kl_estimate(new, ref, input_clamp=0.5), rows([0.5, -0.5]))
    assert_close(reference.kl_estimate(new, ref, output_clamp=1.5), rows([1.0, -1.5]))
    # input first: d = 1, -1 gives e^-1 and e - 2; then 0.5 caps the second
    got = reference.kl_estimate(new, ref, kind="k3", input_clamp=1.0, output_clamp=0.5)
    assert_close(got, rows([0.36787944, 0.5]))


def test_an_output_clamp_keeps_the_gradient_of_an_overflowing_k3_at_zero() -> None:
    new = rows([-2000.0, -1.0]).requires_grad_()
    estimate = reference.kl_estimate(new, rows([0.0, -1.5]), kind="k3", output_clamp=10.0)
    assert_close(estimate, rows([10.0, 0.10653066]))
    estimate.sum().backward()
    assert_close(new.grad, rows([0.0, 0.39346934]))  # 1 - e^-.5


NEW, REF = rows([-1.0, -2.0, -3.0]), rows([-1.5, -1.5, -4.0])  # d = .5, -.5, 1
TOOL = torch.tensor([[1, 0, 1]])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1], [-0.05, 0.05, 4.9]),  # -.1 d, and clip(7) = 5 on the last
        ([1, 1, 0], [-0.05, 5.05, 0.0]),
        ([1, 0, 1], [-0.05, 0.0, 4.9]),
        ([0, 1, 0], [0.0, 5.05, 0.0]),
        ([0, 0, 0], [0.0, 0.0, 0.0]),
    ],
)
def test_score_lands_on_the_last_counted_token(mask: list[int], expected: list[float]) -> None:
    got = reference.kl_shaped_rewards(NEW, REF, torch.tensor([7.0]), torch.tensor([mask]))
    assert_close(got, rows(expected), check_dtype=False)


def test_score_clip_is_optional_and_two_sided() -> None:
    ones = torch.ones(1, 3)
    assert_close(
        reference.kl_shaped_rewards(NEW, REF, rows([-7.0])[0], ones)[0, 2], torch.tensor(-5.1).double()
    )
    got = reference.kl_shaped_rewards(NEW, REF, rows([7.0])[0], ones, clip_score=None)
    assert_close(got, rows([-0.05, 0.05, 6.9]))


def test_score_index_chooses_the_paid_slot_and_a_row_without_tokens_gets_nothing() -> None:
    twice = [x.expand(2, 3) for x in (NEW, REF)]
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    got = reference.kl_shaped_rewards(*twice, rows([2.0, 2.0])[0], mask, score_index=torch.tensor([0, 0]))
    assert_close(got, rows([1.95, 0.05, -0.1], [0.0, 0.0, 0.0]))


def test_dense_rewards_are_added_on_counted_tokens() -> None:
    dense = rows([0.1, math.nan, 0.3])
    got = reference.kl_shaped_rewards(NEW, REF, rows([1.0])[0], TOOL, token_rewards=dense)
    assert_close(got, rows([0.05, 0.0, 1.2]))  # -.05 + .1; -.1 + .3 + 1


def test_the_kl_penalty_may_use_another_estimate() -> None:
    got = reference.kl_shaped_rewards(NEW, REF, rows([0.0])[0], torch.ones(1, 3), kind="k2", kl_coef=0.2)
    assert_close(got, rows([-0.025, -0.025, -0.1]))  # -.2 d^2 / 2


def test_gae_with_the_defaults() -> None:
    advantages, returns = reference.gae(rows([0, 0, 1]), rows([0.5, 0.5, 0.5]), torch.ones(1, 3))
    assert_close(advantages, rows([0.45125, 0.475, 0.5]))  # delta = 0, 0, .5; times .95, .95^2
    assert_close(returns, rows([0.95125, 0.975, 1.0]))


def test_gae_with_discount() -> None:
    # delta = .9 * .5 - .5, .9 * .5 - .5, 1 - .5; A_1 = -.05 + .72 * .5, A_0 = -.05 + .72 * .31
    got = reference.gae(rows([0, 0, 1]), rows([0.5, 0.5, 0.5]), torch.ones(1, 3), gamma=0.9, lam=0.8)[0]
    assert_close(got, rows([0.1732, 0.31, 0.5]))


def test_gae_coefficients_may_differ_by_row() -> None:
    two = rows([0, 0, 1], [0, 0, 1]), rows([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    gamma, lam = torch.tensor([1.0, 0.9]), torch.tensor([0.95, 0.8])
    got = reference.gae(*two, torch.ones(2, 3), gamma=gamma, lam=lam)[0]
    assert_close(got, rows([0.45125, 0.475, 0.5], [0.1732, 0.31, 0.5]), rtol=0, atol=1e-6)


SPAN_REWARDS = rows([0.0, math.nan, 7.0, 7.0, 2.0])
SPAN_VALUES = rows([0.5, math.inf, 9.0, 9.0, 0.25])
SPAN_MASK = torch.tensor([[1, 0, 0, 0, 1]])


def test_carry_cuts_a_tool_span_out() -> None:
    advantages, returns = reference.gae(SPAN_REWARDS, SPAN_VALUES, SPAN_MASK, mask_rule="carry")
    # A_4 = 2 - .25; A_0 = (0 + .25 - .5) + .95 * 1.75
    assert_close(advantages, rows([1.4125, 0, 0, 0, 1.75]))
    assert_close(returns, rows([1.9125, 0, 0, 0, 2.0]))


@pytest.mark.parametrize("rule", ["multiply", "none"])
def test_multiply_steps_through_a_tool_span(rule: str) -> None:
    advantages, returns = reference.gae(SPAN_REWARDS, SPAN_VALUES, SPAN_MASK, mask_rule=rule)
    # A_3 = .25 + .95 * 1.75 = 1.9125; A_2 = .95 A_3; A_1 = .95 A_2 = 1.72603125; A_0 = -.5 + .95 A_1
    assert_close(advantages, rows([1.1397296875, 0, 0, 0, 1.75]))
    assert_close(returns, rows([1.6397296875, 0, 0, 0, 2.0]))


@pytest.mark.parametrize("rule", ["carry", "multiply", "none"])
def test_bootstrap_is_the_value_after_the_last_counted_token(rule: str) -> None:
    rewards, values = rows([0, 1, math.nan], [0, 0, 0]), rows([0.5, 0.5, math.nan], [0, 0, 0])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    bootstrap = rows([0.4, 0.4])[0]
    advantages, returns = reference.gae(rewards, values, mask, mask_rule=rule, bootstrap=bootstrap)
    assert_close(advantages, rows([0.855, 0.9, 0], [0, 0, 0]))  # 1 + .4 - .5 = .9; .95 * .9
    assert_close(returns, rows([1.355, 1.4, 0], [0, 0, 0]))


def test_shaped_gae_is_rewards_then_gae_then_whitening() -> None:
    out = reference.shaped_gae(
        rows([-1.0, -2.0]),
        rows([-1.5, -1.5]),
        rows([1.0])[0],
        rows([0.2, 0.4]),
        torch.ones(1, 2),
        lam=0.5,
    )
    assert_close(out.kl, rows([0.5, -0.5]))
    assert_close(out.rewards, rows([-0.05, 1.05]))
    assert_close(out.returns, rows([0.675, 1.05]))  # delta = .15, .65; A = .15 + .325, .65; plus V
    assert_close(out.advantages, rows([-1.0, 1.0]), rtol=0, atol=1e-5)  # .475, .65 around .5625
    assert_close(
        reference.shaped_gae(
            rows([-1.0, -2.0]),
            rows([-1.5, -1.5]),
            rows([1.0])[0],
            rows([0.2, 0.4]),
            torch.ones(1, 2),
            lam=0.5,
            whiten=False,
        ).advantages,
        rows([0.475, 0.65]),
    )


X, X_MASK = rows([1.0, 2.0, 3.0, math.nan]), torch.tensor([[1, 1, 1, 0]])


def test_masked_moments() -> None:
    assert reference.masked_mean(X, X_MASK).item() == 2.0
    assert_close(reference.masked_var(X, X_MASK).item(), 2 / 3)
    assert_close(reference.masked_var(X, X_MASK, unbiased=True).item(), 1.0)


def test_whiten_has_mean_zero_and_rescale_keeps_the_mean() -> None:
    assert_close(reference.masked_whiten(X, X_MASK), rows([-1.22474487, 0, 1.22474487, 0]), rtol=0, atol=1e-7)
    assert_close(reference.masked_whiten(X, X_MASK, unbiased=True), rows([-1.0, 0, 1, 0]), rtol=0, atol=1e-7)
    got = reference.masked_rescale(X, X_MASK)
    assert_close(got, rows([0.77525513, 2, 3.22474487, 0]), rtol=0, atol=1e-7)


def test_moments_along_an_axis() -> None:
    x, mask = rows([1, 2, 9], [4, 5, 6]), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert_close(reference.masked_mean(x, mask, 1), rows([1.5, 0.0])[0])
    assert_close(reference.masked_mean(x, mask, 0), rows([1.0, 2.0, 0.0])[0])
    assert_close(reference.masked_var(x, mask, -1), rows([0.25, 0.0])[0])
    assert_close(reference.masked_var(x, mask, -1, unbiased=True), rows([0.5, 0.0])[0])


@pytest.mark.parametrize("unbiased", [False, True])
def test_one_token_or_none_never_makes_a_nan(unbiased: bool) -> None:
    x = rows([5.0, math.nan])
    one, none = torch.tensor([[1, 0]]), torch.zeros(1, 2)
    assert reference.masked_var(x, one, unbiased=unbiased).item() == 0.0
    assert torch.equal(reference.masked_whiten(x, one, unbiased=unbiased), rows([0.0, 0.0]))
    assert torch.equal(reference.masked_rescale(x, one, unbiased=unbiased), rows([5.0, 0.0]))
    assert reference.masked_mean(x, none).item() == 0.0
    assert reference.masked_var(x, none, unbiased=unbiased).item() == 0.0
    assert torch.equal(reference.masked_whiten(x, none, unbiased=unbiased), rows([0.0, 0.0]))
    assert torch.equal(reference.masked_rescale(x, none, unbiased=unbiased), rows([0.0, 0.0]))
