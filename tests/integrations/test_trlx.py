"""trlX: the caller's exact pattern against its formulas in float64, and against its source where importable.

It is not on PyPI. With a checkout on PYTHONPATH the tests named `source` run too; its two modules of formulas load
without the packages that the rest of it needs (DeepSpeed, Ray, torchtyping).
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import trlx as ours

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def source() -> Iterator[SimpleNamespace]:
    """`trlx.utils.modeling` and `trlx.models.modeling_ppo`."""
    found = importlib.util.find_spec("trlx")
    if found is None:
        pytest.skip("trlX is not on PyPI: put a checkout of it on PYTHONPATH")
    for model in ("bloom", "opt"):  # transformers looks for the packages below, so before these stand in
        importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    absent = [name for name in ("deepspeed", "torchtyping") if importlib.util.find_spec(name) is None]
    hollow = ModuleType("trlx")  # its __init__ loads every trainer
    hollow.__path__ = [str(Path(found.origin).parent)]
    with patch.dict(sys.modules, {"trlx": hollow} | {name: MagicMock(name=name) for name in absent}):
        modeling = importlib.import_module("trlx.utils.modeling")
        yield SimpleNamespace(modeling=modeling, ppo=importlib.import_module("trlx.models.modeling_ppo"))


def settings(**changes: object) -> SimpleNamespace:
    defaults = {"gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 1.0}
    return SimpleNamespace(**(defaults | changes))


def close(a: Tensor, b: Tensor, dtype: torch.dtype, steps: int = 8) -> None:
    slack = max(1e-5, steps * torch.finfo(dtype).eps)
    torch.testing.assert_close(a.double(), b.double(), rtol=slack, atol=slack, equal_nan=True)


def true_gae(values: Tensor, rewards: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    values, rewards = values.double(), rewards.double()
    advantages = torch.zeros_like(values)
    for row in range(len(rewards)):
        running, following = 0.0, 0.0
        for t in reversed(range(values.shape[1])):
            running = rewards[row, t] + gamma * following - values[row, t] + gamma * lam * running
            advantages[row, t], following = running, values[row, t]
    return advantages, advantages + values


def true_whiten(xs: Tensor, shift_mean: bool = True) -> Tensor:
    xs = xs.double()
    whitened = (xs - xs.mean()) / (xs.var() + 1e-8).sqrt()
    return whitened if shift_mean else whitened + xs.mean()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_of_labels(dtype: torch.dtype) -> None:
    logits, labels = (3 * torch.randn(3, 6, 97)).to(dtype), torch.randint(97, (3, 6))
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = ours.logprobs_of_labels(leaf[:, :-1], labels[:, 1:])
    truth = wide[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].unsqueeze(-1)).squeeze(-1)
    assert got.dtype == dtype
    close(got, truth, dtype, steps=1)
    got.sum().backward()
    truth.sum().backward()
    close(leaf.grad, wide.grad, dtype, steps=1)
    with pytest.raises(RuntimeError):
        ours.logprobs_of_labels(logits, labels + 97)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("distributed", [True, False])
def test_whiten(dtype: torch.dtype, shift_mean: bool, distributed: bool) -> None:
    xs = (2 * torch.randn(4, 5) + 3).to(dtype)
    got = ours.whiten(xs, shift_mean, distributed)
    assert got.dtype == dtype
    close(got, true_whiten(xs, shift_mean), dtype)


def test_one_element_has_no_variance() -> None:
    assert ours.whiten(torch.randn(1, 1)).isnan().all()
    assert ours.whiten(torch.randn(())).isnan()
    assert ours.whiten(torch.randn(0, 3)).shape == (0, 3)
    equal = torch.full((2, 3), 4.0)
    torch.testing.assert_close(ours.whiten(equal), torch.zeros(2, 3))
    torch.testing.assert_close(ours.whiten(equal, shift_mean=False), equal)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_over_processes(shift_mean: bool) -> None:
    """Over a group the variance is biased; one process is a group too."""
    xs = 2 * torch.randn(4, 5) + 3
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        got, alone = ours.whiten(xs, shift_mean), ours.whiten(xs, shift_mean, distributed=False)
    finally:
        torch.distributed.destroy_process_group()
    want = (xs - xs.mean()) / (xs.var(unbiased=False) + 1e-8).sqrt() + (0 if shift_mean else xs.mean())
    torch.testing.assert_close(got, want)
    close(alone, true_whiten(xs, shift_mean), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0)])
@pytest.mark.parametrize("whitens", [True, False, None])
def test_advantages_and_returns(dtype: torch.dtype, gamma: float, lam: float, whitens: bool | None) -> None:
    """Rewards may be wider than the response."""
    values, rewards = torch.randn(3, 6).to(dtype).requires_grad_(), torch.randn(3, 8).to(dtype)
    got, got_returns = ours.get_advantages_and_returns(
        settings(gamma=gamma, lam=lam), values, rewards, 6, whitens
    )
    advantages, returns = true_gae(values.detach(), rewards, gamma, lam)
    assert got.dtype == got_returns.dtype == dtype
    assert not got.requires_grad
    assert got_returns.requires_grad
    close(got, true_whiten(advantages) if whitens else advantages, dtype, steps=16)
    close(got_returns, returns, dtype)


def test_advantages_and_returns_refuse() -> None:
    for length in (0, 5):
        with pytest.raises(RuntimeError, match="columns|response_length"):
            ours.get_advantages_and_returns(settings(), torch.randn(2, 6), torch.randn(2, 6), length)


def batch(dtype: torch.dtype = torch.float32, mask: str = "some") -> list[Tensor]:
    numbers = [torch.randn(4, 7).to(dtype) for _ in range(6)]
    masks = {
        "some": (torch.arange(7) < torch.tensor([7, 4, 1, 0]).unsqueeze(1)).long(),
        "all": torch.ones(4, 7).long(),
        "none": torch.zeros(4, 7).long(),
    }
    return [*numbers, masks[mask]]


def written_out(config: SimpleNamespace, *tensors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics in float64."""
    *numbers, mask = tensors
    logprobs, values, old_logprobs, old_values, advantages, returns = (x.double() for x in numbers)
    n, counted = mask.sum(), mask.bool()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / n

    clipped = values.clamp(old_values - config.cliprange_value, old_values + config.cliprange_value)
    first, second = (values - returns) ** 2, (clipped - returns) ** 2
    gap = (logprobs - old_logprobs) * mask
    plain = -advantages * gap.exp()
    bounded = -advantages * gap.exp().clamp(1 - config.cliprange, 1 + config.cliprange)
    policy, value = mean(torch.max(plain, bounded)), 0.5 * mean(torch.max(first, second))
    loss = policy + config.vf_coef * value
    stats = {
        "losses/total_loss": loss,
        "losses/policy_loss": policy,
        "losses/value_loss": value,
        "values/values_error": (((values - returns) * mask) ** 2).sum() / n,
        "values/values_mape_error": (((values - returns).abs() * mask) / (returns * mask + 1e-2).abs()).sum()
        / n,
        "values/clipfrac": mean((second > first).double()),
        "policy/approx_kl": (gap.exp() - 1 - gap).mean(),
        "policy/clipfrac": mean((bounded > plain).double()),
        "ratio": mean(gap.exp()),
        "padding_percentage": 1 - n / mask.numel(),
    }
    for name, x in {"values": values, "old_values": old_values, "returns": returns}.items():
        inside = x[counted]
        stats[f"{name}/mean"] = mean(x)
        stats[f"{name}/min"] = inside.min() if len(inside) else torch.tensor(torch.inf)
        stats[f"{name}/max"] = inside.max() if len(inside) else torch.tensor(-torch.inf)
        stats[f"{name}/std"] = mean((x - mean(x)) ** 2).sqrt()
    return loss, stats


