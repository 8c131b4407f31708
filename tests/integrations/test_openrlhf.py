"""OpenRLHF's models.utils, models.loss and experience maker: our functions against OpenRLHF's own."""

import itertools
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import ppo_fast.integrations.openrlhf as ours
from ppo_fast.integrations import contract

from .conftest import MASK_DTYPES, MASKS, autocast_on_a_gpu, masks

Check = Callable[..., None]
Batch = Callable[..., list[Tensor]]
EVERY_MASK_DTYPE = pytest.mark.parametrize("mask_dtype", list(MASK_DTYPES.values()), ids=list(MASK_DTYPES))


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logprobs(openrlhf: SimpleNamespace, same: Check, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = 4 * torch.randn(shape, dtype=dtype), torch.randint(shape[-1], shape[:-1])
    same(ours.log_probs_from_logits, openrlhf.utils.log_probs_from_logits, logits, labels)
    same(
        lambda x, y: ours.log_probs_from_logits(x * 1, y, temperature=0.7),
        lambda x, y: openrlhf.utils.log_probs_from_logits(x * 1, y, temperature=0.7),
        logits,
        labels,
    )


def test_logprobs_in_half_precision(openrlhf: SimpleNamespace, no_worse_than_theirs: Check) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        logits, labels = (4 * torch.randn(2, 3, 50)).to(dtype), torch.randint(50, (2, 3))
        no_worse_than_theirs(ours.log_probs_from_logits, openrlhf.utils.log_probs_from_logits, logits, labels)


def test_a_temperature_divides_the_logits_in_place(openrlhf: SimpleNamespace) -> None:
    logits, labels = torch.randn(2, 9), torch.tensor([0, 1])
    for utils in (ours, openrlhf.utils):
        held = logits.clone()
        utils.log_probs_from_logits(held, labels, 0.5)
        assert torch.equal(held, logits / 0.5)
        with pytest.raises(RuntimeError, match="in-place"):
            utils.log_probs_from_logits(logits.clone().requires_grad_(), labels, 0.5)


def test_logprobs_where_flash_attn_would_run(
    openrlhf: SimpleNamespace, same: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cross entropy, in torch here, gives float32 and 0 for a label of -100; half precision does not go there."""

    def cross_entropy_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = torch.nn.functional.cross_entropy(
            logits.float(), labels, reduction="none", ignore_index=-100
        )
        return losses, torch.zeros_like(losses)

    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("flash_attn.ops.triton.cross_entropy")
    module.cross_entropy_loss = cross_entropy_loss
    monkeypatch.setitem(sys.modules, module.__name__, module)
    contract.flash_attn_cross_entropy.cache_clear()
    try:
        logits, labels = torch.randn(2, 3, 50), torch.randint(50, (2, 3))
        half = logits.bfloat16()
        assert ours.log_probs_from_logits(half, labels).dtype == torch.bfloat16
        labels[0, 1] = -100
        same(ours.log_probs_from_logits, openrlhf.utils.log_probs_from_logits, logits, labels)
    finally:
        contract.flash_attn_cross_entropy.cache_clear()


def test_logprobs_of_logits_that_are_not_finite(openrlhf: SimpleNamespace, same: Check) -> None:
    logits, labels = torch.randn(4, 9), torch.full((4,), 4)
    logits[0, :3] = logits[1, 4] = logits[2] = -torch.inf
    logits[3, 0] = torch.nan
    same(ours.log_probs_from_logits, openrlhf.utils.log_probs_from_logits, logits, labels)


def test_logprobs_of_narrow_labels(openrlhf: SimpleNamespace, same: Check) -> None:
    logits, labels = torch.randn(4, 9), torch.randint(9, (4,), dtype=torch.int32)
    same(ours.log_probs_from_logits, openrlhf.utils.log_probs_from_logits, logits, labels)


def test_autocast_widens_what_it_widens_in_openrlhf(openrlhf: SimpleNamespace) -> None:
    with autocast_on_a_gpu() as (logits, labels):
        for log_probs_from_logits in (ours.log_probs_from_logits, openrlhf.utils.log_probs_from_logits):
            assert log_probs_from_logits(logits, labels).dtype == torch.float32
        for compute_entropy in (ours.compute_entropy, theirs_entropy(openrlhf)):
            assert compute_entropy(logits).dtype == torch.float32


def theirs_entropy(openrlhf: SimpleNamespace) -> Callable[[Tensor], Tensor]:
    """The function under @torch.compile, so that the test need not compile it."""
    return openrlhf.utils.compute_entropy.__wrapped__


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 50)])
def test_entropy(
    openrlhf: SimpleNamespace, same: Check, no_worse_than_theirs: Check, shape: tuple[int, ...]
) -> None:
    for dtype in (torch.float32, torch.float64):
        same(ours.compute_entropy, theirs_entropy(openrlhf), 4 * torch.randn(shape, dtype=dtype))
    no_worse_than_theirs(ours.compute_entropy, theirs_entropy(openrlhf), (4 * torch.randn(shape)).bfloat16())


def test_entropy_keeps_what_openrlhf_makes_of_impossible_tokens(
    openrlhf: SimpleNamespace, same: Check
) -> None:
    logits = torch.randn(3, 9)
    logits[0, :3], logits[1, 0] = -torch.inf, torch.nan
    same(ours.compute_entropy, theirs_entropy(openrlhf), logits, moving=0)


GAPS = [
    0.0,
    0.5,
    -0.5,
    2.5,
    -2.5,
    9.9,
    -9.9,
    10.0,
    -10.0,
    10.5,
    11.0,
    12.0,
    20.0,
    -20.0,
    25.0,
    -25.0,
    300.0,
    -300.0,
]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("with_old", [False, True])
def test_approx_kl(openrlhf: SimpleNamespace, same: Check, kind: str, unbiased: bool, with_old: bool) -> None:
    """At, inside of and beyond every clamp; the gradient of the reference too."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        base = torch.randn(len(GAPS)).to(dtype)
        new = base + torch.tensor(GAPS).to(dtype)
        old = new + 4 * torch.randn(len(GAPS)).to(dtype) if with_old else None
        for moving in (1, 2):
            same(
                lambda a, b, o=old: ours.compute_approx_kl(a, b, o, kind, unbiased),
                lambda a, b, o=old: openrlhf.utils.compute_approx_kl(a, b, o, kind, unbiased),
                new,
                base,
                moving=moving,
            )


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_approx_kl_keeps_what_is_not_finite(openrlhf: SimpleNamespace, same: Check, kind: str) -> None:
    new = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 0.0, torch.inf])
    base = torch.tensor([0.0, 0.0, 0.0, torch.nan, torch.inf, torch.inf])
    same(
        lambda: ours.compute_approx_kl(new, base, kl_estimator=kind),
        lambda: openrlhf.utils.compute_approx_kl(new, base, kl_estimator=kind),
        moving=0,
    )


