"""The formulas of RLHF-PPO as they are published, each typed out once more in plain Python loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ppo_fast import reference

B, T, V = 3, 5, 7


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def test_kl_shaped_reward(random: torch.Generator) -> None:
    """r_t = -0.1 (logprob_t - ref_logprob_t), plus clip(score, -5, 5) at the last real token."""
    new, ref = normal(random, B, T), normal(random, B, T)
    scores, lengths = [9.0, -9.0, 0.5], [5, 2, 1]
    mask = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        for t in range(lengths[b]):
            expected[b, t] = -0.1 * (new[b, t] - ref[b, t])
        expected[b, lengths[b] - 1] += max(-5.0, min(5.0, scores[b]))
    assert_close(reference.kl_shaped_rewards(new, ref, torch.tensor(scores).double(), mask), expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.5, 0.0)])
def test_gae_is_the_discounted_sum_of_td_errors(random: torch.Generator, gamma: float, lam: float) -> None:
    """A_t = sum over b of (gamma lam)^b delta_{t+b}, delta_t = r_t + gamma V_{t+1} - V_t, V = 0 at the end."""
    rewards, values = normal(random, B, T), normal(random, B, T)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for row in range(B):
        v = [*values[row].tolist(), 0.0]
        delta = [rewards[row, t].item() + gamma * v[t + 1] - v[t] for t in range(T)]
        for t in range(T):
            expected[row, t] = sum((gamma * lam) ** b * delta[t + b] for b in range(T - t))
    advantages, returns = reference.gae(rewards, values, torch.ones(B, T), gamma=gamma, lam=lam)
    assert_close(advantages, expected)
    assert_close(returns, expected + values)


def test_lambda_one_makes_the_return_the_discounted_reward_to_go(random: torch.Generator) -> None:
    """With lambda = 1 the values cancel: return_t = sum over b of gamma^b r_{t+b}."""
    rewards, values = normal(random, B, T), normal(random, B, T)
    returns = reference.gae(rewards, values, torch.ones(B, T), gamma=0.9, lam=1.0)[1]
    for t in range(T):
        assert_close(returns[:, t], sum(0.9**b * rewards[:, t + b] for b in range(T - t)))


def test_clipped_policy_loss(random: torch.Generator) -> None:
    """sum max(-A ratio, -A clip(ratio, 0.8, 1.2)) mask / sum mask, ratio = exp((logprob - old) mask)."""
    new, old, advantages = (normal(random, B, T) for _ in range(3))
    mask = torch.rand(B, T, generator=random) > 0.3
    total = 0.0
    for b in range(B):
        for t in range(T):
            ratio = math.exp((new[b, t] - old[b, t]).item() * float(mask[b, t]))
            a = advantages[b, t].item()
            total += max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)) * float(mask[b, t])
    assert_close(reference.policy_loss(new, old, advantages, mask).loss.item(), total / mask.sum().item())


def test_dual_clip(random: torch.Generator) -> None:
    """Where A < 0 the term is min(that max, -c A)."""
    new, old, advantages = (2 * normal(random, B, T) for _ in range(3))
    ratio = (new - old).exp()
    term = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    bounded = torch.minimum(term, -1.5 * advantages)
    expected = torch.where(advantages < 0, bounded, term).mean()
    assert not torch.equal(torch.where(advantages < 0, bounded, term), term)
    assert_close(reference.policy_loss(new, old, advantages, torch.ones(B, T), dual_clip=1.5).loss, expected)


def test_clipped_value_loss(random: torch.Generator) -> None:
    """0.5 sum max((v - R)^2, (v_clip - R)^2) mask / sum mask, v_clip = clip(v, v_old - 0.2, v_old + 0.2)."""
    values, old, returns = (normal(random, B, T) for _ in range(3))
    mask = torch.rand(B, T, generator=random) > 0.3
    total = 0.0
    for b in range(B):
        for t in range(T):
            v, o, r = (x[b, t].item() for x in (values, old, returns))
            near = min(max(v, o - 0.2), o + 0.2)
            total += max((v - r) ** 2, (near - r) ** 2) * float(mask[b, t])
    expected = 0.5 * total / mask.sum().item()
    assert_close(reference.value_loss(values, old, returns, mask).loss.item(), expected)


@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_row_gradient_is_p_times_a_plus_b_z_minus_c_at_the_label(random: torch.Generator, tau: float) -> None:
    """dz_j = p_j (a + b z_j) - c [j = label], plus k p_j (log p_j - log q_j - KL) for the KL term.

    With g = dloss/dlogprob, N tokens, entropy coefficient e: c = -g / tau, b = e / (N tau^2),
    a = -g / tau + e (H - lse) / (N tau), where log p_j = z_j / tau - lse.
    """
    e, k, n = 0.3, 0.4, B * T
    z = normal(random, B, T, V).requires_grad_()
    ref = normal(random, B, T, V)
    labels = torch.randint(0, V, (B, T), generator=random)
    old, advantages = normal(random, B, T) - 2, normal(random, B, T)
    advantages[0, 0] = 0.0
    reference.policy_loss_from_logits(
        z,
        labels,
        old,
        advantages,
        torch.ones(B, T),
        temperature=tau,
        entropy_coef=e,
        ref_logits=ref,
        kl_coef=k,
    ).loss.backward()

    y = z.detach()
    logp, logq = torch.log_softmax(y / tau, -1), torch.log_softmax(ref / tau, -1)
    p = logp.exp()
    entropy, kl = -(p * logp).sum(-1, keepdim=True), (p * (logp - logq)).sum(-1, keepdim=True)
    ratio = (logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - old).exp()
    clipped = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    g = torch.where(clipped, 0.0, -advantages * ratio / n).unsqueeze(-1)
    a = -g / tau + e * (entropy - torch.logsumexp(y / tau, -1, keepdim=True)) / (n * tau)
    b = e / (n * tau**2)
    label = torch.nn.functional.one_hot(labels, V)
    expected = p * (a + b * y) + g / tau * label + k / (n * tau) * p * (logp - logq - kl)
    assert 0 < clipped.sum() < n
    assert_close(z.grad, expected)


def test_masked_clipped_and_zero_advantage_rows_have_gradient_zero(random: torch.Generator) -> None:
    z = normal(random, 1, 4, V).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 3]])
    logp = reference.logprobs_from_logits(z.detach(), labels)
    old = logp - torch.tensor([[0.0, 0.0, 1.0, 0.0]])  # the third ratio is e
    advantages, mask = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double(), torch.tensor([[0, 1, 1, 1]])
    reference.policy_loss_from_logits(z, labels, old, advantages, mask).loss.backward()
    assert z.grad is not None
    assert torch.equal(z.grad[0, :3], torch.zeros(3, V, dtype=torch.float64))
    assert z.grad[0, 3].abs().min() > 0


def test_with_old_equal_to_new_the_gradient_is_vanilla_policy_gradient(random: torch.Generator) -> None:
    """At ratio 1 the clipped loss has the gradient of -A logprob."""
    new = normal(random, B, T).requires_grad_()
    advantages = normal(random, B, T)
    reference.policy_loss(new, new.detach(), advantages, torch.ones(B, T)).loss.backward()
    assert_close(new.grad, -advantages / (B * T))


def test_k1_and_k3_are_unbiased_for_the_exact_kl(random: torch.Generator) -> None:
    """Their expectation under the policy, summed over every token, is the exact KL."""
    z, ref = normal(random, V), normal(random, V)
    logp, logq = torch.log_softmax(z, -1), torch.log_softmax(ref, -1)
    exact = reference.kl_from_logits(z, ref)
    for kind in ("k1", "k3"):
        assert_close((logp.exp() * reference.kl_estimate(logp, logq, kind=kind)).sum(), exact)
    assert (reference.kl_estimate(logp, logq, kind="k3") >= 0).all()
