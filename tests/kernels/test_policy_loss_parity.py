"""The clipped policy loss in Triton, from logits and over tokens, against float64 with eager as the yardstick."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_policy, fused_policy_rows
from ppo_fast.records import PolicyLoss

# numpy, under Triton's interpreter, warns of the very NaNs and infinities that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

INTERPRETED = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu") == "cpu"
REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
ALL_TERMS = {"entropy_coef": 0.3, "kl_coef": 0.2, "dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.3}
MODES = [False, True]  # inplace_backward


def batch(vocab: int, shape: tuple[int, int] = (3, 4), spread: float = 4.0) -> dict[str, Tensor]:
    """Ratios on both sides of every bound, advantages of both signs, a hole, and (from two sequences) an empty one."""
    logits = torch.randn(*shape, vocab) * spread
    labels = torch.randint(vocab, shape)
    old = torch.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 0.5 * torch.randn(
        shape
    )
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0, -1] = mask[-1, :] = False
    if shape[0] == 1:
        mask[0, 0] = True
    advantages = torch.randn(shape)
    return {"logits": logits, "labels": labels, "old_logprobs": old, "advantages": advantages, "mask": mask}


def from_logits(
    tensors: dict[str, Tensor], impl: str, dtype: torch.dtype, upstream: float = 1.0, **options: Any
) -> tuple[PolicyLoss, Tensor]:
    """Loss record and gradient of the logits, cast to `dtype`; every other floating tensor too if that is float64."""
    wide = dtype == torch.float64
    moved = {k: x.double() if wide and x.is_floating_point() else x for k, x in tensors.items()}
    options = {
        k: x.double() if wide and isinstance(x, Tensor) and k != "normalizer" else x
        for k, x in options.items()
    }
    leaf = tensors["logits"].detach().to(dtype).requires_grad_()
    out = ppo_fast.policy_loss_from_logits(**{**moved, "logits": leaf.clone()}, impl=impl, **options)
    return out, torch.autograd.grad(out.loss, leaf, torch.tensor(upstream, dtype=out.loss.dtype))[0]


def assert_parity(
    no_worse: Callable[..., None], tensors: dict[str, Tensor], slack: float = 1e-6, **options: Any
) -> None:
    dtype = tensors["logits"].dtype
    inplace = options.pop("inplace_backward", False)
    fused = from_logits(tensors, "triton", dtype, inplace_backward=inplace, **options)
    eager, truth = (from_logits(tensors, "reference", d, **options) for d in (dtype, torch.float64))
    cut_off = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 and INTERPRETED else 0.0
    no_worse(*(gradient for _, gradient in (fused, eager, truth)), "gradient", slack + cut_off)
    for name in ("loss", "logprobs", "entropy"):
        no_worse(*(getattr(out, name).detach() for out, _ in (fused, eager, truth)), name, slack)
    assert fused[0].stats.keys() == truth[0].stats.keys()
    for name in truth[0].stats:
        no_worse(*(out.stats[name] for out, _ in (fused, eager, truth)), name, slack)


@pytest.mark.parametrize("inplace", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 127, 4097])
@pytest.mark.usefixtures("poisoned_empty")
def test_no_worse_than_eager(
    vocab: int, dtype: torch.dtype, inplace: bool, no_worse: Callable[..., None]
) -> None:
    tensors = batch(vocab)
    tensors["logits"] = tensors["logits"].to(dtype)
    ref = (torch.randn(3, 4, vocab) * 4).to(dtype)
    assert_parity(no_worse, tensors, inplace_backward=inplace)
    assert_parity(no_worse, tensors, inplace_backward=inplace, ref_logits=ref, temperature=0.7, **ALL_TERMS)


@pytest.mark.parametrize("inplace", MODES)
@pytest.mark.parametrize("vocab", [50257, 151936])
def test_real_vocabularies(vocab: int, inplace: bool, no_worse: Callable[..., None]) -> None:
    tensors = batch(vocab, (1, 3))
    tensors["mask"][0, :2] = True
    tensors["logits"] = tensors["logits"].bfloat16()
    ref = torch.randn(1, 3, vocab).bfloat16()
    assert_parity(no_worse, tensors, inplace_backward=inplace, ref_logits=ref, **ALL_TERMS)


@pytest.mark.parametrize("normalizer", [None, 3.5, "tensor"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("inplace", MODES)
def test_reductions(
    inplace: bool, reduction: str, normalizer: float | str | None, no_worse: Callable[..., None]
) -> None:
    divisor = torch.tensor(7) if normalizer == "tensor" else normalizer
    options = {
        "reduction": reduction,
        "normalizer": divisor,
        "ref_logits": torch.randn(3, 4, 33),
        **ALL_TERMS,
    }
    assert_parity(no_worse, batch(33), inplace_backward=inplace, **options)


@pytest.mark.parametrize(
    "terms",
    [
        {"entropy_coef": 0.5},
        {"entropy_coef": -0.5},
        {"kl_coef": 0.5},
        {"kl_coef": 0.0},
        {"dual_clip": 1.1},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"clip_low": 1.0, "clip_high": 5.0},
        {"log_ratio_clamp": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("inplace", MODES)
def test_each_term(inplace: bool, terms: dict[str, float], no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, batch(67), inplace_backward=inplace, ref_logits=torch.randn(3, 4, 67), **terms)


@pytest.mark.parametrize("inplace", MODES)
@pytest.mark.parametrize("upstream", [0.0, 1.0, -2.5])
def test_any_upstream_gradient(inplace: bool, upstream: float) -> None:
    tensors = batch(67)
    got = from_logits(tensors, "triton", torch.float32, upstream, inplace_backward=inplace, entropy_coef=0.1)[
        1
    ]
    expected = from_logits(tensors, "reference", torch.float64, upstream, entropy_coef=0.1)[1]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    tensors = batch(67)
    leaf = tensors["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    out = ppo_fast.policy_loss_from_logits(
        **{**tensors, "logits": logits}, inplace_backward=True, entropy_coef=0.1, impl="triton"
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    expected = from_logits(tensors, "reference", torch.float64, entropy_coef=0.1)[1]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_second_backward_in_place_is_an_error_that_says_what_to_do() -> None:
    logits = batch(9)["logits"].requires_grad_() * 1.0
    out = ppo_fast.policy_loss_from_logits(
        **{**batch(9), "logits": logits}, inplace_backward=True, impl="triton"
    )
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=False for retain_graph"):
        out.loss.backward()


def test_a_second_consumer_of_overwritten_logits_is_an_error_and_never_a_wrong_gradient() -> None:
    tensors = batch(9)
    logits = tensors["logits"].clone().requires_grad_() * 1.0
    other = logits.square().sum()
    out = ppo_fast.policy_loss_from_logits(
        **{**tensors, "logits": logits}, inplace_backward=True, impl="triton"
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss + other).backward()


def test_the_logits_serve_twice_and_the_graph_may_be_kept() -> None:
    tensors = batch(67)
    gradients = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        logits = tensors["logits"].detach().to(dtype, copy=True).requires_grad_()
        out = ppo_fast.policy_loss_from_logits(**{**tensors, "logits": logits}, impl=impl)
        loss = out.loss + ppo_fast.entropy_from_logits(logits, impl=impl).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append(logits.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shared", [lambda x: x[:1].expand(3, -1, -1), lambda x: x[..., ::2]], ids=["expanded", "columns strided"]
)
def test_rows_that_cannot_be_overwritten_are_left_alone(shared: Callable[[Tensor], Tensor]) -> None:
    tensors = batch(33)
    base = torch.randn(3, 4, 33 if shared(torch.empty(3, 4, 66)).shape[-1] == 66 else 66)
    logits = shared(base).detach().requires_grad_()
    before = logits.detach().clone()
    out = ppo_fast.policy_loss_from_logits(
        **{**tensors, "logits": logits}, inplace_backward=True, impl="triton"
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert torch.equal(logits, before)
    expected = from_logits({**tensors, "logits": before}, "reference", torch.float64)[1]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", MODES)
@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, :-1], lambda x: x[:, ::2], lambda x: x.transpose(0, 1)],
    ids=["shift", "step", "swap"],
)
def test_any_row_strides(view: Callable[[Tensor], Tensor], inplace: bool) -> None:
    base = torch.randn(3, 4, 33)
    shape = view(base).shape
    tensors = batch(33, (shape[0], shape[1]))
    leaf = base.clone().requires_grad_()
    storage = leaf * 1.0
    out = ppo_fast.policy_loss_from_logits(
        **{**tensors, "logits": view(storage)}, inplace_backward=inplace, impl="triton"
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    x = base.double().requires_grad_()
    truth = ppo_fast.policy_loss_from_logits(**{**tensors, "logits": view(x)}, impl="reference")
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(truth.loss, x)[0], rtol=1e-5, atol=1e-6)
    if not inplace:
        assert torch.equal(storage, base)


@pytest.mark.parametrize("inplace", MODES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_garbage_under_a_false_mask_reaches_nothing(garbage: float, inplace: bool) -> None:
    tensors, ref, tau = batch(67), torch.randn(3, 4, 67), torch.rand(3, 4) + 0.5
    masked = ~tensors["mask"]
    dirty = {k: x.clone() for k, x in tensors.items()}
    for name in ("logits", "old_logprobs", "advantages"):
        dirty[name][masked] = garbage
    dirty["labels"][masked] = -100
    dirty_ref, dirty_tau = ref.clone(), tau.clone()
    dirty_ref[masked] = dirty_tau[masked] = garbage
    options = {"inplace_backward": inplace, **ALL_TERMS}
    clean = from_logits(tensors, "triton", torch.float32, ref_logits=ref, temperature=tau, **options)
    got = from_logits(dirty, "triton", torch.float32, ref_logits=dirty_ref, temperature=dirty_tau, **options)
    assert torch.equal(clean[1], got[1])
    assert torch.equal(clean[0].loss, got[0].loss)
    assert bool((got[1][masked] == 0).all())
    assert all(torch.equal(clean[0].stats[name], got[0].stats[name]) for name in clean[0].stats)


@pytest.mark.parametrize("inplace", MODES)
def test_an_empty_mask_and_an_empty_batch_cost_nothing(inplace: bool) -> None:
    for shape in ((3, 4), (0, 4), (3, 0)):
        tensors = batch(9, (3, 4))
        tensors = {k: x[: shape[0], : shape[1]] for k, x in tensors.items()}
        tensors["mask"] = torch.zeros(shape)
        out, gradient = from_logits(
            tensors, "triton", torch.float32, inplace_backward=inplace, entropy_coef=0.1
        )
        assert out.loss.item() == 0.0
        assert gradient.shape == (*shape, 9)
        assert bool((gradient == 0).all())
        assert {value.item() for value in out.stats.values()} == {0.0}


def test_rows_without_a_contribution_are_not_read_again() -> None:
    """Clipped, zero advantage: poisoned after the forward, they still get zeros; the others turn NaN."""
    logits = torch.zeros(1, 3, 5, requires_grad=True)
    uniform = torch.tensor(0.2).log()
    out = ppo_fast.policy_loss_from_logits(
        logits,
        torch.zeros(1, 3, dtype=torch.int64),
        torch.stack([uniform - 1, uniform, uniform]).unsqueeze(0),  # ratio e, 1, 1
        torch.tensor([[1.0, 0.0, 1.0]]),
        torch.ones(1, 3),
        impl="triton",
    )
    saved = out.loss.grad_fn.saved_tensors if hasattr(out.loss.grad_fn, "saved_tensors") else ()
    assert saved
    logits.data.fill_(torch.nan)  # `.data`: behind autograd's back
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert bool((gradient[0, :2] == 0).all())
    assert bool(gradient[0, 2].isnan().all())


@pytest.mark.parametrize("inplace", MODES)
def test_a_row_does_not_depend_on_its_batch(inplace: bool) -> None:
    """Bitwise, under a sum: alone, and in a batch whose logits lie on other strides."""
    tensors, ref = batch(5001, (2, 3)), torch.randn(2, 3, 5001)
    tensors["mask"] = torch.ones(2, 3)
    options = {"reduction": "token-sum", "inplace_backward": inplace, "impl": "triton", **ALL_TERMS}

    def run(rows: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        part = {k: rows(x) for k, x in tensors.items()}
        leaf = part.pop("logits").clone().requires_grad_()
        out = ppo_fast.policy_loss_from_logits(leaf * 1.0, **part, ref_logits=rows(ref), **options)
        return out.logprobs, out.entropy, torch.autograd.grad(out.loss, leaf)[0]

    whole = run(lambda x: x)
    for b in range(2):
        for t in range(3):
            for a, one in zip(whole, run(lambda x, b=b, t=t: x[b : b + 1, t : t + 1]), strict=True):
                assert torch.equal(a[b : b + 1, t : t + 1], one)


@pytest.mark.parametrize("offset", [2.0**14, -(2.0**14), 2.0**20])
def test_common_offset_cancels(offset: float) -> None:
    tensors = batch(200)
    tensors["logits"] = (tensors["logits"] * 8).round() / 8
    a = from_logits(tensors, "triton", torch.float32, entropy_coef=0.1)
    tensors["logits"] = tensors["logits"] + offset
    b = from_logits(tensors, "triton", torch.float32, entropy_coef=0.1)
    assert torch.equal(a[1], b[1])
    assert torch.equal(a[0].loss, b[0].loss)


@pytest.mark.parametrize("inplace", MODES)
def test_impossible_tokens(inplace: bool, no_worse: Callable[..., None]) -> None:
    tensors, ref = batch(9000, (1, 4)), torch.randn(1, 4, 9000)
    tensors["mask"][:] = True
    tensors["labels"][:] = 8999
    tensors["logits"][..., :8500] = ref[..., :8500] = -torch.inf  # longer than a tile
    tensors["old_logprobs"] = torch.log_softmax(tensors["logits"], -1)[..., 8999] + 0.1
    assert_parity(no_worse, tensors, inplace_backward=inplace, ref_logits=ref, **ALL_TERMS)


def test_a_label_out_of_range_is_nan_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where no check reads the labels."""
    tensors = batch(9)
    tensors["labels"][0, 0], tensors["labels"][0, 1] = -1, 9
    monkeypatch.setattr("ppo_fast.ops.checks._readable", lambda tensor: False)
    out, gradient = from_logits(tensors, "triton", torch.float32)
    assert bool(out.loss.isnan())
    assert gradient.isnan().all(-1).nonzero().tolist() == [[0, 0], [0, 1]]
    assert gradient.isnan().any(-1).sum() == 2