def test_approx_kl_has_not_every_estimator(openrlhf: SimpleNamespace) -> None:
    for utils in (ours, openrlhf.utils):
        with pytest.raises(ValueError, match="Unknown kl_estimator: k4"):
            utils.compute_approx_kl(torch.zeros(1), torch.zeros(1), kl_estimator="k4")


LOCAL_AND_GLOBAL = [{}, {"dp_size": 4, "batch_num_tokens": torch.tensor(50.0), "global_batch_size": 8}]
SETTINGS = {
    "default": {},
    "asymmetric": {"clip_eps_low": 0.1, "clip_eps_high": 0.4},
    "dual": {"dual_clip": 1.5},
    "by_sequence": {"token_level_loss": False},
    "open_below": {"clip_eps_low": 2.0},
    "gspo": {"policy_loss_type": "gspo"},
    "gspo_rollout": {"policy_loss_type": "gspo", "is_correction_level": "token"},
    "token_mask": {"is_correction_level": "token"},
    "token_clip": {"is_correction_level": "token", "is_correction_mode": "clip", "dual_clip": 3.0},
    "seq_mask": {"is_correction_level": "seq", "is_correction_threshold": (0.7, 1.5)},
    "token_kl": {
        "is_correction_level": "token",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (0.0, 0.1),
    },
    "seq_tv": {
        "is_correction_level": "seq",
        "is_correction_gating": "tv",
        "is_correction_threshold": (0.0, 0.2),
        "token_level_loss": False,
    },
}


def policy_inputs(batch: Batch, mask: Tensor, garbage: float = 3.0) -> list[Tensor]:
    """log_probs, old, advantages, rollout: log-probabilities below 0, ratios on both sides of every clip."""
    new, old, advantages, rollout = batch(4, mask, torch.float32, garbage)
    new = -new.abs() - 0.1
    old, rollout = (torch.where(mask != 0, new - 0.5 * x, x) for x in (old, rollout))
    advantages[1, 2] = 0.0
    return [new, old, advantages, rollout]


