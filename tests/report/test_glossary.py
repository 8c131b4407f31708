"""The glossary covers what a run logs, and its Markdown is a table."""

from __future__ import annotations

import json
from typing import Any

from ppo_fast.report import GLOSSARY, glossary_markdown
from ppo_fast.report.glossary import is_judge


def test_every_logged_key_is_in_the_glossary(make_run: Any) -> None:
    lines = (make_run(steps=1) / "metrics.jsonl").read_text().splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert {key for key in logged if key not in GLOSSARY and not is_judge(key)} == set()
    assert {key for key in GLOSSARY if key not in logged} == {"eval/<judge>"}


def test_markdown_has_a_row_a_metric_and_three_cells_a_row() -> None:
    lines = glossary_markdown().split("\n")
    assert lines[:2] == ["| metric | unit | meaning |", "|---|---|---|"]
    assert len(lines) == 2 + len(GLOSSARY)
    assert {line.count("|") for line in lines} == {4}
    assert (
        "| `objective/kl_coef` | reward per nat | weight of the KL term in the reward during this step |"
        in lines
    )
