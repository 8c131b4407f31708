"""The clipped policy loss over tokens, C++ and Triton: padded, packed, against float64 with eager as the yardstick."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_policy, native_tokens
from ppo_fast.records import PolicyLoss

CPU = [] if torch.cuda.is_available() else ["cpu"]
IMPLS = [*CPU, "triton"]
REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
WELL_FORMED = [("cpu", torch.float32), ("cpu", torch.float64), ("triton", torch.float32)]
native = pytest.mark.skipif(not CPU, reason="the native kernels run on the CPU")
LENGTHS = [3, 0, 1500, 1]  # an empty sequence, and one longer than a tile


def padded() -> dict[str, Tensor]:
    """Log ratios of about 0.5, a hole in the long row, a row of nothing; NaN where the mask is 0."""
    old = torch.randn(4, 1600) - 3
    mask = torch.arange(1600) < torch.tensor(LENGTHS).unsqueeze(1)
    mask[2, 700:720] = False
    tensors = {
        "logprobs": old + 0.5 * torch.randn(4, 1600),
        "old_logprobs": old,
        "advantages": torch.randn(4, 1600),
    }
    return {**{name: x.masked_fill(~mask, torch.nan) for name, x in tensors.items()}, "mask": mask}


def run(
    tensors: dict[str, Tensor], impl: str, upstream: float = -1.5, **options: Any
) -> tuple[PolicyLoss, Tensor]:
    logprobs = tensors["logprobs"].detach().clone().requires_grad_()
    out = ppo_fast.policy_loss(**{**tensors, "logprobs": logprobs}, impl=impl, **options)
    return out, torch.autograd.grad(out.loss, logprobs, torch.tensor(upstream, dtype=out.loss.dtype))[0]


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


def assert_parity(
    no_worse: Callable[..., None], tensors: dict[str, Tensor], impl: str, **options: Any
) -> None:
    fused, eager = (run(tensors, name, **options) for name in (impl, "reference"))
    truth = run(cast(tensors, torch.float64), "reference", **options)
    # A bfloat16 gradient is cut off in the interpreter where it is rounded on a GPU.
    cut_off = impl == "triton" and fused[1].dtype != torch.float32
    slack = torch.finfo(fused[1].dtype).eps if cut_off else 1e-6
    no_worse(fused[1], eager[1], truth[1], "gradient", slack)
    for name in ("loss", "logprobs"):
        no_worse(*(getattr(out, name).detach() for out, _ in (fused, eager, truth)), name, 1e-6)
    assert fused[0].entropy is None
    assert fused[0].stats.keys() == truth[0].stats.keys()
    for name in truth[0].stats:
        no_worse(*(out.stats[name] for out, _ in (fused, eager, truth)), name, 1e-6)


@pytest.mark.parametrize("normalizer", [None, 3.5, "tensor"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("impl", IMPLS)
def test_reductions(
    impl: str, reduction: str, normalizer: float | str | None, no_worse: Callable[..., None]
) -> None:
    divisor = torch.tensor(7) if normalizer == "tensor" else normalizer
    assert_parity(no_worse, padded(), impl, reduction=reduction, normalizer=divisor, dual_clip=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_half_inputs(impl: str, dtype: torch.dtype, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, cast(padded(), dtype), impl, clip_low=0.1, clip_high=0.3)


@pytest.mark.parametrize("impl", IMPLS)
def test_log_ratio_clamp(impl: str, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, padded(), impl, log_ratio_clamp=0.3)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, {name: x[:, ::2] for name, x in padded().items()}, impl)
    assert_parity(no_worse, {name: x.T for name, x in padded().items()}, impl)


@native
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64(reduction: str, no_worse: Callable[..., None]) -> None:
    tensors = cast(padded(), torch.float64)
    options = {"reduction": reduction, "dual_clip": 1.5, "log_ratio_clamp": 1.0}
    got, truth = (run(tensors, impl, **options) for impl in ("cpu", "reference"))
    no_worse(got[1], truth[1], truth[1], "gradient")
    no_worse(got[0].loss.detach(), truth[0].loss, truth[0].loss, "loss")
    assert torch.equal(got[0].logprobs, truth[0].logprobs)
    for name, value in truth[0].stats.items():
        no_worse(got[0].stats[name], value, value, name)


@native
def test_each_tensor_may_have_its_own_dtype(no_worse: Callable[..., None]) -> None:
    tensors = padded()
    tensors |= {"logprobs": tensors["logprobs"].bfloat16(), "advantages": tensors["advantages"].half()}
    assert_parity(no_worse, tensors, "cpu")
    wide = tensors | {"old_logprobs": tensors["old_logprobs"].double()}
    got, gradient = run(wide, "cpu")
    truth, _ = run(cast(tensors, torch.float64), "reference")
    assert got.loss.dtype == got.logprobs.dtype == got.stats["ratio_mean"].dtype == torch.float64
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(got.loss, truth.loss, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="impl='triton' is not available for policy_loss: .*float64"):
        run(wide, "triton")


@pytest.mark.parametrize("garbage", [torch.inf, -torch.inf, 1e30, 0.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_false_mask_covers_changes_no_bit(impl: str, garbage: float) -> None:
    """A NaN elsewhere in this file; here what would not show by itself."""
    tensors = padded()
    other = {k: x if k == "mask" else x.masked_fill(~tensors["mask"], garbage) for k, x in tensors.items()}
    a, b = run(tensors, impl, dual_clip=2.0), run(other, impl, dual_clip=2.0)
    assert torch.equal(a[0].loss, b[0].loss)
    assert torch.equal(a[0].logprobs, b[0].logprobs)
    assert torch.equal(a[1], b[1])
    assert all(torch.equal(a[0].stats[name], b[0].stats[name]) for name in a[0].stats)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_overflowing_ratio_is_bounded_where_another_branch_bounds_it(impl: str) -> None:
    """Ratio e^400: clipped for A > 0, capped by the dual clip for A < 0, for A = 0 nothing, dual clip or not."""
    tensors = {"logprobs": torch.zeros(1, 3), "old_logprobs": torch.full((1, 3), -400.0)}
    tensors |= {"advantages": torch.tensor([[1.0, -1.0, 0.0]]), "mask": torch.ones(1, 3)}
    out, gradient = run(tensors, impl, 1.0, dual_clip=3.0)
    assert out.loss.item() == pytest.approx((-1.2 + 3.0) / 3, abs=1e-6)
    assert torch.equal(gradient, torch.zeros(1, 3))
    tensors["mask"] = torch.tensor([[1.0, 0.0, 1.0]])
    out, gradient = run(tensors, impl, 1.0)
    assert out.loss.item() == pytest.approx(-1.2 / 2, abs=1e-6)
    assert torch.equal(gradient, torch.zeros(1, 3))
    assert out.stats["ratio_max"].isinf()
    tensors["mask"] = torch.ones(1, 3)
    out, gradient = run(tensors, impl, 1.0)
    assert out.loss.isinf()
    assert gradient.tolist() == [[0.0, torch.inf, 0.0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_an_infinite_weight_does_not_reach_a_masked_gradient(impl: str) -> None:
    tensors = padded()
    _, gradient = run(tensors, impl, normalizer=torch.tensor(0.0))
    assert bool((gradient[~tensors["mask"]] == 0).all())
    assert not gradient[tensors["mask"]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_shows_where_the_ratio_passes_no_gradient(impl: str) -> None:
    tensors = {"logprobs": torch.ones(1, 2), "old_logprobs": torch.zeros(1, 2), "mask": torch.ones(1, 2)}
    tensors["advantages"] = torch.tensor([[torch.nan, -1.0]])
    out, gradient = run(tensors, impl, log_ratio_clamp=0.5)
    assert out.loss.isnan()
    assert gradient.isnan().tolist() == [[True, False]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_packed_gives_the_bits_of_padded(impl: str, reduction: str) -> None:
    tensors = padded()
    inside = torch.arange(1600) < torch.tensor(LENGTHS).unsqueeze(1)
    packed = {name: x[inside] for name, x in tensors.items()}
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    a, b = (
        run(tensors, impl, reduction=reduction),
        run(packed, impl, reduction=reduction, cu_seqlens=cu_seqlens),
    )
    assert torch.equal(a[0].loss, b[0].loss)
    assert torch.equal(a[0].logprobs[inside], b[0].logprobs)
    assert torch.equal(a[1][inside], b[1])
    assert all(torch.equal(a[0].stats[name], b[0].stats[name]) for name in a[0].stats)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_split_the_gradient_and_a_clip_passes_it_at_its_bound(impl: str) -> None:
    """Log ratios of exact halves and doubles with clips at 0.5 and 2: all the bounds are met exactly."""
    log_ratio = torch.tensor([[0.5, 2.0, 1.0, 4.0, 0.25]]).log()
    for advantage in (1.0, -1.0):
        tensors = {
            "logprobs": log_ratio,
            "old_logprobs": torch.zeros(1, 5),
            "advantages": torch.full((1, 5), advantage),
            "mask": torch.ones(1, 5),
        }
        options = {"clip_low": 0.5, "clip_high": 1.0, "dual_clip": 4.0, "reduction": "token-sum"}
        got, expected = (run(tensors, name, 1.0, **options) for name in (impl, "reference"))
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)
        assert got[1][0].abs().tolist() == pytest.approx(
            [0.5, 2.0, 1.0, 0.0, 0.25] if advantage > 0 else [0.5, 2.0, 1.0, 2.0, 0.0], abs=1e-5
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_tie_outside_of_the_clip_halves_the_gradient(impl: str) -> None:
    """An advantage of three times the least number: 3.9 and 3.6 of it both round to 4, of which the half is 2."""
    least = 2.0**-149
    tensors = {"logprobs": torch.tensor([[1.3]]).log(), "old_logprobs": torch.zeros(1, 1)}
    tensors |= {"advantages": torch.tensor([[3 * least]]), "mask": torch.ones(1, 1)}
    assert run(tensors, impl, 1.0)[1].item() == -2 * least


@pytest.mark.parametrize("impl", IMPLS)
def test_k3_of_tiny_log_ratios_does_not_cancel(impl: str) -> None:
    """x = 1e-3: e^x - 1 - x = 5.0016671e-7, of which float32's e^x - 1 - x keeps one digit."""
    x = torch.full((1, 4), 1e-3)
    out = ppo_fast.policy_loss(x, torch.zeros(1, 4), x, torch.ones(1, 4), impl=impl)
    assert out.stats["approx_kl"].item() == pytest.approx(5.0016671e-7, rel=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_mask_is_zero_and_nan_shows(impl: str) -> None:
    tensors = padded()
    out, gradient = run({**tensors, "mask": torch.zeros(4, 1600)}, impl)
    assert out.loss.item() == 0
    assert bool((gradient == 0).all())
    assert {value.item() for value in out.stats.values()} == {0.0}
    tensors["logprobs"][2, 5] = torch.nan
    out, gradient = run(tensors, impl)
    assert bool(out.loss.isnan())
    assert all(bool(out.stats[name].isnan()) for name in ("approx_kl", "ratio_mean", "ratio_max"))
    assert gradient.isnan().nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("impl", IMPLS)
def test_masks_of_any_dtype(impl: str, dtype: torch.dtype) -> None:
    """Nonzero counts, whatever it is made of."""
    x, y, z = torch.randn(3, 2, 5)
    logits, labels = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    numeric = mask.to(dtype) * 3
    for op, inputs, name in (
        (ppo_fast.policy_loss, (x, y, z), impl),
        (ppo_fast.value_loss, (x, y, z), impl),
        (ppo_fast.policy_loss_from_logits, (logits, labels, y, z), "triton"),
    ):
        a, b = (op(*inputs, m, impl=name).loss for m in (mask, numeric))
        assert torch.equal(a, b), op.__name__


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(impl: str, shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    out, gradient = run({"logprobs": x, "old_logprobs": x, "advantages": x, "mask": x}, impl)
    assert out.loss.item() == 0
    assert out.logprobs.shape == gradient.shape == shape
    assert {value.item() for value in out.stats.values()} == {0.0}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), CPU and WELL_FORMED)
