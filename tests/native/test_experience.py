"""The experience stage in C++ under every instruction set: rules, layouts, whitening and gradients against float64."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast import build

ISAS = build.build_info()["isas_supported"]
# Whole registers of every instruction set and not, none and one, longer than a tile of 512 slots.
LENGTHS = [16, 0, 33, 1, 128, 700, 64]
LEARN = ("logprobs", "values", "token_rewards", "scores", "bootstrap")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(build.ISA_VARIABLE, request.param)
    assert build.selected_isa() == request.param
    return request.param


def batch() -> dict[str, Tensor]:
    """Packed, with holes at the edges of registers; the paid slot is any that counts, also the last of a register."""
    total = sum(LENGTHS)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    mask = torch.rand(total) < 0.98
    mask[starts[4] + 15 : starts[4] + 49] = False
    index = torch.tensor([15, 0, 32, 0, 127, 511, 48])
    mask[(starts[:-1] + index)[torch.tensor(LENGTHS) > 0]] = True
    tensors = {name: torch.randn(total) for name in ("logprobs", "ref_logprobs", "values", "token_rewards")}
    return {
        **{name: x.masked_fill(~mask, torch.nan) for name, x in tensors.items()},
        "mask": mask,
        "scores": 3 * torch.randn(len(LENGTHS)),
        "bootstrap": torch.randn(len(LENGTHS)),
        "gamma": torch.rand(len(LENGTHS)),
        "lam": torch.rand(len(LENGTHS)),
        "score_index": index,
        "cu_seqlens": starts,
    }


def pad(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same responses as rows of the longest."""
    starts, total = tensors["cu_seqlens"].tolist(), len(tensors["mask"])

    def rows(x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([x[a:b] for a, b in pairwise(starts)], batch_first=True)

    per_token = {name: rows(x) for name, x in tensors.items() if len(x) == total}
    return tensors | per_token | {"cu_seqlens": None}


def outcome(tensors: dict[str, Any], dtype: torch.dtype, impl: str, **options: Any) -> dict[str, Tensor]:
    """The four results, and the gradients of a fixed sum of them."""
    inputs = {
        name: x.to(dtype).detach().requires_grad_(name in LEARN)
        if x is not None and x.is_floating_point()
        else x
        for name, x in tensors.items()
    }
    results = ppo_fast.shaped_gae(**inputs, impl=impl, **options)
    weights = torch.linspace(-1, 1, results[0].numel(), dtype=results[0].dtype).view_as(results[0])
    total = sum((weights.roll(i) * x).sum() for i, x in enumerate(results))
    gradients = torch.autograd.grad(total, [inputs[name] for name in LEARN])
    return {**results._asdict(), **dict(zip(LEARN, gradients, strict=True))}


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("rule", ["carry", "multiply"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_every_number(isa: str, rule: str, whiten: bool, dtype: torch.dtype, kind: str) -> None:
    options: dict[str, Any] = {"mask_rule": rule, "whiten": whiten, "kind": kind}
    bound = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    packed = batch()
    for tensors in (packed, pad(packed)):
        got = outcome(tensors, dtype, "cpu", **options)
        truth = outcome(tensors, torch.float64, "reference", **options)
        for name, exact in truth.items():
            torch.testing.assert_close(
                got[name].double(), exact, rtol=bound, atol=bound * exact.abs().max().item(),
                msg=lambda m, n=name: f"{isa} {n}: {m}",
            )  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_whitening_far_from_zero(isa: str, layout: str) -> None:
    """Advantages near 2^12 that differ by 1: of a mean kept in float alone the rounding is 2^-12 of a deviation."""
    length = 1027
    rewards = 4096 + torch.randint(4, (5, length)).float()
    zeros, mask = torch.zeros_like(rewards), torch.ones_like(rewards)
    token = {
        "logprobs": zeros,
        "ref_logprobs": zeros,
        "values": zeros,
        "mask": mask,
        "token_rewards": rewards,
    }
    if layout == "packed":
        token = {name: x.flatten() for name, x in token.items()}
        token["cu_seqlens"] = torch.arange(6) * length
    out = ppo_fast.shaped_gae(**token, scores=torch.zeros(5), gamma=0.0, impl="cpu").advantages
    exact = rewards.double()
    expected = (exact - exact.mean()) / exact.var(correction=0).sqrt()
    torch.testing.assert_close(out.double().view_as(expected), expected, rtol=3e-7, atol=3e-7)
