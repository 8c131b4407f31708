"""The losses against hand arithmetic: values, gradients, ties, statistics, reductions."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ppo_fast import reference
from ppo_fast.records import PolicyLoss


def rows(*values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def policy(ratios: list[float], advantages: list[float], **options: object) -> tuple[PolicyLoss, Tensor]:
    """The summed loss of one row of tokens with these ratios, and its gradient by logprob."""
    new = rows([math.log(r) for r in ratios]).requires_grad_()
    out = reference.policy_loss(
        new,
        torch.zeros_like(new),
        rows(advantages),
        torch.ones(1, len(ratios)),
        reduction="token-sum",
        **options,  # type: ignore[arg-type]
    )
    out.loss.backward()
    assert new.grad is not None
    return out, new.grad[0]


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (2.0, 0.5, -1.0, -1.0),  # max(-2 * .5, -2 * .8)
        (2.0, 1.1, -2.2, -2.2),  # inside
        (2.0, 1.5, -2.4, 0.0),  # max(-3, -2 * 1.2): clipped
        (-2.0, 0.5, 1.6, 0.0),  # max(1, 2 * .8): clipped
        (-2.0, 1.1, 2.2, 2.2),  # inside
        (-2.0, 1.5, 3.0, 3.0),  # max(3, 2.4)
    ],
)
def test_the_six_cases_of_the_clip(advantage: float, ratio: float, loss: float, gradient: float) -> None:
    out, got = policy([ratio], [advantage])
    assert_close(out.loss.item(), loss)
    assert_close(got.item(), gradient)
    assert out.stats["clip_fraction"].item() == (1.0 if gradient == 0 else 0.0)


def test_the_two_sides_of_the_clip_are_independent() -> None:
    out, _ = policy([1.5, 0.5], [1.0, -1.0], clip_low=0.1, clip_high=0.3)
    assert_close(out.loss.item(), -1.3 + 0.9)


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        (-2.0, 4.0, 6.0, 0.0),  # min(max(8, 2.4), 3 * 2)
        (-2.0, 2.0, 4.0, 4.0),  # below the dual clip
        (2.0, 4.0, -2.4, 0.0),  # a positive advantage is not touched
    ],
)
def test_dual_clip_bounds_the_loss_of_negative_advantages(
    advantage: float, ratio: float, loss: float, gradient: float
) -> None:
    out, got = policy([ratio], [advantage], dual_clip=3.0)
    assert_close(out.loss.item(), loss)
    assert_close(got.item(), gradient)


def test_log_ratio_clamp_stops_the_gradient_outside() -> None:
    out, got = policy([math.e**2, 1.0], [-1.0, -1.0], log_ratio_clamp=1.0)
    assert_close(out.loss.item(), math.e + 1)
    assert_close(got, rows([0.0, 1.0])[0])
    assert_close(out.stats["ratio_max"].item(), math.e)


def test_a_tie_passes_the_whole_gradient_through_the_clip_at_its_bound() -> None:
    # With no clip range the ratio 1 sits on both bounds: half through each side of the max, both alive.
    _, got = policy([1.0], [2.0], clip_low=0.0, clip_high=0.0)
    assert got.item() == -2.0


def test_a_tie_at_the_dual_clip_halves_the_gradient() -> None:
    ratio = torch.exp(torch.tensor(1.5, dtype=torch.float64)).item()
    new = rows([1.5]).requires_grad_()
    ones = torch.ones(1, 1)
    loss = reference.policy_loss(new, torch.zeros_like(new), rows([-2.0]), ones, dual_clip=ratio).loss
    loss.backward()
    assert_close(new.grad, rows([ratio]))  # half of 2 * ratio


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("advantage", "dual_clip", "expected"), [(0.0, None, 0.0), (1.0, None, -1.2), (-1.0, 3.0, 3.0)]
)
def test_an_overflowing_ratio_that_another_branch_bounds_has_gradient_zero(
    dtype: torch.dtype, advantage: float, dual_clip: float | None, expected: float
) -> None:
    new = torch.tensor([[2000.0]], dtype=dtype, requires_grad=True)
    advantages = torch.tensor([[advantage]], dtype=dtype)
    zero, one = torch.zeros_like(advantages), torch.ones_like(advantages)
    out = reference.policy_loss(new, zero, advantages, one, dual_clip=dual_clip)
    out.loss.backward()
    assert_close(out.loss.item(), expected)
    assert torch.equal(new.grad, zero)  # type: ignore[arg-type]
    assert out.stats["ratio_max"].item() == math.inf


def test_an_overflowing_ratio_without_a_bound_is_an_honest_infinity() -> None:
    new = torch.tensor([[2000.0]], requires_grad=True)
    loss = reference.policy_loss(new, torch.zeros(1, 1), torch.tensor([[-1.0]]), torch.ones(1, 1)).loss
    assert loss.item() == math.inf


def test_policy_statistics() -> None:
    out, _ = policy([2.0, 1.0, 0.5], [1.0, 1.0, 1.0])
    assert_close(out.stats["ratio_mean"].item(), 3.5 / 3)
    assert out.stats["ratio_max"].item() == pytest.approx(2.0)
    assert_close(out.stats["clip_fraction"].item(), 1 / 3)  # only the first is past 1.2
    # 2 - 1 - ln 2 = .30685282; 0; .5 - 1 + ln 2 = .19314718
    assert_close(out.stats["approx_kl"].item(), (0.30685282 + 0.19314718) / 3)
    assert set(out.stats) == {"clip_fraction", "approx_kl", "ratio_mean", "ratio_max"}
    assert not any(value.requires_grad or value.dim() for value in out.stats.values())


def test_on_policy_the_ratio_is_exactly_one_and_the_divergence_exactly_zero() -> None:
    new = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    stats = reference.policy_loss(new, new.clone(), torch.randn(3, 4), torch.ones(3, 4)).stats
    assert (stats["ratio_mean"], stats["ratio_max"], stats["approx_kl"]) == (1.0, 1.0, 0.0)


TERMS = rows([-1.0, -2.0, -3.0], [-4.0, 9.0, 9.0], [9.0, 9.0, 9.0])  # advantages: at ratio 1 the term is -A
TERMS_MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("reduction", "expected", "normalized"),
    [
        ("token-mean", 2.5, 1.25),  # 10 / 4, 10 / 8
        ("token-sum", 10.0, 1.25),
        ("seq-mean-token-sum", 5.0, 1.25),  # (6 + 4) / 2 rows with a token
        ("seq-mean-token-mean", 3.0, 0.75),  # (2 + 4) / 2, (2 + 4) / 8
    ],
)
@pytest.mark.parametrize("normalizer", [8.0, torch.tensor(8)])
def test_reductions(reduction: str, expected: float, normalized: float, normalizer: float | Tensor) -> None:
    zero = torch.zeros_like(TERMS)
    loss = reference.policy_loss(zero, zero, TERMS, TERMS_MASK, reduction=reduction).loss
    assert_close(loss.item(), expected)
    loss = reference.policy_loss(
        zero, zero, TERMS, TERMS_MASK, reduction=reduction, normalizer=normalizer
    ).loss
    assert_close(loss.item(), normalized)
    errors = (2 * TERMS.abs()).sqrt()  # half the square is the term again
    value = reference.value_loss(errors, zero, zero, TERMS_MASK, clip=None, reduction=reduction)
    assert_close(value.loss.item(), expected)


def test_value_loss_takes_the_larger_error() -> None:
    values = rows([1.0, 2.0, 0.6]).requires_grad_()
    old, returns = rows([0.5, 0.5, 0.1]), rows([0.8, 0.6, 1.0])
    out = reference.value_loss(values, old, returns, torch.ones(1, 3))
    # plain .04, 1.96, .16; clipped values .7, .7, .3 give .01, .01, .49
    assert_close(out.loss.item(), 0.5 * (0.04 + 1.96 + 0.49) / 3)
    out.loss.backward()
    assert_close(values.grad, rows([0.2 / 3, 1.4 / 3, 0.0]))  # (v - R) / 3; the clipped one is flat
    assert_close(out.stats["clip_fraction"].item(), 1 / 3)
    # R - v = -.2, -1.4, .4 has squared deviations .04 + 1 + .64; R has .08
    assert_close(out.stats["explained_variance"].item(), 1 - 1.68 / 0.08)
    assert_close(out.stats["value_mean"].item(), 1.2)
    assert_close(out.stats["return_mean"].item(), 0.8)


def test_value_loss_without_clipping() -> None:
    out = reference.value_loss(
        rows([1.0, 0.6]), rows([0.5, 0.1]), rows([0.8, 1.0]), torch.ones(1, 2), clip=None
    )
    assert_close(out.loss.item(), 0.5 * (0.04 + 0.16) / 2)
    assert out.stats["clip_fraction"].item() == 0.0


@pytest.mark.parametrize(
    ("value", "target", "gradient"),
    [
        (2.0, 1.5, 0.25),  # (2 - 1.5)^2 = (1 - 1.5)^2: half of v - R, the clipped half is flat
        (1.0, 0.0, 1.0),  # the clip at its bound passes: both halves
    ],
)
def test_value_ties(value: float, target: float, gradient: float) -> None:
    v = rows([value]).requires_grad_()
    reference.value_loss(v, rows([0.0]), rows([target]), torch.ones(1, 1), clip=1.0).loss.backward()
    assert_close(v.grad, rows([gradient]))


def test_explained_variance_of_constant_returns_is_zero() -> None:
    out = reference.value_loss(rows([1.0, 2.0]), rows([1.0, 2.0]), rows([3.0, 3.0]), torch.ones(1, 2))
    assert out.stats["explained_variance"].item() == 0.0


def test_loss_from_logits_adds_entropy_and_kl() -> None:
    # One token, p = 1/2, 1/2, reference 1/4, 3/4, old probability 1/2, A = 3: -3 - .1 ln 2 + .2 * .14384104
    z = torch.zeros(1, 1, 2, dtype=torch.float64)
    ref = torch.tensor([[[0.0, math.log(3)]]], dtype=torch.float64)
    out = reference.policy_loss_from_logits(
        z,
        torch.tensor([[0]]),
        rows([math.log(0.5)]),
        rows([3.0]),
        torch.ones(1, 1),
        entropy_coef=0.1,
        ref_logits=ref,
        kl_coef=0.2,
    )
    assert_close(out.loss.item(), -3 - 0.1 * 0.69314718 + 0.2 * 0.14384104)
    assert_close(out.stats["entropy"].item(), 0.69314718)
    assert_close(out.stats["kl"].item(), 0.14384104)
    assert_close(out.logprobs, rows([math.log(0.5)]))
    assert_close(out.entropy, rows([0.69314718]))
    assert set(out.stats) == {"clip_fraction", "approx_kl", "ratio_mean", "ratio_max", "entropy", "kl"}
