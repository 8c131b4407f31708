"""verl.trainer.ppo.core_algos and the linear heads: our functions against verl's own."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import ppo_fast.integrations.verl as ours

from .conftest import MASK_DTYPES, MASKS, masks

Check = Callable[..., None]
Batch = Callable[..., list[Tensor]]
MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"]
GLOBAL = {
    "local": {},
    "global": {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 8},
    "scaled": {"loss_scale_factor": 5},
}
EVERY_MASK_DTYPE = pytest.mark.parametrize("mask_dtype", list(MASK_DTYPES.values()), ids=list(MASK_DTYPES))


@pytest.mark.parametrize("mask_name", MASKS[:-1])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae(
    verl: SimpleNamespace,
    same: Check,
    batch: Batch,
    mask_name: str,
    mask_dtype: torch.dtype,
    gamma: float,
    lam: float,
    dtype: torch.dtype,
) -> None:
    mask = masks()[mask_name].to(mask_dtype)
    rewards, values = batch(2, mask, dtype, 10.0)
    same(
        lambda r, v: ours.compute_gae_advantage_return(r, v, mask, gamma, lam),
        lambda r, v: verl.algos.compute_gae_advantage_return(r, v, mask, gamma, lam),
        rewards,
        values,
        moving=0,
        rtol=1e-4,
        atol=1e-5,
    )


def test_gae_ignores_what_stands_under_the_mask(batch: Batch) -> None:
    """verl's own test asks for equal bits in the whole tensor, masked slots included."""
    mask = masks()["holes"]
    (rewards, values), (others, other_values) = batch(2, mask), batch(2, mask, garbage=-3e3)
    others = torch.where(mask != 0, rewards, others)
    other_values = torch.where(mask != 0, values, other_values)
    one = ours.compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)[0]
    two = ours.compute_gae_advantage_return(others, other_values, mask, 0.99, 0.95)[0]
    assert torch.equal(one, two)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_gae_keeps_how_verl_spreads_nan(
    verl: SimpleNamespace, same: Check, batch: Batch, bad: float, which: int
) -> None:
    mask = masks()["holes"]
    inputs = batch(2, mask)
    inputs[which][0, 3] = bad
    for function in (ours.compute_gae_advantage_return, verl.algos.compute_gae_advantage_return):
        assert function(*inputs, mask, 1.0, 0.95)[1][0, :3].isnan().all()
    same(
        lambda r, v: ours.compute_gae_advantage_return(r, v, mask, 1.0, 0.95),
        lambda r, v: verl.algos.compute_gae_advantage_return(r, v, mask, 1.0, 0.95),
        *inputs,
        moving=0,
    )


def test_gae_takes_tensors_for_its_coefficients_and_refuses_what_verl_refuses(
    verl: SimpleNamespace, same: Check, batch: Batch
) -> None:
    mask = masks()["holes"]
    inputs = batch(2, mask)
    gamma, rewards, values = torch.tensor([0.9, 1.0, 0.5]), *batch(2, mask, torch.bfloat16)
    for functions in (ours, verl.algos):  # a tensor of float32 widens
        for result in functions.compute_gae_advantage_return(rewards, values, mask, gamma, 0.9):
            assert result.dtype == torch.float32
    for gamma in (torch.tensor(0.9), torch.tensor([0.9, 1.0, 0.5])):
        same(
            lambda r, v, g=gamma: ours.compute_gae_advantage_return(r, v, mask, g, g),
            lambda r, v, g=gamma: verl.algos.compute_gae_advantage_return(r, v, mask, g, g),
            *inputs,
            moving=0,
        )
    for algos in (ours, verl.algos):
        with pytest.raises(RuntimeError, match="bool"):
            algos.compute_gae_advantage_return(*inputs, mask.bool(), 1.0, 0.95)
        for counted in (0, 1):
            few = torch.zeros(3, 7, dtype=torch.int64)
            few[0, :counted] = 1
            with pytest.raises(ValueError, match="At least one element|The sum of the mask is one"):
                algos.compute_gae_advantage_return(*inputs, few, 1.0, 0.95)
    with pytest.raises(ValueError, match="`response_mask` has entries other than 0 and 1"):
        ours.compute_gae_advantage_return(*inputs, mask * 0.5, 1.0, 0.95)


