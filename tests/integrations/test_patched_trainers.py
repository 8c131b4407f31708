"""`patch` and `unpatch` on the installed verl and OpenRLHF: what holds ours, what is restored, what is refused."""

import importlib
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import PatchError, contract, openrlhf, verl

from .stand_ins import OPENRLHF, VERL, stand_ins

TRAINERS = {"verl": (VERL, verl), "openrlhf": (OPENRLHF, openrlhf)}
EVERY_TRAINER = pytest.mark.parametrize("trainer", list(TRAINERS))


@pytest.fixture
def installed(trainer: str, request: pytest.FixtureRequest) -> SimpleNamespace:
    return request.getfixturevalue(trainer)


def patch(trainer: str, **options: bool) -> ppo_fast.integrations.Patch:
    with stand_ins(**TRAINERS[trainer][0]):
        return ppo_fast.patch(trainer, **options)


def state_of(trainer: str) -> dict[tuple[str, ...], int]:
    """What every name of the trainer's modules, classes and registries holds, by identity."""
    state = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != trainer:
            continue
        for name, value in vars(module).items():
            state[module_name, name] = id(value)
            inner = vars(value) if isinstance(value, type) else value if isinstance(value, dict) else {}
            state |= {(module_name, name, str(key)): id(one) for key, one in dict(inner).items()}
    return state


@EVERY_TRAINER
def test_every_name_is_replaced_and_restored(trainer: str, installed: SimpleNamespace) -> None:
    before = state_of(trainer)
    record = patch(trainer)
    changed = {place for place, now in state_of(trainer).items() if before.get(place) != now}
    for one in record.replaced:
        *owner, name = one.name.split(".")
        assert any(place[-1] == name and ".".join(place[:-1]) == ".".join(owner) for place in changed), (
            one.name
        )
    ppo_fast.unpatch(trainer)
    assert state_of(trainer) == before


def test_registries_and_modules_that_are_imported_later(verl: SimpleNamespace) -> None:
    sys.modules.pop("verl.workers.utils.losses", None)
    record = patch("verl")
    with stand_ins(**VERL):
        losses = importlib.import_module("verl.workers.utils.losses")
    for name in ("agg_loss", "compute_value_loss", "kl_penalty"):
        assert getattr(losses, name) is getattr(verl.algos, name)
        assert getattr(losses, name).__wrapped__.__module__.startswith("ppo_fast.integrations.verl")
    assert verl.algos.get_policy_loss_fn("vanilla") is verl.algos.compute_policy_loss_vanilla
    assert verl.algos.get_policy_loss_fn("gspo") is verl.algos.compute_policy_loss_gspo
    assert verl.algos.get_adv_estimator_fn("gae") is verl.algos.compute_gae_advantage_return
    places = {place for one in record.replaced for place in one.places}
    assert "verl.trainer.ppo.core_algos:ADV_ESTIMATOR_REGISTRY['gae']" in places
    ppo_fast.unpatch()
    assert losses.agg_loss is verl.algos.agg_loss
    assert not hasattr(losses.agg_loss, "__wrapped__")


def test_both_at_once(verl: SimpleNamespace, openrlhf: SimpleNamespace) -> None:
    with stand_ins(**VERL), stand_ins(**OPENRLHF):
        record = ppo_fast.patch("verl", "openrlhf")
    assert {one.name.split(".")[0] for one in record.replaced} == {"verl", "openrlhf"}
    assert hasattr(openrlhf.maker.compute_approx_kl, "__wrapped__")  # from-imported before the patch


@EVERY_TRAINER
def test_another_version_is_refused(
    trainer: str, installed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == trainer else version(name))
    before = state_of(trainer)
    with pytest.raises(PatchError, match=f"{trainer} is 9.9; the versions that it is made for are"):
        patch(trainer)
    assert state_of(trainer) == before


def test_another_signature_is_refused(verl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verl.functional, "masked_mean", lambda values, mask, dim=None: None)
    before = state_of("verl")
    with pytest.raises(
        PatchError, match=re.escape("masked_mean: its signature is (values, mask, dim=None), expected")
    ):
        patch("verl")
    assert state_of("verl") == before


@EVERY_TRAINER
def test_the_documentation_names_every_replacement(trainer: str) -> None:
    text = (Path(ppo_fast.__file__).parent / "integrations" / "README.md").read_text()
    (integration,) = TRAINERS[trainer][1].INTEGRATIONS
    for one in integration.replacements:
        assert one.path.split(":")[1].split(".")[-1] in text, one.path
    for version in integration.versions:
        assert version in text


def spoilt(count: int) -> tuple[list[Tensor], Tensor]:
    """Tensors whose last, masked column is NaN."""
    tensors = list(torch.randn(count, 2, 4))
    for tensor in tensors:
        tensor[:, -1] = torch.nan
    return tensors, torch.tensor([[1, 1, 1, 0]] * 2)


def losses_under_nan(verl: SimpleNamespace, openrlhf: SimpleNamespace) -> dict[str, Callable[[], Tensor]]:
    (new, old, advantages), mask = spoilt(3)
    impossible = torch.tensor([[0.0, 0.0, -torch.inf]])
    return {
        "gae": lambda: verl.algos.compute_gae_advantage_return(new, old, mask, 1.0, 0.95)[0][:, :3],
        "value": lambda: verl.algos.compute_value_loss(
            new, old, advantages, mask, 0.5, "seq-mean-token-mean"
        )[0],
        "entropy": lambda: verl.functional.entropy_from_logits(impossible),
        "policy": lambda: openrlhf.loss.PolicyLoss()(new, old, advantages, mask)[0],
        "critic": lambda: openrlhf.loss.ValueLoss(0.2)(new, old, advantages, mask),
    }


def test_without_strictness_masked_nan_is_not_read(verl: SimpleNamespace, openrlhf: SimpleNamespace) -> None:
    calls = losses_under_nan(verl, openrlhf)
    theirs = {name: call() for name, call in calls.items()}
    for strict in (True, False):
        for trainer in TRAINERS:
            patch(trainer, strict=strict)
        for name, call in calls.items():
            result = call()
            if strict:
                torch.testing.assert_close(result, theirs[name], equal_nan=True)
                assert result.isnan().any()
            else:
                assert result.isfinite().all(), name
        ppo_fast.unpatch()
        assert contract.strict()
