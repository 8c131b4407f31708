"""The experience stage against arithmetic written out: every implementation gives the numbers of a hand calculation."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import ppo_fast

IMPLS = ["reference", "triton"] if torch.cuda.is_available() else ["reference", "cpu", "triton"]
pytestmark = pytest.mark.parametrize("impl", IMPLS)


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


@pytest.mark.parametrize(("rule", "first"), [("carry", 1.8107), ("multiply", 1.7048)])
def test_a_tool_span_of_three_under_two_rules(impl: str, rule: str, first: float) -> None:
    """Two tokens, three of a tool, three tokens; V = -1.124 everywhere, 1.0991 paid at the end; gamma 1, lambda .95.

    The last delta is 1.0991 + 1.124 = 2.2231. carry: the others are V - V = 0 and the tool's slots are no steps, so
    A_0 = .95^4 * 2.2231 = 1.81073. multiply: V falls to 0 and rises again, delta_1 = 0 + 1.124 and
    delta_4 = -1.124 - 0, and seven steps are taken: A_0 = .95^7 * 2.2231 + .95 * 1.124 - .95^4 * 1.124
    = 1.55247 + 1.06780 - .91550 = 1.70477.
    """
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 1]])
    advantages, returns = ppo_fast.gae(
        row(0, 0, 9, 9, 9, 0, 0, 1.0991), row(*[-1.124] * 8), mask, mask_rule=rule, impl=impl
    )
    assert round(advantages[0, 0].item(), 4) == first
    assert_close(advantages[0, 5:], torch.tensor([0.9025, 0.95, 1.0]) * 2.2231)
    assert_close(returns[0, 0].item(), advantages[0, 0].item() - 1.124, rtol=0, atol=1e-6)
    assert advantages[0, 2:5].tolist() == returns[0, 2:5].tolist() == [0, 0, 0]


def test_the_sources_loop(impl: str) -> None:
    """Its reward, its zeros past the end and its loop from the last token to the first, by hand.

    Row 0 has three tokens: KL rewards -.1 * (.5, -.2, 1.) and a score of 7 cut to 5: r = -.05, .02, 4.9. V = .5, 1, 2:
    delta_2 = 4.9 - 2 = 2.9; delta_1 = .02 + 2 - 1 = 1.02; delta_0 = -.05 + 1 - .5 = .45;
    A_2 = 2.9; A_1 = 1.02 + .95 * 2.9 = 3.775; A_0 = .45 + .95 * 3.775 = 4.03625.
    Row 1 has one: r = -.1 * .3 - 5 = -5.03, from a score of -9; A_0 = -5.03 - .25 = -5.28.
    """
    logprobs = torch.tensor([[-1.0, -2.0, -0.5, 8.0], [-0.4, 8.0, 8.0, 8.0]])
    kl = torch.tensor([[0.5, -0.2, 1.0, 0.0], [0.3, 0.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 2.0, 7.0], [0.25, 7.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    out = ppo_fast.shaped_gae(
        logprobs, logprobs - kl, torch.tensor([7.0, -9.0]), values, mask, whiten=False, impl=impl
    )
    assert_close(out.kl, kl)
    assert_close(out.rewards, torch.tensor([[-0.05, 0.02, 4.9, 0], [-5.03, 0, 0, 0]]))
    assert_close(out.advantages, torch.tensor([[4.03625, 3.775, 2.9, 0], [-5.28, 0, 0, 0]]))
    assert_close(out.returns, torch.tensor([[4.53625, 4.775, 4.9, 0], [-5.03, 0, 0, 0]]))


def test_whitening(impl: str) -> None:
    """Advantages 1, 3 and 8 have mean 4 and variance (9 + 1 + 16) / 3 = 26 / 3, or 26 / 2 where it is unbiased."""
    x = row(1, 3, 8, 5)
    zeros, mask = torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]])
    for unbiased, freedom in ((False, 3), (True, 2)):
        out = ppo_fast.shaped_gae(
            zeros, zeros, torch.zeros(1), zeros, mask,
            token_rewards=x, lam=0.0, unbiased=unbiased, impl=impl,
        )  # fmt: skip
        assert_close(out.advantages, row(-3, -1, 4, 0) / (26 / freedom) ** 0.5)
        assert_close(out.returns, row(1, 3, 8, 0))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", [0.5, -1.0]), ("k2", [0.125, 0.5]), ("k3", [0.10653066, 0.71828183]), ("abs", [0.5, 1.0])],
)
def test_kl_estimates(impl: str, kind: str, expected: list[float]) -> None:
    """d = .5 and -1; k3 = e^-d - 1 + d: .60653066 - .5 and 2.71828183 - 2."""
    got = ppo_fast.kl_estimate(row(-1.0, -2.0), row(-1.5, -1.0), kind=kind, impl=impl)
    assert_close(got, row(*expected))
