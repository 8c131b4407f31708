"""What README promises: its Python runs, its tables are the program's own, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import ppo_fast
from ppo_fast.cli import COMMANDS
from ppo_fast.report import glossary_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_first_example_runs_and_equals_its_eager_form() -> None:
    scope: dict[str, object] = {}
    exec(blocks("python")[0] + blocks("python")[1], scope)
    torch.testing.assert_close(scope["loss"], scope["policy"].loss)


def test_the_training_example_builds_a_config() -> None:
    scope: dict[str, object] = {}
    (example,) = (block for block in blocks("python") if "train(config)" in block)
    exec(example.replace("train(config)", ""), scope)
    assert scope["config"].models.actor == "runs/sft"


def test_the_glossary_is_the_programs_own() -> None:
    assert glossary_markdown() in README


def test_the_op_table_lists_every_op_with_its_implementations() -> None:
    section = README.split("## Ops")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \| .* \| ([a-z, ]+) \|$", section, re.MULTILINE)
    table = {name: set(impls.split(", ")) for names, impls in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(table) == set(ppo_fast.reference.__all__)
    # Triton and CUDA need a GPU, or Triton's interpreter, so only the rest can be asked on any machine.
    for name, documented in table.items():
        assert documented - {"triton", "cuda"} == set(ppo_fast.available_impls(name)) - {"triton", "cuda"}, (
            name
        )


def test_every_command_and_target_exists() -> None:
    shell = "\n".join(blocks("bash"))
    assert set(re.findall(r"^ppo-fast (\w+)", shell, re.MULTILINE)) <= set(COMMANDS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake (\w+)", README)) <= targets


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