@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("mask_name", MASKS)
@EVERY_MASK_DTYPE
def test_policy_loss(
    openrlhf: SimpleNamespace,
    same: Check,
    batch: Batch,
    settings: str,
    mask_name: str,
    mask_dtype: torch.dtype,
) -> None:
    mask = masks()[mask_name].to(mask_dtype)
    module = openrlhf.loss.PolicyLoss(**SETTINGS[settings])
    for totals in LOCAL_AND_GLOBAL:
        new, old, advantages, rollout = policy_inputs(batch, mask)
        given = rollout if module.is_correction_level != "off" else None
        same(
            lambda x, t=totals, r=given, o=old, a=advantages: ours.policy_loss_forward(
                module, x, o, a, mask, r, **t
            ),
            lambda x, t=totals, r=given, o=old, a=advantages: module(x, o, a, mask, r, **t),
            new,
            moving=int(bool(totals) or mask_name != "empty"),  # the gradient of a loss of NaN is not kept
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("settings", ["default", "dual", "token_mask", "seq_tv"])
def test_policy_loss_without_a_mask(
    openrlhf: SimpleNamespace, same: Check, batch: Batch, settings: str
) -> None:
    module = openrlhf.loss.PolicyLoss(**(SETTINGS[settings] | {"token_level_loss": True}))
    if module.is_correction_level == "seq":
        module.is_correction_level = "token"  # OpenRLHF averages a sequence over its mask
    new, old, advantages, rollout = policy_inputs(batch, torch.ones(3, 7))
    same(
        lambda x: ours.policy_loss_forward(module, x, old, advantages, None, rollout),
        lambda x: module(x, old, advantages, None, rollout),
        new,
    )


@pytest.mark.parametrize("settings", ["default", "by_sequence", "dual", "gspo", "token_mask"])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
@pytest.mark.parametrize("place", [(0, 1), (0, 2), (1, 3)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_policy_loss_keeps_what_is_not_finite(
    openrlhf: SimpleNamespace,
    same: Check,
    batch: Batch,
    settings: str,
    which: int,
    place: tuple[int, int],
    bad: float,
) -> None:
    module = openrlhf.loss.PolicyLoss(**SETTINGS[settings])
    mask = masks()["an_empty_row"]
    inputs = policy_inputs(batch, mask, 1.0)
    inputs[which][place] = bad
    new, old, advantages, rollout = inputs
    given = rollout if module.is_correction_level != "off" else None
    same(
        lambda: ours.policy_loss_forward(module, new, old, advantages, mask, given),
        lambda: module(new, old, advantages, mask, given),
        moving=0,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("dual_clip", [None, 4.0])
def test_policy_loss_at_its_ties_and_clamps(openrlhf: SimpleNamespace, same: Check, dual_clip: float) -> None:
    module = openrlhf.loss.PolicyLoss(clip_eps_low=0.5, clip_eps_high=1.0, dual_clip=dual_clip)
    gaps = [*torch.tensor([1.0, 2.0, 0.5, 4.0, 8.0]).log().tolist(), 20.0, -20.0, 25.0, -25.0, 0.0]
    new = torch.tensor([gaps] * 3)
    advantages = torch.tensor([[1.0], [-1.0], [0.0]]).expand_as(new).contiguous()
    old, mask = torch.zeros_like(new), torch.ones_like(new)
    same(
        lambda x: ours.policy_loss_forward(module, x, old, advantages, mask),
        lambda x: module(x, old, advantages, mask),
        new,
    )


def test_losses_in_half_precision_have_openrlhfs_dtypes(
    openrlhf: SimpleNamespace, same: Check, batch: Batch
) -> None:
    for mask_dtype, by_token in itertools.product(MASK_DTYPES.values(), (True, False)):
        module = openrlhf.loss.PolicyLoss(token_level_loss=by_token)
        critic = openrlhf.loss.ValueLoss(0.5, by_token)
        mask = masks()["holes"].to(mask_dtype)
        new, old, advantages, _ = (x.bfloat16() for x in policy_inputs(batch, mask))
        same(
            lambda x, m=mask, o=old, a=advantages, p=module: ours.policy_loss_forward(p, x, o, a, m)[0],
            lambda x, m=mask, o=old, a=advantages, p=module: p(x, o, a, m)[0],
            new,
            rtol=5e-2,
            atol=5e-2,
        )
        same(
            lambda x, m=mask, o=old, a=advantages, c=critic: ours.value_loss_forward(c, x, o, a, m),
            lambda x, m=mask, o=old, a=advantages, c=critic: c(x, o, a, m),
            new,
            moving=0,  # which error is the larger may turn on a rounding to half precision
            rtol=5e-2,
            atol=5e-2,
        )


def test_policy_loss_refuses(openrlhf: SimpleNamespace) -> None:
    tensors = [torch.zeros(1, 2)] * 4
    module = openrlhf.loss.PolicyLoss()
    with pytest.raises(ValueError, match="entries other than 0 and 1"):
        ours.policy_loss_forward(module, *tensors[:3], torch.full((1, 2), 0.5))
    module.policy_loss_type = "reinforce"
    for forward in (lambda *x: ours.policy_loss_forward(module, *x), module):
        with pytest.raises(ValueError, match="Invalid policy loss type: reinforce"):
            forward(*tensors)
    module = openrlhf.loss.PolicyLoss(is_correction_level="token")
    for forward in (lambda *x: ours.policy_loss_forward(module, *x), module):
        with pytest.raises(TypeError):
            forward(*tensors)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("token_level_loss", [True, False])
@pytest.mark.parametrize("mask_name", MASKS)
@EVERY_MASK_DTYPE
def test_value_loss(
    openrlhf: SimpleNamespace,
    same: Check,
    batch: Batch,
    clip: float | None,
    token_level_loss: bool,
    mask_name: str,
    mask_dtype: torch.dtype,
) -> None:
    mask = masks()[mask_name].to(mask_dtype)
    module = openrlhf.loss.ValueLoss(clip, token_level_loss)
    for totals in LOCAL_AND_GLOBAL:
        new, old, returns = batch(3, mask, torch.float32, 3.0)
        same(
            lambda x, t=totals, o=old, r=returns: ours.value_loss_forward(module, x, o, r, mask, **t),
            lambda x, t=totals, o=old, r=returns: module(x, o, r, mask, **t),
            new,
            moving=int(bool(totals) or mask_name != "empty"),  # the gradient of a loss of NaN is not kept
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("clip", [None, 0.5])
def test_value_loss_without_a_mask_at_its_ties_and_not_finite(
    openrlhf: SimpleNamespace, same: Check, batch: Batch, clip: float | None
) -> None:
    module = openrlhf.loss.ValueLoss(clip)
    new = torch.tensor([[0.5, -0.5, 0.0, 0.25, 0.75, -0.75, 0.5, -0.5]])
    returns = torch.tensor([[1.0, -1.0, 2.0, 0.0, 0.0, -3.0, -1.0, 3.0]])
    old = torch.zeros_like(new)
    same(lambda x: ours.value_loss_forward(module, x, old, returns), lambda x: module(x, old, returns), new)
    mask = masks()["an_empty_row"]
    for which in range(3):
        for place in ((0, 1), (0, 2), (1, 3)):
            inputs = batch(3, mask, torch.float32, 1.0)
            inputs[which][place] = torch.nan
            same(
                lambda i=inputs: ours.value_loss_forward(module, *i, mask),
                lambda i=inputs: module(*i, mask),
                moving=0,
            )


@pytest.mark.parametrize("mask_name", [*MASKS, None])
@EVERY_MASK_DTYPE
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_and_returns(
    openrlhf: SimpleNamespace,
    same: Check,
    batch: Batch,
    mask_name: str | None,
    mask_dtype: torch.dtype,
    gamma: float,
    lam: float,
    dtype: torch.dtype,
) -> None:
    mask = None if mask_name is None else masks()[mask_name].to(mask_dtype)
    values, rewards = batch(2, torch.ones(3, 7) if mask is None else mask, dtype)
    maker = openrlhf.maker.RemoteExperienceMaker
    same(
        lambda v, r: ours.get_advantages_and_returns(None, v, r, mask, gamma, lam),
        lambda v, r: maker.get_advantages_and_returns(None, v, r, mask, gamma, lam),
        values,
        rewards,
        moving=0,
    )
    same(
        lambda r: ours.get_cumulative_returns(None, r, mask, gamma),
        lambda r: maker.get_cumulative_returns(None, r, mask, gamma),
        rewards,
        moving=0,
    )


def test_gae_and_returns_of_half_precision_and_of_nan(
    openrlhf: SimpleNamespace, same: Check, batch: Batch
) -> None:
    maker = openrlhf.maker.RemoteExperienceMaker
    for mask_dtype in MASK_DTYPES.values():
        mask = masks()["holes"].to(mask_dtype)
        values, rewards = batch(2, mask, torch.bfloat16)
        spoilt = rewards.float()
        spoilt[0, 3] = torch.nan
        for v, r, rough in ((values, rewards, {"rtol": 0.05, "atol": 0.05}), (values.float(), spoilt, {})):
            same(
                lambda v, r, m=mask: ours.get_advantages_and_returns(None, v, r, m, 0.9, 0.95),
                lambda v, r, m=mask: maker.get_advantages_and_returns(None, v, r, m, 0.9, 0.95),
                v,
                r,
                moving=0,
                **rough,
            )
            same(
                lambda r, m=mask: ours.get_cumulative_returns(None, r, m, 0.9),
                lambda r, m=mask: maker.get_cumulative_returns(None, r, m, 0.9),
                r,
                moving=0,
                **rough,
            )


def test_the_advantages_carry_no_gradient(openrlhf: SimpleNamespace) -> None:
    values = torch.randn(2, 3, requires_grad=True)
    for maker in (ours, openrlhf.maker.RemoteExperienceMaker):
        for result in maker.get_advantages_and_returns(None, values, values * 2, torch.ones(2, 3), 1.0, 0.95):
            assert not result.requires_grad
