"""What `patch(..., strict=False)` lets our ops give, where the originals give NaN: the rows of the README's table."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from ppo_fast.integrations import contract, deepspeed_chat, trl, trlx
from ppo_fast.integrations.trl import ppo


@pytest.fixture(params=[True, False], ids=["strict", "not strict"])
def strict(request: pytest.FixtureRequest) -> Iterator[bool]:
    contract.set_strict(request.param)
    yield request.param
    contract.set_strict(True)


def test_entropy_with_an_impossible_token(strict: bool) -> None:
    logits = torch.zeros(1, 3, 4)
    logits[..., 2:] = -torch.inf
    want = torch.full((1, 3), torch.nan if strict else torch.log(torch.tensor(2.0)).item())
    labels = torch.zeros(1, 3, dtype=torch.int64)
    for entropy in (
        trl.entropy_from_logits(logits),
        ppo.entropy_from_logits(logits),
        trl.selective_log_softmax_and_entropy(logits, labels)[1],
        trl.fused_logprob_entropy(logits, labels)[1],
    ):
        torch.testing.assert_close(entropy, want, equal_nan=True)


def test_a_bias_that_forbids_a_token(strict: bool) -> None:
    bias = torch.tensor([0.0, 0.0, -torch.inf])
    results = trl.chunked_logprobs(torch.zeros(2, 4), torch.zeros(3, 4), bias, torch.tensor([0, 1]), 1.0, 8)
    want = torch.full((2,), torch.nan if strict else torch.log(torch.tensor(2.0)).item())
    torch.testing.assert_close(results.entropy, want, equal_nan=True)


def test_variance_beside_nan_and_of_one_slot(strict: bool) -> None:
    values, mask = torch.tensor([[1.0, 3.0, torch.nan]]), torch.tensor([[True, True, False]])
    assert ppo.masked_var(values, mask).isnan() if strict else ppo.masked_var(values, mask) == 2
    one = torch.tensor([[True, False, False]])
    assert ppo.masked_var(values[:, :2], one[:, :2]).isnan() if strict else ppo.masked_var(values, one) == 0


@pytest.mark.parametrize("case", ["empty mask", "NaN under a false mask", "overflow under an advantage of 0"])
def test_losses(strict: bool, case: str) -> None:
    tensors = [torch.full((2, 3), 0.5, requires_grad=i == 0) for i in range(3)]
    mask = torch.ones(2, 3, dtype=torch.int64)
    if case == "empty mask":
        mask.zero_()
    elif case == "NaN under a false mask":
        mask[0, 1], tensors[1][0, 1] = 0, torch.nan
    else:
        tensors[1][0, 0], tensors[2][0, 0] = -100.0, 0.0
    settings = SimpleNamespace(cliprange=0.2, cliprange_value=0.2, vf_coef=1.0, compute_fp32_loss=False)
    losses = [deepspeed_chat.actor_loss_fn(settings, *tensors, mask)]
    if "advantage" not in case:
        losses.append(deepspeed_chat.critic_loss_fn(settings, *tensors, mask))
    logprobs, old, advantages = tensors
    losses.append(trlx.loss(settings, logprobs, logprobs, old, old, advantages, advantages, mask)[0])
    for loss in losses:
        assert loss.isfinite() != strict
        if not strict:
            (gradient,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
            assert gradient.isfinite().all()


def test_whitening_of_one_element(strict: bool) -> None:
    got = trlx.whiten(torch.tensor([[3.0]]))
    assert got.isnan() if strict else got == 0