def test_gae_in_half_precision_has_verls_dtype(verl: SimpleNamespace, batch: Batch) -> None:
    for mask_dtype in (torch.int64, torch.float32):
        mask = masks()["holes"].to(mask_dtype)
        inputs = batch(2, mask, torch.bfloat16, 1.0)
        pairs = zip(
            ours.compute_gae_advantage_return(*inputs, mask, 1.0, 0.95),
            verl.algos.compute_gae_advantage_return(*inputs, mask, 1.0, 0.95),
            strict=True,
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)


KINDS = ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}+" for kind in KINDS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_penalty(verl: SimpleNamespace, same: Check, kind: str, dtype: torch.dtype) -> None:
    """Differences beyond the clamps on both sides, at the clamps, 0 and one that overflows among them."""
    differences = torch.tensor(
        [0.0, 0.5, -0.5, 2.2, -2.2, 2.5, -2.6, 9.0, -9.0, 20.0, -20.0, 40.0, -40.0, 300.0, -300.0]
    ).to(dtype)
    ref = torch.randn(15).to(dtype)
    for moving in (1, 2):
        same(
            lambda a, b: ours.kl_penalty(a, b, kind),
            lambda a, b: verl.algos.kl_penalty(a, b, kind),
            ref + differences,
            ref,
            moving=moving,
        )


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}+" for kind in KINDS)])
def test_kl_penalty_keeps_what_is_not_finite(verl: SimpleNamespace, same: Check, kind: str) -> None:
    new = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 0.0, torch.inf])
    ref = torch.tensor([0.0, 0.0, 0.0, torch.nan, torch.inf, torch.inf])
    same(
        lambda: ours.kl_penalty(new, ref, kind),
        lambda: verl.algos.kl_penalty(new, ref, kind),
        moving=0,
    )


def test_kl_penalty_in_half_precision(verl: SimpleNamespace, no_worse_than_theirs: Check) -> None:
    ref = torch.randn(2, 5).bfloat16()
    new = ref + torch.randn(2, 5).bfloat16()
    for kind in KINDS:
        no_worse_than_theirs(
            lambda a, b, k=kind: ours.kl_penalty(a, b, k),
            lambda a, b, k=kind: verl.algos.kl_penalty(a, b, k),
            new,
            ref,
        )


@pytest.mark.parametrize("kind", ["full", "nonesuch", "full+"])
def test_kl_penalty_has_not_every_kind(verl: SimpleNamespace, kind: str) -> None:
    for algos in (ours, verl.algos):
        with pytest.raises(NotImplementedError):
            algos.kl_penalty(torch.zeros(1), torch.zeros(1), kind)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_name", MASKS)
@EVERY_MASK_DTYPE
@pytest.mark.parametrize("totals", list(GLOBAL))
def test_agg_loss(
    verl: SimpleNamespace,
    same: Check,
    batch: Batch,
    mode: str,
    mask_name: str,
    mask_dtype: torch.dtype,
    totals: str,
) -> None:
    mask = masks()[mask_name].to(mask_dtype)
    for garbage in (1.0, torch.nan):
        (losses,) = batch(1, mask, torch.float32, garbage)
        same(
            lambda x: ours.agg_loss(x, mask, mode, **GLOBAL[totals]),
            lambda x: verl.algos.agg_loss(x, mask, mode, **GLOBAL[totals]),
            losses,
            moving=int(garbage == garbage),
        )


def test_agg_loss_of_weights_and_of_half_precision(verl: SimpleNamespace, same: Check) -> None:
    weights = torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, 0.25]])
    for mode in MODES:
        same(
            lambda x, m=mode: ours.agg_loss(x, weights, m),
            lambda x, m=mode: verl.algos.agg_loss(x, weights, m),
            torch.randn(2, 3),
        )
        half = torch.randn(2, 3).bfloat16()
        for mask in (weights > 0, weights):
            one, other = (f.agg_loss(half, mask, mode) for f in (ours, verl.algos))
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_agg_loss_asks_for_the_totals_of_several_ranks(verl: SimpleNamespace) -> None:
    losses = mask = torch.ones(2, 3)
    for algos in (ours, verl.algos):
        with pytest.raises(ValueError, match="batch_num_tokens is required"):
            algos.agg_loss(losses, mask, "token-mean", dp_size=2)
        with pytest.raises(ValueError, match="global_batch_size is required"):
            algos.agg_loss(losses, mask, "seq-mean-token-mean", dp_size=2)
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
            algos.agg_loss(losses, mask, "mean")


