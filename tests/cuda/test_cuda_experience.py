"""The experience stage in CUDA: every rule and layout against float64, with eager as the yardstick."""

import os
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_experience, native_cuda
from ppo_fast.records import Experience

ON_GPU = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu") == "cuda"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.parametrize("device", ["gpu" if ON_GPU else "clusters"], indirect=True),  # alike on all
    pytest.mark.usefixtures("device"),
]

RULES = ["carry", "multiply", "none"]
LENGTHS = [2100, 0, 1024, 1, 37]  # three tiles of 1024, empty, one to the brim, single
WIDTH = 2104
TOKENS = ("logprobs", "ref_logprobs", "values", "mask", "token_rewards")
SLACK = 3e-6  # sums of thousands of rounded terms, in an order of their own
DEFAULTS: dict[str, Any] = {
    "kl_coef": 0.1, "clip_score": 5.0, "gamma": 1.0, "lam": 0.95, "kind": "k1", "mask_rule": "carry",
    "whiten": True, "unbiased": False, "group": None,
}  # fmt: skip


def inside() -> Tensor:
    return torch.arange(WIDTH) < torch.tensor(LENGTHS).unsqueeze(1)


def batch() -> dict[str, Tensor]:
    """Padded responses with tool turns inside; what stands under a false mask is NaN."""
    mask = inside()
    mask[0, 20:30] = mask[0, 1020:1030] = False  # inside a tile, and across the border of two
    mask[0, 300:900] = False  # longer than a warp's slots
    mask[2, 1000:1024] = False  # the last real token is not the last slot
    mask[4, :2] = mask[4, 6:9] = False
    tensors = {name: torch.randn(len(LENGTHS), WIDTH) for name in TOKENS if name != "mask"}
    tensors["ref_logprobs"] = tensors["logprobs"] + 0.3 * tensors["ref_logprobs"]
    tensors = {name: x.masked_fill(~mask, torch.nan) for name, x in tensors.items()}
    return {**tensors, "mask": mask, "scores": torch.tensor([7.0, 1.0, -9.0, 0.5, 2.0])}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def pack(tensors: dict[str, Tensor], starts: torch.dtype = torch.int32) -> dict[str, Tensor]:
    packed = {name: x[inside()] if name in TOKENS else x for name, x in tensors.items()}
    return {**packed, "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).to(starts)}


def run(tensors: dict[str, Tensor], impl: str, **options: Any) -> Experience:
    """By the operator itself, which takes the emulated device's tensors, too."""
    if impl == "reference":
        return ppo_fast.shaped_gae(**tensors, impl=impl, **options)
    return fused_experience.shaped_gae(**{**DEFAULTS, **tensors, **options}, impl=impl)


def assert_parity(no_worse: Callable[..., None], tensors: dict[str, Tensor], **options: Any) -> None:
    fused, eager = (run(tensors, name, **options) for name in ("cuda", "reference"))
    truth = run(cast(tensors, torch.float64), "reference", **options)
    for name in Experience._fields:
        no_worse(*(getattr(out, name) for out in (fused, eager, truth)), name, SLACK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layout", "whiten"), [*product(["padded", "packed"], [False, True])])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_rule_and_layout(
    rule: str, layout: str, whiten: bool, dtype: torch.dtype, no_worse: Callable[..., None]
) -> None:
    tensors = cast(batch(), dtype)
    tensors = pack(tensors) if layout == "packed" else tensors
    assert_parity(no_worse, tensors, mask_rule=rule, whiten=whiten, gamma=0.97, lam=0.9)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_every_estimate(kind: str, no_worse: Callable[..., None]) -> None:
    tensors = batch()
    tensors["logprobs"][0, 0], tensors["ref_logprobs"][0, 0] = -1.0, -1.0 - 1e-5  # where a k3 would cancel
    assert_parity(no_worse, tensors, kind=kind)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_numbers_of_each_sequence(rule: str, unbiased: bool, no_worse: Callable[..., None]) -> None:
    """Discounts, bootstrap values and the paid slot differ from one sequence to the next."""
    tensors = batch() | {
        "gamma": torch.tensor([1.0, 0.5, 0.99, 0.0, 0.9]),
        "lam": torch.tensor([0.95, 0.5, 0.0, 1.0, 1.0]),
        "bootstrap": torch.tensor([1.0, 2.0, -3.0, 0.5, 4.0]),
        "score_index": torch.tensor([40, 0, 3, 0, 2]),
    }
    for layout in (tensors, pack(tensors, torch.int64)):
        assert_parity(no_worse, layout, mask_rule=rule, unbiased=unbiased)


@pytest.mark.parametrize("rule", ["carry", "multiply"])
def test_the_numbers_are_those_of_triton(rule: str) -> None:
    """To a few units in the last place of the largest: the scan and the moments are taken in another order."""
    tensors = {k: x[:3, :1100] if k in TOKENS else x[:3] for k, x in batch().items()}
    fused, other = (run(tensors, impl, mask_rule=rule, kind="k3") for impl in ("cuda", "triton"))
    for name in Experience._fields:
        largest = getattr(other, name).abs().max().item()
        torch.testing.assert_close(
            getattr(fused, name),
            getattr(other, name),
            rtol=0,
            atol=2e-6 * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_parts_alone(no_worse: Callable[..., None]) -> None:
    """`kl_shaped_rewards` and `gae` by themselves."""
    tensors = batch()
    shaping = {name: tensors[name] for name in ("logprobs", "ref_logprobs", "scores", "mask")}
    scan = {"rewards": tensors["token_rewards"], "values": tensors["values"], "mask": tensors["mask"]}
    for op, inputs, options in (
        ("kl_shaped_rewards", shaping, {"clip_score": None, "kl_coef": 0.3}),
        ("gae", scan, {"gamma": 0.9, "lam": 0.8}),
    ):
        fused = getattr(fused_experience, op)(**inputs, impl="cuda", **options)
        eager, truth = (
            getattr(ppo_fast, op)(**cast(inputs, dtype), impl="reference", **options)
            for dtype in (torch.float32, torch.float64)
        )
        for got, yardstick, exact in zip(*(torch.stack([*x]) for x in (fused, eager, truth)), strict=True):
            no_worse(got, yardstick, exact, op, SLACK)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("whiten", [False, True])
def test_packed_gives_the_bits_of_padded(whiten: bool, rule: str) -> None:
    tensors = batch()
    padded = run(tensors, "cuda", mask_rule=rule, whiten=whiten)
    packed = run(pack(tensors), "cuda", mask_rule=rule, whiten=whiten)
    for name in Experience._fields:
        assert torch.equal(getattr(padded, name)[inside()], getattr(packed, name)), name


def test_every_schedule_gives_the_same_bits(schedules: Callable[[int], None]) -> None:
    results, tensors = [], batch()
    shaping = {name: tensors[name] for name in ("logprobs", "ref_logprobs", "scores", "mask")}
    for seed in range(5):
        schedules(seed)
        rewards = fused_experience.kl_shaped_rewards(**shaping, impl="cuda")
        results.append((*run(tensors, "cuda"), rewards))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_a_false_mask_covers_changes_no_bit() -> None:
    tensors = batch()
    clean = {k: x.nan_to_num(0.0) if k in TOKENS and k != "mask" else x for k, x in tensors.items()}
    infinite = {
        k: x.masked_fill(~tensors["mask"], torch.inf) if k in TOKENS and k != "mask" else x
        for k, x in tensors.items()
    }
    expected = run(clean, "cuda")
    for garbage in (tensors, infinite):
        assert all(torch.equal(a, b) for a, b in zip(run(garbage, "cuda"), expected, strict=True))


def test_strided_inputs() -> None:
    """Slices of columns are taken as they are, whatever their alignment; the rest is copied."""
    tensors = batch()
    expected = run(tensors, "cuda")
    for before in (1, 2, 3, 8):
        sliced = {
            k: torch.nn.functional.pad(x, (before, 3))[:, before:-3] if k in TOKENS else x
            for k, x in tensors.items()
        }
        assert not sliced["values"].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(run(sliced, "cuda"), expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8, torch.bfloat16])
def test_numeric_masks(dtype: torch.dtype) -> None:
    tensors = batch()
    numeric = tensors | {"mask": tensors["mask"].to(dtype) * 2}
    for a, b in zip(run(tensors, "cuda"), run(numeric, "cuda"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("unbiased", [False, True])
def test_whitening_few_tokens(unbiased: bool) -> None:
    """None, or one, which is its own mean: 0, whatever its size; a batch of equal advantages as well."""
    tensors = {k: torch.full((2, 3), 1e4) for k in ("logprobs", "ref_logprobs", "values")}
    tensors |= {"scores": torch.tensor([3.0, 3.0])}
    for counted in ([], [(0, 1)], [(0, 0), (1, 0)]):
        mask = torch.zeros(2, 3, dtype=torch.bool)
        for at in counted:
            mask[at] = True
        out = run(tensors | {"mask": mask}, "cuda", unbiased=unbiased)
        assert torch.equal(out.advantages, torch.zeros(2, 3))
        assert (out.returns[mask] != 0).all()


def test_whitening_survives_a_large_offset() -> None:
    """Advantages near 2^12 that differ by 1: sums of squares would leave nothing of the variance."""
    rewards = torch.tensor([[4096.0, 4097.0, 4098.0, 4099.0]] * 3)
    zeros, mask = torch.zeros(3, 4), torch.ones(3, 4)
    tensors = {"logprobs": zeros, "ref_logprobs": zeros, "scores": zeros[:, 0], "values": zeros, "mask": mask}
    out = run(tensors, "cuda", gamma=0.0, token_rewards=rewards)
    expected = torch.tensor([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5
    torch.testing.assert_close(out.advantages, expected.expand(3, 4), rtol=1e-6, atol=1e-6)


def test_many_sequences(monkeypatch: pytest.MonkeyPatch, no_worse: Callable[..., None]) -> None:
    """More parts than a whitening merges in every block: they are grouped first."""
    monkeypatch.setattr(native_cuda, "MOST_PARTS", 8)
    tensors = {name: torch.randn(70, 5) for name in ("logprobs", "ref_logprobs", "values")}
    tensors |= {"mask": torch.rand(70, 5) < 0.7, "scores": torch.randn(70)}
    assert_parity(no_worse, tensors)


def test_parts_merge_to_one_and_whiten_alike() -> None:
    """What the ranks of a group exchange: the moments of each as one part."""
    x, mask = 100 + torch.randn(6, 50), torch.rand(6, 50) < 0.8
    _, parts = native_cuda.experience_forward(
        mask, {"logprobs": None, "ref_logprobs": None, "token_rewards": x, "values": torch.zeros_like(x)},
        dict.fromkeys(("scores", "score_index", "bootstrap", "gamma", "lam")),
        torch.zeros(7), None,
        wanted={"rewards": False, "kl": False, "advantages": True, "returns": True},
        kind="k1", mask_rule="carry", moments=True,
    )  # fmt: skip
    halves = torch.cat(
        [fused_experience.merge_parts(half.contiguous(), "cuda") for half in parts.split(3, 1)], 1
    )
    count, pivot, shift, squares = fused_experience.merge_parts(halves, "cuda")[:, 0].double()
    counted = x[mask].double()
    assert count == len(counted)
    torch.testing.assert_close(pivot + shift, counted.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(squares / count, counted.var(unbiased=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    tensors = {"logprobs": x, "ref_logprobs": x, "scores": torch.zeros(shape[0]), "values": x, "mask": x}
    assert all(y.shape == x.shape for y in run(tensors, "cuda"))


def test_gradients_come_from_the_operator(no_worse: Callable[..., None]) -> None:
    tensors = {k: x[:2, :40].nan_to_num() if k in TOKENS else x[:2] for k, x in batch().items()}
    tensors["mask"] = torch.rand(2, 40) < 0.8

    def gradients(dtype: torch.dtype, impl: str) -> tuple[Tensor, ...]:
        inputs = {
            k: x.clone().requires_grad_(k in ("logprobs", "values")) for k, x in cast(tensors, dtype).items()
        }
        out = run(inputs, impl, gamma=0.97, kind="k3", whiten=False)
        total = sum((i + 1) * x.square().sum() for i, x in enumerate(out))
        return torch.autograd.grad(total, [inputs["logprobs"], inputs["values"]])

    fused, eager = gradients(torch.float32, "cuda"), gradients(torch.float32, "reference")
    for three in zip(fused, eager, gradients(torch.float64, "reference"), strict=True):
        no_worse(*three, "gradient", SLACK)