@pytest.mark.parametrize("mask", ["some", "all", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"cliprange": 0.0, "cliprange_value": 0.0}, {"vf_coef": 0.3}], ids=str
)
def test_loss(mask: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    tensors, config = batch(dtype, mask), settings(**options)
    leaves, wide = ([x.detach().clone() for x in tensors], [x.double() for x in tensors])
    for x in (*leaves[:2], *wide[:2]):
        x.requires_grad_()
    wide[-1] = tensors[-1]
    got, stats = ours.loss(config, *leaves)
    want, true_stats = written_out(config, *wide)
    close(got.detach(), want.detach(), dtype)
    assert set(stats) == set(true_stats)
    for name, number in true_stats.items():
        close(torch.as_tensor(stats[name]).detach(), number.detach(), dtype, steps=16)
        assert isinstance(stats[name], float) == name.startswith(("losses/", "policy/"))
    if mask != "none":
        got.backward()
        want.backward()
        for a, b in zip(leaves[:2], wide[:2], strict=True):
            close(a.grad, b.grad, dtype)


@pytest.mark.parametrize("slot", [(0, 0), (1, 5)], ids=["counted", "masked"])
@pytest.mark.parametrize("which", range(6))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_the_loss_is_nan_where_theirs_is(slot: tuple[int, int], which: int, bad: float) -> None:
    tensors = batch()
    tensors[which][slot] = bad
    got, want = ours.loss(settings(), *tensors)[0], written_out(settings(), *tensors)[0].float()
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_source_functions(source: SimpleNamespace, dtype: torch.dtype) -> None:
    xs, labels = torch.randn(3, 6, 97).to(dtype), torch.randint(97, (3, 6))
    close(ours.logprobs_of_labels(xs, labels), source.modeling.logprobs_of_labels(xs, labels), dtype)
    theirs = source.ppo.PPOConfig
    for shift_mean in (True, False):
        for few in (xs[0, :, :5], xs[0, :1, 0]):
            got, want = ours.whiten(few, shift_mean), source.modeling.whiten(few, shift_mean)
            assert got.dtype == want.dtype
            close(got, want, dtype, steps=16)
    values, rewards = xs[0, :, :5], xs[1, :, :7]
    for whitens in (True, False):
        pair = (x.get_advantages_and_returns(settings(), values, rewards, 5, whitens) for x in (ours, theirs))
        for a, b in zip(*pair, strict=True):
            assert a.dtype == b.dtype
            close(a, b, dtype, steps=32)


@pytest.mark.parametrize("mask", ["some", "all", "none"])
def test_source_loss_patched(source: SimpleNamespace, mask: str) -> None:
    """The class itself, before and after the patch, and every name of the log."""
    theirs, tensors = source.ppo.PPOConfig, batch(mask=mask)
    before, whiten = theirs.loss(settings(), *tensors), source.modeling.whiten
    record = ppo_fast.patch("trlx")
    try:
        after = theirs.loss(settings(), *tensors)
        assert source.modeling.whiten is source.ppo.whiten is not whiten
    finally:
        ppo_fast.unpatch("trlx")
    assert source.modeling.whiten is source.ppo.whiten is whiten
    assert record.calls["trlx.models.modeling_ppo.PPOConfig.loss"] == 1
    close(after[0], before[0], torch.float32)
    assert list(after[1]) == list(before[1])
    for name, number in before[1].items():
        assert type(after[1][name]) is type(number), name
        close(torch.as_tensor(after[1][name]), torch.as_tensor(number), torch.float32)