def actor(verl: SimpleNamespace, totals: str = "local", **settings: float) -> object:
    config = verl.config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
    object.__setattr__(config, "global_batch_info", dict(GLOBAL[totals]))
    return config


def policy_inputs(batch: Batch, mask: Tensor, garbage: float = 3.0) -> list[Tensor]:
    """log_prob, old_log_prob, advantages, weights: ratios on both sides of every clip, advantages of every sign."""
    new, old, advantages, weights = batch(4, mask, torch.float32, garbage)
    old = torch.where(mask != 0, new - old, old)
    advantages[1, 2] = 0.0
    return [new, old, advantages, weights.abs()]


SETTINGS = {
    "default": {},
    "asymmetric": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4, "clip_ratio_c": 1.5},
    "open_below": {"clip_ratio_low": 2.0, "clip_ratio_high": 0.28},
}
LOSSES = ["compute_policy_loss_vanilla", "compute_policy_loss_gspo"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("settings", list(SETTINGS))
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_losses(
    verl: SimpleNamespace,
    same: Check,
    batch: Batch,
    name: str,
    mode: str,
    mask_name: str,
    settings: str,
    weighted: bool,
) -> None:
    for mask_dtype in MASK_DTYPES.values():
        mask = masks()[mask_name].to(mask_dtype)
        config = actor(verl, "global" if mask_dtype == torch.int64 else "local", **SETTINGS[settings])
        new, old, advantages, weights = policy_inputs(batch, mask)
        weights = weights if weighted else None
        same(
            lambda x, m=mask, c=config, o=old, a=advantages, w=weights: getattr(ours, name)(
                o, x, a, m, mode, c, w
            ),
            lambda x, m=mask, c=config, o=old, a=advantages, w=weights: getattr(verl.algos, name)(
                o, x, a, m, mode, c, w
            ),
            new,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spot", ["log_prob", "old_log_prob", "advantages"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["counted", "masked", "masked_row"])
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_losses_keep_what_is_not_finite(
    verl: SimpleNamespace,
    same: Check,
    batch: Batch,
    name: str,
    mode: str,
    spot: str,
    bad: float,
    place: str,
    weighted: bool,
) -> None:
    """Also where a weight of 0 stands beside it."""
    mask = masks()["an_empty_row"]
    inputs = dict(
        zip(("log_prob", "old_log_prob", "advantages"), policy_inputs(batch, mask, 1.0), strict=False)
    )
    if weighted:
        inputs["rollout_is_weights"] = torch.tensor([[0.5, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0]]).repeat(3, 1)
    inputs[spot][{"counted": (0, 1), "masked": (0, 2), "masked_row": (1, 3)}[place]] = bad
    same(
        lambda: getattr(ours, name)(**inputs, response_mask=mask, loss_agg_mode=mode, config=actor(verl)),
        lambda: getattr(verl.algos, name)(
            **inputs, response_mask=mask, loss_agg_mode=mode, config=actor(verl)
        ),
        moving=0,
        rtol=1e-4,
        atol=1e-5,
    )


def test_policy_loss_at_its_ties_and_clamps(verl: SimpleNamespace, same: Check) -> None:
    """Ratio 1, exactly at both clips and at the dual clip, at and past the clamp of the log-ratio; zero advantages."""
    gaps = torch.tensor([0.0, 0.5, -0.5, 1.0, 2.0, 20.0, -20.0, 25.0, 30.0, 0.0])  # ppo_kl shows the clamp
    new = torch.cat([gaps, gaps, gaps]).view(3, -1)
    advantages = torch.tensor([[1.0], [-1.0], [0.0]]).expand_as(new).contiguous()
    config = actor(verl, clip_ratio_low=0.5, clip_ratio_high=1.0, clip_ratio_c=4.0)
    ratios = torch.tensor([1.0, 2.0, 0.5, 4.0, 8.0]).log().repeat(3, 2)
    for log_ratio in (new, ratios):
        same(
            lambda x, a=advantages: ours.compute_policy_loss_vanilla(
                torch.zeros_like(x), x, a, torch.ones_like(x), config=config
            ),
            lambda x, a=advantages: verl.algos.compute_policy_loss_vanilla(
                torch.zeros_like(x), x, a, torch.ones_like(x), config=config
            ),
            log_ratio,
        )


def test_policy_losses_ask_for_a_config(verl: SimpleNamespace) -> None:
    tensors = [torch.zeros(1, 2)] * 4
    for algos in (ours, verl.algos):
        for name in LOSSES:
            with pytest.raises(AssertionError):
                getattr(algos, name)(*tensors)
        with pytest.raises(AssertionError, match="greater than 1.0"):
            algos.compute_policy_loss_vanilla(*tensors, config=actor(verl, clip_ratio_c=1.0))
    with pytest.raises(ValueError, match="entries other than 0 and 1"):
        ours.compute_policy_loss_vanilla(*tensors[:3], torch.full((1, 2), 0.5), config=actor(verl))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask_name", MASKS)
@EVERY_MASK_DTYPE
@pytest.mark.parametrize("totals", list(GLOBAL))
def test_value_loss(
    verl: SimpleNamespace,
    same: Check,
    batch: Batch,
    mode: str,
    mask_name: str,
    mask_dtype: torch.dtype,
    totals: str,
) -> None:
    mask = masks()[mask_name].to(mask_dtype)
    new, returns, old = batch(3, mask, torch.float32, 3.0)
    same(
        lambda x: ours.compute_value_loss(x, returns, old, mask, 0.5, mode, **GLOBAL[totals]),
        lambda x: verl.algos.compute_value_loss(x, returns, old, mask, 0.5, mode, **GLOBAL[totals]),
        new,
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("place", [(0, 1), (0, 2), (1, 3)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_value_loss_keeps_what_is_not_finite(
    verl: SimpleNamespace,
    same: Check,
    batch: Batch,
    mode: str,
    which: int,
    place: tuple[int, int],
    bad: float,
) -> None:
    mask = masks()["an_empty_row"]
    inputs = batch(3, mask, torch.float32, 1.0)
    inputs[which][place] = bad
    same(
        lambda: ours.compute_value_loss(*inputs, mask, 0.5, mode),
        lambda: verl.algos.compute_value_loss(*inputs, mask, 0.5, mode),
        moving=0,
        rtol=1e-4,
        atol=1e-5,
    )


def test_value_loss_at_its_ties(verl: SimpleNamespace, same: Check) -> None:
    """Exactly at both ends of the clip, and at the old value, with returns on either side."""
    new = torch.tensor([[0.5, -0.5, 0.0, 0.25, 0.75, -0.75, 0.5, -0.5]])
    returns = torch.tensor([[1.0, -1.0, 2.0, 0.0, 0.0, -3.0, -1.0, 3.0]])
    old = torch.zeros_like(new)
    same(
        lambda x: ours.compute_value_loss(x, returns, old, torch.ones_like(x), 0.5),
        lambda x: verl.algos.compute_value_loss(x, returns, old, torch.ones_like(x), 0.5),
        new,
    )


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.tensor(0.7)])
@pytest.mark.parametrize("chunk_size", [2, 512])
def test_fused_linear(
    verl: SimpleNamespace, same: Check, shape: tuple[int, ...], temperature: float, chunk_size: int
) -> None:
    hidden, weight, labels = torch.randn(*shape, 8), torch.randn(29, 8), torch.randint(29, shape)
    module = verl.fused.FusedLinearForPPO(chunk_size=chunk_size)
    for dtype in (torch.int64, torch.int32):
        same(
            lambda h, w, y: ours.fused_linear_for_ppo_forward(module, h, w, y, temperature),
            lambda h, w, y: module(h, w, y, temperature),
            hidden,
            weight,
            labels.to(dtype),
            moving=2,
        )


def test_fused_linear_in_half_precision(verl: SimpleNamespace, no_worse_than_theirs: Check) -> None:
    module = verl.fused.FusedLinearForPPO()
    hidden, weight = torch.randn(6, 16).bfloat16(), torch.randn(29, 16).bfloat16()
    no_worse_than_theirs(
        lambda h, w, y: ours.fused_linear_for_ppo_forward(module, h, w, y, 0.7),
        lambda h, w, y: module(h, w, y, 0.7),
        hidden,
        weight,
        torch.randint(29, (6,)),
        moving=2,
    )
    with pytest.raises(AssertionError, match="Invalid hidden_states shape"):
        ours.fused_linear_for_ppo_forward(module, torch.zeros(1, 1, 1, 2), weight, torch.zeros(1, 1, 1))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "SUM"])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_linear_cross_entropy(same: Check, reduction: str, shape: tuple[int, ...]) -> None:
    """verl's kernel needs a GPU: the truth is what it computes, in torch."""

    def theirs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(hidden.flatten(0, -2) @ weight.T / 0.7, -1)
        picked = logp.gather(-1, labels.flatten().unsqueeze(-1)).squeeze(-1)
        reduced = {"none": picked, "sum": picked.sum(), "mean": picked.mean()}[reduction.lower()]
        return reduced, -(logp.exp() * logp).sum(-1)

    same(
        lambda h, w, y: ours.linear_cross_entropy(h, w, y, 0.7, reduction),
        theirs,
        torch.randn(*shape, 8),
        torch.randn(29, 8),
        torch.randint(29, shape),
        moving=2,
    )


def test_linear_cross_entropy_refuses_what_verl_refuses(verl: SimpleNamespace) -> None:
    arguments = torch.randn(2, 128), torch.randn(5, 128), torch.tensor([0, 1])
    with pytest.raises(AssertionError, match="temperature must be a float"):
        ours.linear_cross_entropy(*arguments, 1)
    with pytest.raises(ValueError, match="Invalid reduction: median"):
        ours.linear_cross_entropy(*arguments, 1.0, "median")


@pytest.mark.parametrize("mode", MODES)
@EVERY_MASK_DTYPE
def test_losses_in_half_precision_have_verls_dtypes(
    verl: SimpleNamespace, same: Check, batch: Batch, mode: str, mask_dtype: torch.dtype
) -> None:
    mask = masks()["holes"].to(mask_dtype)
    new, old, advantages, _ = (x.bfloat16() for x in policy_inputs(batch, mask, 1.0))
    for name in LOSSES:
        same(
            lambda x, n=name: getattr(ours, n)(old, x, advantages, mask, mode, actor(verl))[0],
            lambda x, n=name: getattr(verl.algos, n)(old, x, advantages, mask, mode, actor(verl))[0],
            new,
            rtol=5e-2,
            atol=5e-2,
        )
    same(
        lambda x: ours.compute_value_loss(x, old, advantages, mask, 0.5, mode),
        lambda x: verl.algos.compute_value_loss(x, old, advantages, mask, 0.5, mode),
        new,
        rtol=5e-2,
        atol=5e-2,
    )


def test_gspo_past_the_clamp_of_a_sequence(verl: SimpleNamespace, same: Check) -> None:
    """Mean log-ratios below and above 10, where verl clamps them and the gradient ends; advantages of both signs."""
    new = torch.tensor([9.0, 10.5, 9.0, 12.0]).unsqueeze(1) + torch.linspace(-0.4, 0.4, 5)
    advantages = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]]).expand_as(new).contiguous()
    config = actor(verl, clip_ratio_low=0.2, clip_ratio_high=0.3)

    def loss_of(algos: object) -> Callable[[Tensor], object]:
        return lambda x: algos.compute_policy_loss_gspo(
            torch.zeros_like(x), x, advantages, torch.ones_like(x), "seq-mean-token-mean", config
        )

    same(loss_of(ours), loss_of(verl.algos), new, rtol=1e-5, atol=1e-5)
    leaf = new.clone().requires_grad_()
    loss, _ = loss_of(ours)(leaf)
    loss.backward()
    assert (leaf.grad[0] != 0).all()
    assert (leaf.grad[1] == 0).all()
