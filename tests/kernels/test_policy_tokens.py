"""The clipped policy loss over tokens in Triton: padded and packed, against float64 with eager as the yardstick."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.records import PolicyLoss

REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
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


def assert_parity(no_worse: Callable[..., None], tensors: dict[str, Tensor], **options: Any) -> None:
    fused, eager = (run(tensors, impl, **options) for impl in ("triton", "reference"))
    truth = run(cast(tensors, torch.float64), "reference", **options)
    # A bfloat16 gradient is cut off in the interpreter where it is rounded on a GPU.
    slack = 1e-6 if fused[1].dtype == torch.float32 else torch.finfo(fused[1].dtype).eps
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
def test_reductions(reduction: str, normalizer: float | str | None, no_worse: Callable[..., None]) -> None:
    divisor = torch.tensor(7) if normalizer == "tensor" else normalizer
    assert_parity(no_worse, padded(), reduction=reduction, normalizer=divisor, dual_clip=1.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype: torch.dtype, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, cast(padded(), dtype), clip_low=0.1, clip_high=0.3)


def test_log_ratio_clamp(no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, padded(), log_ratio_clamp=0.3)


def test_strided_inputs(no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, {name: x[:, ::2] for name, x in padded().items()})
    assert_parity(no_worse, {name: x.T for name, x in padded().items()})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_gives_the_bits_of_padded(reduction: str) -> None:
    tensors = padded()
    inside = torch.arange(1600) < torch.tensor(LENGTHS).unsqueeze(1)
    packed = {name: x[inside] for name, x in tensors.items()}
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    a, b = (
        run(tensors, "triton", reduction=reduction),
        run(packed, "triton", reduction=reduction, cu_seqlens=cu_seqlens),
    )
    assert torch.equal(a[0].loss, b[0].loss)
    assert torch.equal(a[0].logprobs[inside], b[0].logprobs)
    assert torch.equal(a[1][inside], b[1])
    assert all(torch.equal(a[0].stats[name], b[0].stats[name]) for name in a[0].stats)


def test_ties_split_the_gradient_and_a_clip_passes_it_at_its_bound() -> None:
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
        got, expected = (run(tensors, impl, 1.0, **options) for impl in ("triton", "reference"))
        torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)
        assert got[1][0].abs().tolist() == pytest.approx(
            [0.5, 2.0, 1.0, 0.0, 0.25] if advantage > 0 else [0.5, 2.0, 1.0, 2.0, 0.0], abs=1e-5
        )


def test_k3_of_tiny_log_ratios_does_not_cancel() -> None:
    """x = 1e-3: e^x - 1 - x = 5.0016671e-7, of which float32's e^x - 1 - x keeps one digit."""
    x = torch.full((1, 4), 1e-3)
    out = ppo_fast.policy_loss(x, torch.zeros(1, 4), x, torch.ones(1, 4), impl="triton")
    assert out.stats["approx_kl"].item() == pytest.approx(5.0016671e-7, rel=1e-5)


def test_an_empty_mask_is_zero_and_nan_shows() -> None:
    tensors = padded()
    out, gradient = run({**tensors, "mask": torch.zeros(4, 1600)}, "triton")
    assert out.loss.item() == 0
    assert bool((gradient == 0).all())
    assert {value.item() for value in out.stats.values()} == {0.0}
    tensors["logprobs"][2, 5] = torch.nan
    out, gradient = run(tensors, "triton")
    assert bool(out.loss.isnan())
    assert all(bool(out.stats[name].isnan()) for name in ("approx_kl", "ratio_mean", "ratio_max"))
    assert gradient.isnan().nonzero().tolist() == [[2, 5]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    """Nonzero counts, whatever it is made of."""
    x, y, z = torch.randn(3, 2, 5)
    logits, labels = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    numeric = mask.to(dtype) * 3
    for op, inputs in (
        (ppo_fast.policy_loss, (x, y, z)),
        (ppo_fast.value_loss, (x, y, z)),
        (ppo_fast.policy_loss_from_logits, (logits, labels, y, z)),
    ):
        a, b = (op(*inputs, m, impl="triton").loss for m in (mask, numeric))
        assert torch.equal(a, b), op.__name__