def test_operators_are_well_formed(impl: str, dtype: torch.dtype, packed: bool) -> None:
    shape = (6,) if packed else (2, 3)
    logprobs, old, advantages = torch.randn(3, *shape).unbind()
    old = old.to(dtype)
    mask = torch.rand(shape) > 0.3
    numbers = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "log_ratio_clamp": None}
    device = torch.device("cpu")
    coefficients, normalizer = fused_policy.pack_coefficients(device, normalizer=2.0, impl=impl, **numbers)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32) if packed else None
    tokens = (logprobs.requires_grad_(), old, advantages, mask, coefficients)
    reduction = "seq-mean-token-mean"
    arguments = (*tokens, normalizer, cu_seqlens, reduction, impl)
    torch.library.opcheck(fused_policy.clipped_policy_loss, arguments)
    kept = [x.detach() for x in fused_policy.clipped_policy_loss(*arguments)[-2:]]
    tokens = (logprobs.detach(), *tokens[1:])
    down = torch.tensor(0.5)
    torch.library.opcheck(
        fused_policy.clipped_policy_loss_backward, (down, *tokens, cu_seqlens, *kept, reduction, impl)
    )


@native
@pytest.mark.parametrize("normalizer", [None, 3.5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_token_weights(reduction: str, normalizer: float | None) -> None:
    """d loss / d term is the gradient of the log-probability at a ratio of 1 and an advantage of -1."""
    from ppo_fast.kernels import sequences

    mask = torch.rand(5, 700) < torch.tensor([1.0, 0.5, 0.0, 0.9, 0.01]).unsqueeze(1)
    x = torch.zeros(5, 700, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(5, 700)
    out = ppo_fast.policy_loss(
        x, x.detach(), -ones, mask, reduction=reduction, normalizer=normalizer, impl="reference"
    )
    expected = torch.autograd.grad(out.loss, x)[0].where(mask, -torch.inf)
    scalar = None if normalizer is None else torch.tensor(normalizer, dtype=torch.float64)
    got = native_tokens.token_weights(mask[:, :], scalar, reduction)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
    twin = sequences.token_weights(mask, None if scalar is None else scalar.float(), reduction)
    torch.testing.assert_close(got.float(), twin, rtol=1e-6, atol=0)


@native
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_entropy_and_kl_terms(reduction: str, no_worse: Callable[..., None]) -> None:
    """loss - entropy_coef * entropy + kl_coef * kl, each reduced alike; a KL without a coefficient is only counted."""
    tensors, mask = padded(), padded()["mask"]
    entropy, kl = (torch.rand(2, 4, 1600) + 0.5).masked_fill(~mask, torch.nan).unbind()
    numbers = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "log_ratio_clamp": None}
    rest = {"normalizer": None, "impl": "cpu", "entropy_coef": 0.3}
    base = run(cast(tensors, torch.float64), "reference", reduction=reduction)[0]

    def reduced(x: Tensor) -> Tensor:
        return ppo_fast.reference.losses.aggregate(x.double().where(mask, 0.0), mask, reduction, None)

    for kl_coef, other in ((0.2, kl), (0.0, torch.full_like(kl, torch.inf))):
        packed, _ = fused_policy.pack_coefficients(mask.device, kl_coef=kl_coef, **numbers, **rest)
        loss, stats, *_ = native_tokens.policy_forward(
            *tensors.values(), packed, None, None, reduction=reduction, entropy=entropy, kl=other
        )
        expected = base.loss.detach() - 0.3 * reduced(entropy)
        expected = expected + (kl_coef * reduced(kl) if kl_coef else 0.0)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
        assert stats[4].item() == pytest.approx(entropy[mask].double().mean().item(), rel=1e-6)
        assert stats[5].item() == pytest.approx(other[mask].double().mean().item(), rel=1e-6)
        assert stats[2].item() == pytest.approx(base.stats["ratio_mean"].item(), rel=1e-6)


def test_a_program_for_every_row_and_sequence_on_the_axis_that_takes_2_31(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ppo_fast.kernels import policy_loss, sequences, tokens, value_loss

    grids: dict[str, tuple[int, ...]] = {}

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids[self.name] = grid
            return lambda **_: None

    for module in (policy_loss, sequences, tokens, value_loss):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name))
    x = torch.zeros(70_000, 1, requires_grad=True)
    mask = torch.ones(70_000, 1)
    ppo_fast.policy_loss(x, mask, mask, mask, impl="triton").loss.backward()
    ppo_fast.value_loss(x, mask, mask, mask, impl="triton").loss.backward()
    logits = torch.zeros(70_000, 1, 2, requires_grad=True)
    labels = torch.zeros(70_000, 1, dtype=torch.int64)
    ppo_fast.policy_loss_from_logits(logits, labels, mask, mask, mask, impl="triton").loss.backward()
    of_batch = {
        name: grid for name, grid in grids.items() if not name.endswith(("finish_kernel", "divisor_kernel"))
    }
    assert set(of_batch.values()) == {(70_000,)}
    assert {"policy_sums_kernel", "policy_backward_kernel", "value_sums_kernel", "value_backward_kernel",
            "policy_rows_kernel", "policy_gradient_kernel", "token_weights_kernel"} <= of_batch.keys()  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="untouched pages of the CPU's memory cost nothing")
