"""The clipped policy loss from logits in C++ and Triton against float64, with eager torch as the yardstick."""

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

IMPLS = ["triton"] if torch.cuda.is_available() else ["cpu", "triton"]
IMPL = "triton"  # the one under test
INTERPRETED = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu") == "cpu"
REDUCTIONS = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"]
ALL_TERMS = {"entropy_coef": 0.3, "kl_coef": 0.2, "dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.3}
MODES = [False, True]  # inplace_backward


@pytest.fixture(autouse=True, params=IMPLS)
def _impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request.module, "IMPL", request.param)


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
    fused = from_logits(tensors, IMPL, dtype, inplace_backward=inplace, **options)
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
    terms = {"ref_logits": torch.randn(3, 4, 67), **ALL_TERMS}
    got = from_logits(tensors, IMPL, torch.float32, upstream, inplace_backward=inplace, **terms)[1]
    expected = from_logits(tensors, "reference", torch.float64, upstream, **terms)[1]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    tensors = batch(67)
    leaf = tensors["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    out = ppo_fast.policy_loss_from_logits(
        **{**tensors, "logits": logits}, inplace_backward=True, entropy_coef=0.1, impl=IMPL
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()
    expected = from_logits(tensors, "reference", torch.float64, entropy_coef=0.1)[1]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_second_backward_in_place_is_an_error_that_says_what_to_do() -> None:
    logits = batch(9)["logits"].requires_grad_() * 1.0
    out = ppo_fast.policy_loss_from_logits(**{**batch(9), "logits": logits}, inplace_backward=True, impl=IMPL)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace_backward=False for retain_graph"):
        out.loss.backward()


def test_a_second_consumer_of_overwritten_logits_is_an_error_and_never_a_wrong_gradient() -> None:
    tensors = batch(9)
    logits = tensors["logits"].clone().requires_grad_() * 1.0
    other = logits.square().sum()
    out = ppo_fast.policy_loss_from_logits(**{**tensors, "logits": logits}, inplace_backward=True, impl=IMPL)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.loss + other).backward()


def test_the_logits_serve_twice_and_the_graph_may_be_kept() -> None:
    tensors = batch(67)
    gradients = []
    for impl, dtype in ((IMPL, torch.float32), ("reference", torch.float64)):
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
    out = ppo_fast.policy_loss_from_logits(**{**tensors, "logits": logits}, inplace_backward=True, impl=IMPL)
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
        **{**tensors, "logits": view(storage)}, inplace_backward=inplace, impl=IMPL
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
    clean = from_logits(tensors, IMPL, torch.float32, ref_logits=ref, temperature=tau, **options)
    got = from_logits(dirty, IMPL, torch.float32, ref_logits=dirty_ref, temperature=dirty_tau, **options)
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
        out, gradient = from_logits(tensors, IMPL, torch.float32, inplace_backward=inplace, entropy_coef=0.1)
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
        impl=IMPL,
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
    options = {"reduction": "token-sum", "inplace_backward": inplace, "impl": IMPL, **ALL_TERMS}

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
    a = from_logits(tensors, IMPL, torch.float32, entropy_coef=0.1)
    tensors["logits"] = tensors["logits"] + offset
    b = from_logits(tensors, IMPL, torch.float32, entropy_coef=0.1)
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
    """As on a GPU, where no check reads the labels; native code reads them, and refuses."""
    tensors = batch(9)
    tensors["labels"][0, 0], tensors["labels"][0, 1] = -1, 9
    monkeypatch.setattr("ppo_fast.ops.checks._readable", lambda tensor: False)
    if IMPL == "cpu":
        with pytest.raises(
            ValueError, match=r"labels holds -1 at flat position 0, expected a token in \[0, 9\)"
        ):
            from_logits(tensors, IMPL, torch.float32)
        return
    out, gradient = from_logits(tensors, IMPL, torch.float32)
    assert bool(out.loss.isnan())
    assert gradient.isnan().all(-1).nonzero().tolist() == [[0, 0], [0, 1]]
    assert gradient.isnan().any(-1).sum() == 2


