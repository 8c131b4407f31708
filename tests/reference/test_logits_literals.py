"""Logits and hidden space against hand arithmetic: logits 0, ln 2, ln 5 are the probabilities 1/8, 2/8, 5/8."""

import math

import pytest
import torch
from torch.testing import assert_close

from ppo_fast import reference

LOGITS = [0.0, math.log(2), math.log(5)]
ENTROPY = 0.90025612  # 1/8 * 2.07944154 + 2/8 * 1.38629436 + 5/8 * 0.47000363
INF = math.inf


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def row(values: list[float] = LOGITS) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("label", "expected"), [(0, -2.07944154), (1, -1.38629436), (2, -0.47000363)])
def test_logprob_is_the_log_of_the_labels_probability(label: int, expected: float) -> None:
    assert_close(reference.logprobs_from_logits(row(), torch.tensor([label])), f64(expected))


def test_logprob_gradient_is_one_hot_minus_probability() -> None:
    z = row()
    reference.logprobs_from_logits(z, torch.tensor([2])).sum().backward()
    assert_close(z.grad, f64(-1 / 8, -2 / 8, 1 - 5 / 8).unsqueeze(0))


def test_entropy_and_its_gradient() -> None:
    z = row()
    logprobs, entropy = reference.logprobs_and_entropy_from_logits(z, torch.tensor([2]))
    assert_close(logprobs, f64(-0.47000363))
    assert_close(entropy, f64(ENTROPY))
    entropy.sum().backward()
    # -p (log p + H): -.125 (-2.07944 + .90026), -.25 (-1.38629 + .90026), -.625 (-.47000 + .90026)
    assert_close(z.grad, f64(0.14739818, 0.12150956, -0.26890774).unsqueeze(0))
    assert_close(reference.entropy_from_logits(row()), f64(ENTROPY))


def test_temperature_divides_the_logits_and_the_gradient() -> None:
    doubled = row([2 * z for z in LOGITS])
    logprobs, entropy = reference.logprobs_and_entropy_from_logits(
        doubled, torch.tensor([2]), temperature=2.0
    )
    assert_close(logprobs, f64(-0.47000363))
    assert_close(entropy, f64(ENTROPY))
    logprobs.sum().backward()
    assert_close(doubled.grad, f64(-1 / 16, -2 / 16, 3 / 16).unsqueeze(0))


def test_one_temperature_a_row() -> None:
    z = torch.tensor([LOGITS, [3 * x for x in LOGITS]], dtype=torch.float64)
    got = reference.logprobs_from_logits(z, torch.tensor([2, 2]), temperature=torch.tensor([1.0, 3.0]))
    assert_close(got, f64(-0.47000363, -0.47000363))


def test_exact_kl_and_its_gradient() -> None:
    z = row([0.0, 0.0])  # 1/2, 1/2
    ref = row([0.0, math.log(3)])  # 1/4, 3/4
    kl = reference.kl_from_logits(z, ref)
    assert_close(kl, f64(0.14384104))  # .5 ln 2 + .5 ln(2/3) = .5 (.69314718 - .40546511)
    kl.sum().backward()
    assert_close(z.grad, f64(0.27465307, -0.27465307).unsqueeze(0))  # .5 (.69314718 - .14384104)
    assert_close(ref.grad, f64(-0.25, 0.25).unsqueeze(0))  # q - p = 1/4 - 1/2, 3/4 - 1/2


def test_impossible_tokens_add_nothing_to_entropy() -> None:
    z = row([-INF, -INF, *LOGITS, -INF])
    logprobs, entropy = reference.logprobs_and_entropy_from_logits(z, torch.tensor([4]))
    assert_close(logprobs, f64(-0.47000363))
    assert_close(entropy, f64(ENTROPY))
    entropy.sum().backward()
    assert_close(z.grad, f64(0, 0, 0.14739818, 0.12150956, -0.26890774, 0).unsqueeze(0))


def test_an_impossible_label_has_logprob_minus_infinity_and_a_finite_gradient() -> None:
    z = row([-INF, *LOGITS])
    logprobs = reference.logprobs_from_logits(z, torch.tensor([0]))
    assert logprobs.item() == -INF
    logprobs.sum().backward()
    assert z.grad is not None
    assert torch.isfinite(z.grad[0, 1:]).all()


