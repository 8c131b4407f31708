"""The README's snippet for this version of TRL runs, on TRL itself."""

import os
import re
from pathlib import Path

import pytest
import torch

import ppo_fast

README = (Path(__file__).parents[4] / "README.md").read_text()


def test_the_snippet(capsys: pytest.CaptureFixture[str]) -> None:
    version = ".".join(os.environ["PPO_FAST_TRL"].split(".")[:2])
    section = re.search(rf"^### TRL {version}.*?\n```python\n(.*?)```", README, re.DOTALL | re.MULTILINE)[1]
    scope: dict[str, object] = {"torch": torch}
    try:
        exec(section, scope)
    finally:
        ppo_fast.unpatch("trl")
    assert scope["logprobs"].shape == (2, 8)
    assert sum(scope["record"].calls.values()) == 1
    assert "logprobs_from_logits (cpu)" in capsys.readouterr().out
