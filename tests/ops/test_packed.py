"""Packed sequences give the numbers of the padded ones, bit for bit where the longest one fills the padding."""

import pytest
import torch
from torch import Tensor

import ppo_fast

PACKED_OPS = ("kl_shaped_rewards", "gae", "shaped_gae", "policy_loss", "value_loss")
LENGTHS = [5, 0, 2, 3]
CU_SEQLENS = torch.tensor([0, 5, 5, 7, 10])
INSIDE = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)


def pack(x: Tensor) -> Tensor:
    return x[INSIDE] if x.shape == INSIDE.shape else x


@pytest.mark.parametrize("int_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", PACKED_OPS)
def test_packed_equals_padded(calls, name: str, int_dtype: torch.dtype) -> None:
    call = calls.examples()[name]
    mask = INSIDE & (torch.arange(5) != 1)  # a hole in every sequence
    padded = call.with_gradients()
    packed = {k: pack(x.detach()).requires_grad_(k in call.learns) for k, x in call.tensors.items()}
    a = padded(mask=mask)
    b = call(**{**packed, "mask": pack(mask)}, cu_seqlens=CU_SEQLENS.to(int_dtype))
    # Where advantages learn, they are whitened as they lie in memory: their sums may run in another order.
    learns_whitening = name == "shaped_gae"
    for x, y in zip(calls.results(a), calls.results(b), strict=True):
        if learns_whitening:
            torch.testing.assert_close(pack(x), y, rtol=1e-14, atol=1e-14)
        else:
            assert torch.equal(pack(x), y)
    sum(x.sum() for x in calls.differentiable(a)).backward()
    sum(x.sum() for x in calls.differentiable(b)).backward()
    for k in call.learns:
        torch.testing.assert_close(pack(padded.tensors[k].grad), packed[k].grad)


@pytest.mark.parametrize("name", PACKED_OPS)
def test_every_option_survives_packing(calls, name: str) -> None:
    call = calls.examples()[name]
    options = {
        "kl_shaped_rewards": {"score_index": torch.tensor([1, 0, 0, 2]), "clip_score": 0.5, "kl_coef": 0.3},
        "gae": {"mask_rule": "multiply", "gamma": torch.tensor([0.9, 1, 1, 0.5]), "lam": torch.ones(4)},
        "shaped_gae": {"unbiased": True, "mask_rule": "multiply", "kind": "abs", "lam": 0.3},
        "policy_loss": {"reduction": "seq-mean-token-sum", "clip_low": 0.1, "normalizer": 3.0},
        "value_loss": {"reduction": "seq-mean-token-mean", "clip": None, "normalizer": 3.0},
    }[name]
    packed = {k: pack(x) for k, x in call.tensors.items()} | {"mask": pack(INSIDE)}
    a, b = call(mask=INSIDE, **options), call(**packed, cu_seqlens=CU_SEQLENS, **options)
    plain = call(mask=INSIDE)
    for x, y in zip(calls.results(a), calls.results(b), strict=True):
        torch.testing.assert_close(pack(x), y)
    pairs = zip(calls.results(a), calls.results(plain), strict=True)
    assert not all(torch.equal(x, y) for x, y in pairs), "the options change nothing: the test is blind"


@pytest.mark.parametrize("cu", [[0, 0], [0, 0, 0]])
def test_no_tokens_at_all(cu: list[int]) -> None:
    x = torch.zeros(0, requires_grad=True)
    cu_seqlens = torch.tensor(cu)
    assert ppo_fast.gae(x, x, x, cu_seqlens=cu_seqlens)[0].shape == (0,)
    assert ppo_fast.policy_loss(x, x, x, x, cu_seqlens=cu_seqlens).loss.item() == 0.0