@pytest.mark.parametrize("op", [ppo_fast.policy_loss, ppo_fast.value_loss])
def test_sequences_past_two_to_the_31_tokens(op: Callable[..., Any]) -> None:
    """The kernel itself, on a packed tensor whose only sequence begins behind 2^31 tokens."""
    from ppo_fast.kernels import tokens, value_loss

    far = 2**31 + 7
    x, y, z = torch.randn(3, 5).to(torch.bfloat16)
    stored = []
    for values in (x, y, z):
        storage = torch.empty(far + 5, dtype=torch.bfloat16)
        storage[far:] = values
        stored.append(storage)
    mask = torch.zeros(far + 5, dtype=torch.bool)
    mask[far:] = True
    starts = torch.tensor([far, far + 5])
    if op is ppo_fast.policy_loss:
        numbers = torch.tensor([0.8, 1.2, torch.inf, torch.inf, 0.0, 0.0, 1.0])
        sums = torch.empty(tokens.POLICY_SUMS, 1)
        tokens.policy_sums_kernel[(1,)](
            *stored, mask, None, None, numbers, starts, None, sums, torch.empty(1, dtype=torch.int64),
            tokens=far + 5, sequences=1, BLOCK=16,
        )  # fmt: skip
    else:
        sums = torch.empty(value_loss.VALUE_SUMS, 1)
        value_loss.value_sums_kernel[(1,)](
            *stored, mask, torch.tensor(0.2), starts, sums, torch.empty(1, dtype=torch.int64),
            tokens=far + 5, sequences=1, BLOCK=16,
        )  # fmt: skip
    loss = op(*(v.unsqueeze(0) for v in (x, y, z)), torch.ones(1, 5), impl="reference").loss
    scale = 5 if op is ppo_fast.policy_loss else 10  # the value loss halves its mean
    torch.testing.assert_close(sums[0, 0] / scale, loss)
