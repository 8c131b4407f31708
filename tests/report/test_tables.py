"""Terminal tables: what stands in them, and that a model's text becomes neither markup nor an escape."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_fast.report import print_samples, print_summary, read_run
from ppo_fast.report.tables import best_and_worst, visible_text


def printed(show: Any, run: Path, **options: Any) -> str:
    stream = io.StringIO()
    show(run, console=Console(file=stream, width=160, color_system=None), **options)
    return stream.getvalue()


def rewrite_last_response(folder: Path, response: str) -> None:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines[6]["response"] = response
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_samples_stand_side_by_side_with_their_facts(make_run: Any) -> None:
    text = printed(print_samples, make_run(steps=4), count=2)
    assert "Largest gain (2 of 6 held-out prompts)" in text
    assert "Smallest gain (2 of 6)" in text
    assert "The film opens on a quiet street" in text
    # vader of the fixture: 0.1 + score / 10.
    assert "score -0.400 · vader 0.060 · KL 0.000 nats · 24" in " ".join(text.split())
    assert "score 1.30 · vader 0.230 · KL 5.50 nats · 24" in " ".join(text.split())
    # Third and fourth prompt are neither best nor worst.
    assert "Two hours in a theatre" not in text


def test_best_and_worst_never_share_a_pair(make_run: Any) -> None:
    pairs = read_run(make_run(steps=4)).pairs()
    best, worst = best_and_worst(pairs, 4)
    assert (best, worst) == (pairs[:4], pairs[4:])
    assert best_and_worst(pairs, 0) == ([], [])
    assert best_and_worst(pairs[:1], 3) == (pairs[:1], [])


def test_markup_and_control_characters_of_a_response_are_inert(make_run: Any) -> None:
    folder = make_run(steps=4)
    rewrite_last_response(folder, "[bold red]loud[/] \x1b[2Jgone")
    text = printed(print_samples, folder, count=1)
    assert "[bold red]loud[/] \ufffd[2Jgone" in text
    assert "\x1b" not in text


def test_visible_text_keeps_lines_and_other_scripts() -> None:
    assert visible_text("a\tb\n日本語 🙂\u200d") == "a\tb\n日本語 🙂\u200d"
    assert visible_text("\x00\x07\ud800") == "\ufffd\ufffd\ufffd"


def test_samples_of_one_step_have_nothing_to_compare(make_run: Any) -> None:
    assert "No samples from two steps" in printed(print_samples, make_run(steps=4, evaluated=False))


def test_summary_shows_start_end_and_change(make_run: Any) -> None:
    lines = [line.split() for line in printed(print_summary, make_run()).splitlines()]
    assert ["│", "score", "│", "-0.420", "│", "1.29", "│", "+1.71", "│", "reward", "│"] in lines
    assert ["│", "vader", "│", "0.040", "│", "0.410", "│", "+0.370", "│", "│"] in lines