def test_an_overflowing_ratio_is_bounded_where_another_branch_bounds_it() -> None:
    """Ratio e^400: clipped for A > 0, capped by the dual clip for A < 0; zero for A = 0."""
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    options: dict[str, Any] = {"dual_clip": 3.0, "impl": IMPL}
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
        out = ppo_fast.policy_loss_from_logits(**tensors, inplace_backward=True, impl=IMPL)
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
        impl=IMPL,
    )
    ref = torch.randn(3, 4, 33) if with_ref else None
    logits, *others = tensors.values()
    temperature = torch.tensor(0.7, dtype=packed.dtype)
    arguments = (*others, temperature, ref, packed, normalizer, "token-mean", IMPL)
    torch.library.opcheck(fused_policy_rows.policy_loss_rows, (logits.clone().requires_grad_(), *arguments))
    torch.library.opcheck(fused_policy_rows.policy_loss_rows_inplace, (logits.clone(), *arguments))
    *_, state = fused_policy_rows.policy_loss_rows(logits, *arguments)
    backward = (logits.clone(), others[0], temperature, ref, state, IMPL)
    torch.library.opcheck(fused_policy_rows.policy_loss_rows_backward, (torch.tensor(2.0), *backward))
    torch.library.opcheck(fused_policy_rows.policy_loss_rows_backward_inplace, (torch.tensor(2.0), *backward))


@pytest.mark.parametrize("inplace", MODES)
def test_an_on_policy_ratio_is_one_whichever_op_took_the_logprobs(inplace: bool) -> None:
    """Bitwise: a row is summed in one order by every kernel."""
    tensors = batch(9001)
    tensors["mask"][:] = True
    logits, labels = tensors["logits"], tensors["labels"]
    terms = {"ref_logits": torch.randn(3, 4, 9001), **ALL_TERMS}
    old = ppo_fast.logprobs_from_logits(logits, labels, temperature=0.7, impl=IMPL)
    leaf = logits.clone().requires_grad_()
    out = ppo_fast.policy_loss_from_logits(
        leaf * 1.0, labels, old, tensors["advantages"], tensors["mask"], temperature=0.7,
        inplace_backward=inplace, impl=IMPL, **terms,
    )  # fmt: skip
    assert torch.equal(out.logprobs, old)
    assert out.stats["ratio_max"].item() == out.stats["ratio_mean"].item() == 1.0
    assert out.stats["approx_kl"].item() == 0.0


