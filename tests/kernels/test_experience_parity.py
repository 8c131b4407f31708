"""The experience stage in C++ and Triton: every rule and layout against float64, with eager as the yardstick."""

import os
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppo_fast
from ppo_fast import build
from ppo_fast.ops import backends, fused_experience
from ppo_fast.records import Experience

CPU = [] if torch.cuda.is_available() else ["cpu"]
IMPLS = [*CPU, "triton"]
RULES = ["carry", "multiply", "none"]
LENGTHS = [90, 0, 150, 1, 37]  # longer than a tile of the tests, empty, single
WIDTH = 160
TILE = 64  # of the interpreter, which takes a scan element by element; the shipped one is tested once
TOKENS = ("logprobs", "ref_logprobs", "values", "mask", "token_rewards")
SLACK = 3e-6  # sums of hundreds of rounded terms, in an order of their own


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from ppo_fast.kernels import experience, gae_backward

    if "shipped" not in request.node.name:
        for module in (experience, gae_backward):
            monkeypatch.setattr(module, "SCAN_OPTIONS", {**module.SCAN_OPTIONS, "BLOCK": TILE})


def inside() -> Tensor:
    return torch.arange(WIDTH) < torch.tensor(LENGTHS).unsqueeze(1)


def batch(*, holes: bool = True) -> dict[str, Tensor]:
    """Padded responses with tool turns inside; what stands under a false mask is NaN."""
    mask = inside()
    if holes:
        mask[0, 20:30] = False  # inside a tile, and across the border of two
        mask[2, 60:70] = False
        mask[2, 148:150] = False  # the last real token is not the last slot
        mask[4, :2] = False
    tensors = {name: torch.randn(len(LENGTHS), WIDTH) for name in TOKENS if name != "mask"}
    tensors["ref_logprobs"] = tensors["logprobs"] + 0.3 * tensors["ref_logprobs"]
    tensors = {name: x.masked_fill(~mask, torch.nan) for name, x in tensors.items()}
    return {**tensors, "mask": mask, "scores": torch.tensor([7.0, 1.0, -9.0, 0.5, 2.0])}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    packed = {name: x[inside()] if name in TOKENS else x for name, x in tensors.items()}
    return {**packed, "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int()}


def run(tensors: dict[str, Tensor], impl: str, **options: Any) -> Experience:
    return ppo_fast.shaped_gae(**tensors, impl=impl, **options)


def assert_parity(
    no_worse: Callable[..., None], tensors: dict[str, Tensor], impl: str, slack: float = SLACK, **options: Any
) -> Experience:
    fused, eager = (run(tensors, name, **options) for name in (impl, "reference"))
    truth = run(cast(tensors, torch.float64), "reference", **options)
    for name in Experience._fields:
        no_worse(*(getattr(out, name) for out in (fused, eager, truth)), f"{impl} {name}", slack)
    return fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layout", "whiten"), [*product(["padded", "packed"], [False, True])])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_rule_and_layout(
    impl: str, rule: str, layout: str, whiten: bool, dtype: torch.dtype, no_worse: Callable[..., None]
) -> None:
    tensors = cast(batch(), dtype)
    tensors = pack(tensors) if layout == "packed" else tensors
    assert_parity(no_worse, tensors, impl, mask_rule=rule, whiten=whiten, gamma=0.97, lam=0.9)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_shipped_tile(impl: str, no_worse: Callable[..., None]) -> None:
    """Two tiles of 1024 slots, the second cut off by the padding."""
    mask = torch.arange(1100).expand(2, 1100) < torch.tensor([[1090], [700]])
    mask[0, 1015:1030] = False
    tensors = {name: torch.randn(2, 1100) for name in ("logprobs", "ref_logprobs", "values")}
    tensors |= {"mask": mask, "scores": torch.tensor([7.0, -1.0])}
    assert_parity(no_worse, tensors, impl)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_estimate(impl: str, kind: str, no_worse: Callable[..., None]) -> None:
    tensors = batch()
    tensors["logprobs"][0, 0], tensors["ref_logprobs"][0, 0] = -1.0, -1.0 - 1e-5  # where a k3 would cancel
    assert_parity(no_worse, tensors, impl, kind=kind)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_of_each_sequence(
    impl: str, rule: str, unbiased: bool, no_worse: Callable[..., None]
) -> None:
    """Discounts, bootstrap values and the paid slot differ from one sequence to the next."""
    tensors = batch() | {
        "gamma": torch.tensor([1.0, 0.5, 0.99, 0.0, 0.9]),
        "lam": torch.tensor([0.95, 0.5, 0.0, 1.0, 1.0]),
        "bootstrap": torch.tensor([1.0, 2.0, -3.0, 0.5, 4.0]),
        "score_index": torch.tensor([40, 0, 3, 0, 2]),
    }
    for layout in (tensors, pack(tensors)):
        assert_parity(no_worse, layout, impl, mask_rule=rule, unbiased=unbiased)