def test_tokens_impossible_under_both_policies_add_nothing_to_kl() -> None:
    z, ref = row([-INF, 0.0, 0.0]), row([-INF, 0.0, math.log(3)])
    kl = reference.kl_from_logits(z, ref)
    assert_close(kl, f64(0.14384104))
    kl.sum().backward()
    assert_close(z.grad, f64(0, 0.27465307, -0.27465307).unsqueeze(0))


def test_kl_is_infinite_where_the_reference_forbids_a_token_and_finite_where_only_the_policy_does() -> None:
    assert reference.kl_from_logits(row([0.0, 0.0]), row([0.0, -INF])).item() == INF
    assert_close(reference.kl_from_logits(row([0.0, -INF]), row([0.0, 0.0])), f64(0.69314718))


@pytest.mark.parametrize("offset", [2.0**14, -(2.0**14)])
def test_a_large_common_offset_changes_no_bit(offset: float) -> None:
    # Multiples of 2^-8 below 16: exact in float32 next to 2^14, whose spacing there is 2^-9.
    z = torch.randint(-4096, 4096, (5, 33), generator=torch.Generator().manual_seed(0)).float() / 256
    labels = torch.arange(5)
    for near, far in zip(
        reference.logprobs_and_entropy_from_logits(z, labels),
        reference.logprobs_and_entropy_from_logits(z + offset, labels),
        strict=True,
    ):
        assert torch.equal(near, far)
    assert torch.equal(reference.kl_from_logits(z + offset, z - offset), torch.zeros(5))


@pytest.mark.parametrize("label", [-1, 3, -100, 2**40])
def test_the_oracle_gives_nan_for_a_label_outside_the_vocabulary(label: int) -> None:
    got = reference.logprobs_from_logits(row(), torch.tensor([label]))
    assert math.isnan(got.item())


HIDDEN = [1.0, 2.0]
WEIGHT = [[0.0, 0.0], [math.log(2), 0.0], [1.0, (math.log(5) - 1) / 2]]  # hidden @ weight.T = LOGITS


def test_linear_logprobs_projects_first() -> None:
    h, w = torch.tensor([HIDDEN], dtype=torch.float64), torch.tensor(WEIGHT, dtype=torch.float64)
    logprobs, entropy = reference.linear_logprobs(h, w, torch.tensor([2]), return_entropy=True)
    assert_close(logprobs, f64(-0.47000363))
    assert_close(entropy, f64(ENTROPY))


def test_linear_bias_is_added_before_the_temperature() -> None:
    h = torch.tensor([HIDDEN], dtype=torch.float64)
    w = torch.tensor(WEIGHT, dtype=torch.float64)
    bias = f64(0.0, math.log(2), math.log(5))  # logits become twice LOGITS
    got = reference.linear_logprobs(h, w, torch.tensor([2]), bias=bias, temperature=2.0)
    assert_close(got, f64(-0.47000363))


def test_softcap_bends_the_logits_before_the_temperature() -> None:
    cap = 4.0
    bent = [[cap * math.atanh(2 * z / cap)] for z in LOGITS]  # cap * tanh(bent / cap) = 2 z
    w = torch.tensor(bent, dtype=torch.float64)
    h = torch.ones(1, 1, dtype=torch.float64)
    got = reference.linear_logprobs(h, w, torch.tensor([2]), softcap=cap, temperature=2.0)
    assert_close(got, f64(-0.47000363))


def test_linear_kl_lets_the_reference_have_its_own_width() -> None:
    h, w = torch.ones(1, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    ref_h = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    ref_w = torch.tensor([[0.0, 0.0], [math.log(3) / 2, 0.0]], dtype=torch.float64)
    assert_close(reference.linear_kl(h, w, ref_h, ref_w), f64(0.14384104))
    shifted = reference.linear_kl(h, w, ref_h, ref_w, bias=f64(1, 1), ref_bias=f64(0, -math.log(3)))
    assert_close(shifted, f64(0.0))


def test_the_softcap_bends_both_models_alike() -> None:
    h, w = torch.tensor([[HIDDEN]], dtype=torch.float64), torch.tensor(WEIGHT, dtype=torch.float64)
    assert_close(reference.linear_kl(h, w, h, w, softcap=0.5), torch.zeros(1, 1, dtype=torch.float64))
    one = torch.ones(1, 1, dtype=torch.float64)
    out = reference.linear_policy_loss(
        h, w, one.long(), -one, one, one, softcap=0.5, ref_hidden=h, ref_weight=w, kl_coef=1.0
    )
    assert_close(out.stats["kl"].item(), 0.0)