@pytest.mark.parametrize("scale", [65536.0, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loss_scale_in_place_saves_what_it_is_there_to_save(dtype: torch.dtype, scale: float) -> None:
    """A mean over 65536 tokens, scaled up again: rounded to float16 before, most of the gradient would be 0."""
    tensors = batch(500, (2, 16))
    tensors["logits"] = tensors["logits"].to(dtype)
    options = {"normalizer": 65536.0, "upstream": scale}
    inplace, free = (
        from_logits(tensors, IMPL, dtype, inplace_backward=mode, **options)[1] for mode in (True, False)
    )
    truth = from_logits(tensors, "reference", torch.float64, **options)[1]
    errors = [(x.double() - truth).norm() / truth.norm() for x in (inplace, free)]
    # bfloat16 is rounded before the scale as well as after it: a second rounding, no loss of range.
    assert errors[0] <= errors[1] * (1.0 if dtype == torch.float16 else 2.5)
    assert (inplace == 0).sum() <= (free == 0).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_of_the_gradient_is_refused(dtype: torch.dtype) -> None:
    tensors = batch(9)
    logits = tensors["logits"].to(dtype).requires_grad_() * 1.0
    out = ppo_fast.policy_loss_from_logits(**{**tensors, "logits": logits}, inplace_backward=True, impl=IMPL)
    with pytest.raises(RuntimeError, match="create_graph=True cannot be had"):
        torch.autograd.grad(out.loss, logits, create_graph=True)


@pytest.mark.parametrize("inplace", MODES)
def test_a_coefficient_of_zero_silences_an_infinite_kl(inplace: bool) -> None:
    tensors, ref = batch(33), torch.randn(3, 4, 33)
    ref[0, 0, 5] = -torch.inf
    out, gradient = from_logits(tensors, IMPL, torch.float32, ref_logits=ref, inplace_backward=inplace)
    plain, expected = from_logits(tensors, "reference", torch.float64)
    torch.testing.assert_close(out.loss.double(), plain.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert out.stats["kl"].item() == torch.inf


@pytest.mark.parametrize("inplace", MODES)
@pytest.mark.parametrize("normalizer", [0.01, -2.0, torch.nan])
def test_any_normalizer_that_a_tensor_may_bring(normalizer: float, inplace: bool) -> None:
    """Small, negative (the sign is the caller's) or NaN, which must show in the gradient of every row that counts."""
    tensors = batch(33)
    options = {"normalizer": torch.tensor(normalizer), "entropy_coef": 0.1}
    out, gradient = from_logits(tensors, IMPL, torch.float32, inplace_backward=inplace, **options)
    truth, expected = from_logits(tensors, "reference", torch.float64, **options)
    torch.testing.assert_close(out.loss.double(), truth.loss, rtol=1e-5, atol=1e-6, equal_nan=True)
    if normalizer == normalizer:
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient.isnan().any(-1), tensors["mask"] & (normalizer != normalizer))


def test_an_infinite_upstream_gradient_leaves_zeros_alone() -> None:
    tensors = batch(33)
    for inplace in MODES:
        gradient = from_logits(tensors, IMPL, torch.float32, torch.inf, inplace_backward=inplace)[1]
        assert bool((gradient[~tensors["mask"]] == 0).all())
        assert not gradient[tensors["mask"]].isfinite().all()


@pytest.mark.parametrize("inplace", MODES)
def test_rows_past_two_to_the_31_elements(inplace: bool) -> None:
    """Three rows 2^30 apart: an offset in 32 bits would wrap at the third; of the logits, then of the reference."""
    stride, vocab = 2**30 + 16, 33
    tensors, ref = batch(vocab, (1, 3)), torch.randn(1, 3, vocab).bfloat16()
    tensors["mask"][:] = True
    near = tensors["logits"].bfloat16()
    kept = near.clone()
    far = torch.empty(2 * stride + vocab, dtype=torch.bfloat16).as_strided((1, 3, vocab), (0, stride, 1))
    results = []
    for logits, reference in ((near, ref), (far, ref), (near, far)):
        if logits is far:
            logits.copy_(near)
        if reference is far:
            reference.copy_(ref)
        leaf = logits.detach().requires_grad_()
        out = ppo_fast.policy_loss_from_logits(
            **{**tensors, "logits": leaf.view_as(leaf) if inplace else leaf},
            ref_logits=reference, inplace_backward=inplace, impl=IMPL, **ALL_TERMS,
        )  # fmt: skip
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0].clone()))
        logits.copy_(kept)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_in_place_allocates_nothing_of_the_size_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_fast.ops.native_rows.large_empty", None)  # what a gradient of its own would ask
    tensors = batch(4099, (2, 8))
    for dtype in (torch.float32, torch.float16):
        logits = tensors["logits"].to(dtype).requires_grad_() * 1.0
        with torch.profiler.profile(profile_memory=True) as profile:
            out = ppo_fast.policy_loss_from_logits(
                **{**tensors, "logits": logits}, inplace_backward=True, entropy_coef=0.1, impl=IMPL
            )
            torch.autograd.grad(out.loss, logits)
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert largest < logits.nbytes / 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="the native kernel runs on the CPU")
def test_float64_on_the_cpu() -> None:
    if IMPL != "cpu":
        return
    tensors, ref = batch(300), torch.randn(3, 4, 300)
    for inplace in MODES:
        wide = from_logits(
            tensors, "cpu", torch.float64, ref_logits=ref, inplace_backward=inplace, **ALL_TERMS
        )
        truth = from_logits(tensors, "reference", torch.float64, ref_logits=ref, **ALL_TERMS)
        torch.testing.assert_close(wide[1], truth[1], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(wide[0].loss, truth[0].loss, rtol=1e-11, atol=1e-13)
    mixed = ppo_fast.policy_loss_from_logits(
        **tensors, ref_logits=ref.double(), inplace_backward=True, impl="cpu", **ALL_TERMS
    )
    torch.testing.assert_close(mixed.loss, truth[0].loss.detach(), rtol=1e-6, atol=1e-6)
    assert mixed.loss.dtype == torch.float64