@pytest.mark.parametrize("impl", IMPLS)
def test_parts_alone(impl: str, no_worse: Callable[..., None]) -> None:
    """`kl_shaped_rewards` and `gae` by themselves, without a clip."""
    tensors = batch()
    shaping = {name: tensors[name] for name in ("logprobs", "ref_logprobs", "scores", "mask")}
    scan = {"rewards": tensors["token_rewards"], "values": tensors["values"], "mask": tensors["mask"]}
    for op, inputs, options in (
        (ppo_fast.kl_shaped_rewards, shaping, {"clip_score": None, "kl_coef": 0.3}),
        (ppo_fast.gae, scan, {"gamma": 0.9}),
    ):
        fused, eager = (op(**inputs, impl=name, **options) for name in (impl, "reference"))
        truth = op(**cast(inputs, torch.float64), impl="reference", **options)
        for got, yardstick, exact in zip(*(torch.stack([*x]) for x in (fused, eager, truth)), strict=True):
            no_worse(got, yardstick, exact, op.__name__, SLACK)


GRADIENTS = ("logprobs", "scores", "token_rewards", "values", "bootstrap")


@pytest.mark.parametrize(("layout", "whiten"), [("padded", False), ("packed", False), ("padded", True)])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_gradient(
    impl: str, rule: str, layout: str, whiten: bool, no_worse: Callable[..., None]
) -> None:
    tensors = batch() | {"bootstrap": torch.randn(len(LENGTHS))}
    tensors = pack(tensors) if layout == "packed" else tensors
    down = [torch.randn_like(tensors["logprobs"]) for _ in range(4)]

    def gradients(dtype: torch.dtype, name: str) -> tuple[Tensor, ...]:
        inputs = {k: x.clone().requires_grad_(k in GRADIENTS) for k, x in cast(tensors, dtype).items()}
        out = run(inputs, name, mask_rule=rule, gamma=0.97, lam=0.9, kind="k3", whiten=whiten)
        leaves = [inputs[k] for k in GRADIENTS]
        return torch.autograd.grad(out, leaves, [x.to(dtype) for x in down])

    fused, eager = gradients(torch.float32, impl), gradients(torch.float32, "reference")
    truth = gradients(torch.float64, "reference")
    for name, *three in zip(GRADIENTS, fused, eager, truth, strict=True):
        no_worse(*three, f"{impl} {name}", SLACK)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize(
    "clamps", [{}, {"input_clamp": 1.0}, {"output_clamp": 0.2}, {"input_clamp": 1.0, "output_clamp": 0.2}]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_kl_estimate_and_its_gradient(
    impl: str, clamps: dict[str, float], kind: str, no_worse: Callable[..., None]
) -> None:
    logprobs = torch.cat([torch.randn(700), torch.tensor([0.0, 1.0, -1.0, 1e-4, -1e-4, 1e-8])])
    ref, down = torch.zeros_like(logprobs), torch.randn_like(logprobs)

    def both(dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor]:
        leaf = logprobs.to(dtype).requires_grad_()
        out = ppo_fast.kl_estimate(leaf, ref.to(dtype), kind=kind, impl=name, **clamps)
        return out.detach(), torch.autograd.grad(out, leaf, down.to(dtype))[0]

    for name, *three in zip(
        ("estimate", "gradient"), both(torch.float32, impl), both(torch.float32, "reference"),
        both(torch.float64, "reference"), strict=True,
    ):  # fmt: skip
        no_worse(*three, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_kl_estimate_of_halves(impl: str, dtype: torch.dtype) -> None:
    logprobs, ref = torch.randn(50).to(dtype), torch.randn(50).to(dtype)
    grads = []
    for name in (impl, "reference"):
        leaf = logprobs.clone().requires_grad_()
        out = ppo_fast.kl_estimate(leaf, ref, kind="k2", impl=name)
        assert out.dtype == torch.float32
        out.sum().backward()
        grads.append(leaf.grad)
    assert grads[0].dtype == dtype
    torch.testing.assert_close(grads[0], grads[1], rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("impl", IMPLS)
def test_an_overflowing_estimate(impl: str, kind: str) -> None:
    """A clamp hides the infinity, in the gradient too; without one it shows."""
    leaf = torch.tensor([-200.0, 200.0], requires_grad=True)
    out = ppo_fast.kl_estimate(leaf, torch.zeros(2), kind=kind, output_clamp=10.0, impl=impl)
    assert out.tolist() == ([10.0, 10.0] if kind == "k3" else [-10.0, 10.0])
    out.sum().backward()
    assert leaf.grad.tolist() == [0.0, 0.0]
    bare = ppo_fast.kl_estimate(leaf.detach(), torch.zeros(2), kind=kind, impl=impl)
    assert bare.tolist() == ([float("inf"), 199.0] if kind == "k3" else [-200.0, 200.0])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_packed_gives_the_bits_of_padded(impl: str, whiten: bool, rule: str) -> None:
    tensors = batch()
    padded = run(tensors, impl, mask_rule=rule, whiten=whiten)
    packed = run(pack(tensors), impl, mask_rule=rule, whiten=whiten)
    for name in Experience._fields:
        assert torch.equal(getattr(padded, name)[inside()], getattr(packed, name)), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_has_the_same_bits_in_any_batch_and_padding(impl: str) -> None:
    tensors = batch()
    together = run(tensors, impl, whiten=False)
    for row, length in enumerate(LENGTHS):
        alone = {
            k: x[row : row + 1, :length] if k in TOKENS else x[row : row + 1] for k, x in tensors.items()
        }
        one = run(alone, impl, whiten=False)
        for name in Experience._fields:
            assert torch.equal(getattr(together, name)[row, :length], getattr(one, name)[0]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_false_mask_covers_changes_no_bit(impl: str) -> None:
    tensors = batch()
    clean = {k: x.nan_to_num(0.0) if k in TOKENS and k != "mask" else x for k, x in tensors.items()}
    infinite = {k: x.nan_to_num(-torch.inf) if k in TOKENS and k != "mask" else x for k, x in tensors.items()}
    infinite = {
        k: x.masked_fill(~tensors["mask"], torch.inf) if k in TOKENS and k != "mask" else x
        for k, x in infinite.items()
    }
    expected = run(clean, impl)
    for garbage in (tensors, infinite):
        assert all(torch.equal(a, b) for a, b in zip(run(garbage, impl), expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str, no_worse: Callable[..., None]) -> None:
    """Slices of columns, as DeepSpeed-Chat passes them, are taken as they are; the rest is copied."""
    tensors = batch()
    sliced = {
        k: torch.nn.functional.pad(x, (9, 3))[:, 9:-3] if k in TOKENS else x for k, x in tensors.items()
    }
    transposed = {k: x.T.contiguous().T if k in TOKENS else x for k, x in tensors.items()}
    skipped = {k: x.repeat_interleave(2, dim=1)[:, ::2] if k in TOKENS else x for k, x in tensors.items()}
    expected = run(tensors, impl)
    for layout in (sliced, transposed, skipped):
        assert not layout["values"].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(run(layout, impl), expected, strict=True))
    expanded = tensors | {"values": torch.randn(1, WIDTH).expand(len(LENGTHS), WIDTH)}
    assert_parity(no_worse, expanded, impl)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_numeric_masks(impl: str, dtype: torch.dtype) -> None:
    tensors = batch()
    numeric = tensors | {"mask": tensors["mask"].to(dtype) * 2}
    for a, b in zip(run(tensors, impl), run(numeric, impl), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_whitening_few_tokens(impl: str, unbiased: bool) -> None:
    """None, or one, which is its own mean: 0, whatever its size; a batch of equal advantages as well."""
    tensors = {k: torch.full((2, 3), 1e4) for k in ("logprobs", "ref_logprobs", "values")}
    tensors |= {"scores": torch.tensor([3.0, 3.0])}
    for counted in ([], [(0, 1)], [(0, 0), (1, 0)]):
        mask = torch.zeros(2, 3, dtype=torch.bool)
        for at in counted:
            mask[at] = True
        out = run(tensors | {"mask": mask}, impl, unbiased=unbiased)
        assert torch.equal(out.advantages, torch.zeros(2, 3))
        assert (out.returns[mask] != 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_whitening_survives_a_large_offset(impl: str) -> None:
    """Advantages near 2^12 that differ by 1: sums of squares would leave nothing of the variance.

    Nor is the mean, 4098, 4097 1/3 or 4098 2/3 there, a float: what rounding takes from it must not go lost.
    """
    for numbers in ([4096.0, 4097.0, 4099.0, 4100.0], [4096.0, 4097.0, 4099.0], [4097.0, 4099.0, 4100.0]):
        rewards = torch.tensor([numbers] * 3)
        zeros, mask = torch.zeros_like(rewards), torch.ones_like(rewards)
        out = ppo_fast.shaped_gae(
            zeros, zeros, zeros[:, 0], zeros, mask, gamma=0.0, token_rewards=rewards, impl=impl
        )
        exact = rewards.double()
        expected = (exact - exact.mean()) / exact.var(correction=0).sqrt()
        torch.testing.assert_close(out.advantages.double(), expected, rtol=1e-6, atol=1e-6)


def test_merged_parts_keep_what_rounding_takes_from_their_mean() -> None:
    """Planes of count, mean, rest of the mean, and squares; in Triton, where they are float32."""
    means = torch.tensor([4096.0, 4097.0, 4099.0])
    parts = torch.stack([torch.full((3,), 2.0), means, torch.zeros(3), torch.zeros(3)])
    count, mean, rest, squares = fused_experience.merge_parts(parts, "triton").double().flatten().tolist()
    assert count == 6
    assert mean + rest == pytest.approx(4097 + 1 / 3, abs=1e-8)
    assert squares == pytest.approx(2 * (16 + 1 + 25) / 9, rel=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_many_sequences(impl: str, monkeypatch: pytest.MonkeyPatch, no_worse: Callable[..., None]) -> None:
    """More parts than one program merges: they are grouped first."""
    from ppo_fast.kernels import experience

    monkeypatch.setattr(experience, "MOST_CHUNKS", 8)
    tensors = {name: torch.randn(70, 5) for name in ("logprobs", "ref_logprobs", "values")}
    tensors |= {"mask": torch.rand(70, 5) < 0.7, "scores": torch.randn(70)}
    assert_parity(no_worse, tensors, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_no_tokens(impl: str, shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    out = ppo_fast.shaped_gae(x, x, torch.zeros(shape[0]), x, x, impl=impl)
    assert all(y.shape == x.shape for y in out)
    assert ppo_fast.gae(x, x, x, impl=impl)[0].shape == x.shape


def test_float64_on_the_cpu(no_worse: Callable[..., None]) -> None:
    if "cpu" not in IMPLS:
        pytest.skip("the native kernel runs on the CPU")
    tensors = cast(batch(), torch.float64)
    got, expected = run(tensors, "cpu", kind="k3"), run(tensors, "reference", kind="k3")
    for name in Experience._fields:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-12, atol=1e-12)
    mixed = batch() | {"values": tensors["values"]}
    assert run(mixed, "cpu").advantages.dtype == torch.float64


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    density=st.floats(0, 1),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    rule=st.sampled_from(RULES),
    whiten=st.booleans(),
)
@pytest.mark.parametrize("impl", IMPLS)
def test_any_mask(
    impl: str,
    seed: int,
    lengths: list[int],
    density: float,
    gamma: float,
    lam: float,
    rule: str,
    whiten: bool,
) -> None:
    random = torch.Generator().manual_seed(seed)
    width = max(1, *lengths)
    shape = (len(lengths), width)
    within = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    mask = within & (torch.rand(shape, generator=random) < density)
    tensors = {k: torch.randn(shape, generator=random) for k in TOKENS if k != "mask"}
    tensors |= {"mask": mask, "scores": torch.randn(len(lengths), generator=random)}
    tensors["bootstrap"] = torch.randn(len(lengths), generator=random)
    options = {"gamma": gamma, "lam": lam, "mask_rule": rule, "whiten": whiten}
    got = run(tensors, impl, **options)
    truth = run(cast(tensors, torch.float64), "reference", **options)
    for name in Experience._fields:
        a, b = getattr(got, name), getattr(truth, name)
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-4 if whiten else 2e-5, msg=name)


def test_what_cannot_run_says_why() -> None:
    assert backends.unavailable("triton", torch.zeros(1, dtype=torch.float64)) is not None
    x = torch.zeros(1, 2)
    with pytest.raises(
        ValueError, match="impl='triton' is not available for gae: it has no kernel for torch.float64"
    ):
        ppo_fast.gae(x, x.double(), x, impl="triton")


@pytest.mark.parametrize("length", [8192, 32768])
def test_whitening_a_sparse_reward_of_a_long_response(length: int) -> None:
    """Values of 0 and one reward at the end: the first advantage met is far from nearly all the others."""
    if "cpu" not in IMPLS:
        pytest.skip("the native kernel runs on the CPU")
    zeros = torch.zeros(1, length)
    given = (zeros, zeros, torch.tensor([4.7]), zeros, zeros + 1)
    for instruction_set in build.build_info()["isas_supported"]:
        with mock.patch.dict(os.environ, {build.ISA_VARIABLE: instruction_set}):
            advantages = ppo_fast.shaped_gae(*given, impl="cpu").advantages
        assert advantages.double().var(unbiased=False).item() == pytest.approx(1.0, abs=2e-5)
        assert advantages.double().mean().item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("wide", ["values", "scores", "token_rewards", "ref_logprobs"])
def test_gradients_of_mixed_dtypes(wide: str) -> None:
    """One input in float64 makes the arithmetic so; every gradient keeps the dtype of its input."""
    if "cpu" not in IMPLS:
        pytest.skip("the native kernel runs on the CPU")
    tensors = batch()
    tensors[wide] = tensors[wide].double()
    down = torch.randn(4, len(LENGTHS), WIDTH, dtype=torch.float64)
    results = []
    for impl, inputs in (("cpu", tensors), ("reference", cast(tensors, torch.float64))):
        leaves = {k: x.clone().requires_grad_(k in GRADIENTS) for k, x in inputs.items()}
        out = run(leaves, impl, whiten=False, kind="k3")
        total = sum((x.double() * d).sum() for x, d in zip(out, down, strict=True))
        names = [k for k in GRADIENTS if k in leaves]
        results.append(dict(zip(names, torch.autograd.grad(total, [leaves[k] for k in names]), strict=True)))
    for name, truth in results[1].items():
        got = results[0][name]
        assert got.dtype == tensors[name].dtype
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_with_numbers_of_each_sequence(impl: str) -> None:
    """Own discounts and an own paid slot; a hole of more than a tile, and scores on both sides of the clip."""
    tensors = batch() | {"bootstrap": torch.randn(len(LENGTHS))}
    tensors["mask"][2, 5:140] = False
    tensors |= {
        "gamma": torch.tensor([1.0, 0.5, 0.99, 0.3, 0.9]),
        "lam": torch.tensor([0.95, 0.5, 0.7, 1.0, 0.8]),
        "score_index": torch.tensor([40, 0, 3, 0, 2]),
        "scores": torch.tensor([3.0, 1.0, -2.0, 0.5, 7.0]),
    }
    results = []
    for name, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        given = {k: x.clone().requires_grad_(k in GRADIENTS) for k, x in cast(tensors, dtype).items()}
        out = run(given, name, whiten=False)
        torch.manual_seed(1)
        total = sum((x.double() * torch.randn(x.shape, dtype=torch.float64)).sum() for x in out)
        results.append(torch.autograd.grad(total, [given[k] for k in GRADIENTS]))
    for name, got, truth in zip(GRADIENTS, *results, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-4, msg=name)
    assert results[0][1][4] == 0  # beyond the clip
    assert results[0][1][0] != 0
