"""The README's snippet for each trainer runs, on the trainer itself."""

import importlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ppo_fast

from .stand_ins import OPENRLHF, VERL, stand_ins

SECTION = (
    (Path(__file__).parents[2] / "README.md").read_text().split("## In another trainer")[1].split("\n## ")[0]
)
SNIPPETS = {
    heading: re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    for heading, text in re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", SECTION, re.DOTALL | re.MULTILINE)
}


def run(snippet: str, absent: dict[str, tuple[str, ...]]) -> dict[str, object]:
    scope: dict[str, object] = {"torch": torch}
    with stand_ins(**absent):
        exec(snippet, scope)
    return scope


def test_verl(verl: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = verl.algos.compute_gae_advantage_return
    scope = run(SNIPPETS["verl 0.9"], VERL)
    assert scope["record"].calls["verl.trainer.ppo.core_algos.compute_gae_advantage_return"] == 1
    assert scope["policy_loss"] is verl.algos.compute_policy_loss_vanilla
    assert "gae (cpu)" in capsys.readouterr().out
    expected = theirs(scope["rewards"], scope["values"], scope["mask"], 1.0, 0.95)
    torch.testing.assert_close((scope["advantages"], scope["returns"]), expected)
    ppo_fast.unpatch("verl")
    assert verl.algos.compute_gae_advantage_return is theirs


def test_openrlhf(openrlhf: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = openrlhf.loss.PolicyLoss.forward
    scope = run(SNIPPETS["OpenRLHF 0.11"], OPENRLHF)
    assert scope["record"].calls["openrlhf.models.loss.PolicyLoss.forward"] == 1
    assert "policy_loss (cpu)" in capsys.readouterr().out
    ppo_fast.unpatch("openrlhf")
    assert openrlhf.loss.PolicyLoss.forward is theirs
    inputs = scope["logprobs"], scope["old"], scope["advantages"], torch.ones(2, 8)
    torch.testing.assert_close(scope["loss"], openrlhf.loss.PolicyLoss()(*inputs)[0])


@pytest.mark.parametrize(("heading", "trainer"), [("DeepSpeed-Chat", "deepspeed_chat"), ("trlX", "trlx")])
def test_a_source_tree(heading: str, trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its source is not at hand, on modules that hold the same names with the same signatures."""
    (integration,) = importlib.import_module(f"ppo_fast.integrations.{trainer}").INTEGRATIONS
    package = integration.replacements[0].path.split(".")[0]
    assert importlib.util.find_spec(package) is None, (
        f"{package} is importable: its tests run the real source"
    )
    originals = {}
    for declared in integration.replacements:
        home, _, names = declared.path.partition(":")
        for depth in range(1, home.count(".") + 2):
            name = ".".join(home.split(".")[:depth])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        owner = sys.modules[home]
        *outer, last = names.split(".")
        for cls in outer:
            owner.__dict__.setdefault(cls, type(cls, (), {}))
            owner = getattr(owner, cls)
        originals[declared.path] = _like(declared.ours)
        setattr(owner, last, originals[declared.path])
    scope = run(SNIPPETS[heading], {"absent": ()})
    assert scope["logprobs"].shape == (2, 7)
    assert sum(scope["record"].calls.values()) == 1
    assert len(scope["record"].replaced) == len(originals)


def _like(function: Callable[..., object]) -> Callable[..., object]:
    """A function with the signature of this one, which is never to be reached."""

    def original(*args: object, **kwargs: object) -> None:
        raise AssertionError("the original was called")

    original.__signature__ = inspect.signature(function)
    return original


def test_one_function_at_a_time() -> None:
    (snippet,) = (x for x in re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL) if "patch" not in x)
    scope: dict[str, object] = {"torch": torch}
    exec(snippet, scope)
    assert scope["logprobs"].shape == (2, 8)