def test_an_overflowing_ratio_is_bounded_where_another_branch_bounds_it() -> None:
    """Ratio e^400: clipped for A > 0, capped by the dual clip for A < 0; zero for A = 0."""
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    options: dict[str, Any] = {"dual_clip": 3.0, "impl": "triton"}
    out = ppo_fast.policy_loss_from_logits(
        logits,
        torch.zeros(1, 3, dtype=torch.int64),
        torch.full((1, 3), -400.0),
        torch.tensor([[1.0, -1.0, 0.0]]),
        torch.ones(1, 3),
        **options,
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx((-1.2 + 3.0) / 3, abs=1e-6)
    assert torch.equal(logits.grad, torch.zeros(1, 3, 2))


def test_no_gradient_leaves_the_logits_alone() -> None:
    tensors = batch(33)
    before = tensors["logits"].clone()
    with torch.no_grad():
        out = ppo_fast.policy_loss_from_logits(**tensors, inplace_backward=True, impl="triton")
    assert torch.equal(tensors["logits"], before)
    assert not out.loss.requires_grad


@pytest.mark.parametrize("with_ref", [False, True])
def test_operators_are_well_formed(with_ref: bool) -> None:
    tensors = batch(33)
    packed, normalizer = fused_policy.pack_coefficients(
        tensors["mask"].device,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        log_ratio_clamp=None,
        normalizer=2.0,
    )
    ref = torch.randn(3, 4, 33) if with_ref else None
    logits, *others = tensors.values()
    arguments = (*others, torch.tensor(0.7), ref, packed, normalizer, "token-mean")
    torch.library.opcheck(fused_policy_rows.policy_loss_rows, (logits.clone().requires_grad_(), *arguments))
    torch.library.opcheck(fused_policy_rows.policy_loss_rows_inplace, (logits.clone(), *arguments))


@pytest.mark.parametrize("inplace", MODES)
def test_an_on_policy_ratio_is_one_whichever_op_took_the_logprobs(inplace: bool) -> None:
    """Bitwise: a row is summed in one order by every kernel."""
    tensors = batch(9001)
    tensors["mask"][:] = True
    logits, labels = tensors["logits"], tensors["labels"]
    # With both a KL and the gradient in place the tile is another, and the last bit may be.
    terms = {"entropy_coef": 0.3} if inplace else {"ref_logits": torch.randn(3, 4, 9001), **ALL_TERMS}
    old = ppo_fast.logprobs_from_logits(logits, labels, temperature=0.7, impl="triton")
    leaf = logits.clone().requires_grad_()
    out = ppo_fast.policy_loss_from_logits(
        leaf * 1.0, labels, old, tensors["advantages"], tensors["mask"], temperature=0.7,
        inplace_backward=inplace, impl="triton", **terms,
    )  # fmt: skip
    assert torch.equal(out.logprobs, old)
    assert out.stats["ratio_max"].item() == out.stats["ratio_mean"].item() == 1.0
    assert out.stats["approx_kl"].item() == 0.0
