"""Start and end of a run: from the evaluations, or from the first and last training steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ppo_fast.report import read_run, summarise
from ppo_fast.report.summary import end_window, format_duration, format_number


def test_evaluations_give_the_rows_score_and_judges_first(make_run: Any) -> None:
    summary = summarise(read_run(make_run(steps=40)))
    assert [row.metric for row in summary.rows][:3] == ["eval/score", "eval/vader", "eval/kl"]
    score, vader, kl = summary.rows[:3]
    assert (score.start, score.end) == pytest.approx((-0.42, 1.29))
    assert (vader.start, vader.end) == pytest.approx((0.04, 0.41))
    assert (kl.start, kl.end, kl.change) == pytest.approx((0.0, 5.8, 5.8))
    assert summary.source == "held-out prompts"
    # 40 steps of 16 responses and 11.3 s.
    assert (summary.steps, summary.episodes) == (40, 640)
    assert summary.seconds == pytest.approx(452.0)


def test_without_evaluations_the_ends_of_the_training_count(make_run: Any) -> None:
    run = read_run(
        make_run(steps=8, evaluated=False, change=lambda line: line | {"objective/kl": line["step"]})
    )
    summary = summarise(run)
    [kl] = [row for row in summary.rows if row.metric == "objective/kl"]
    # 8 steps: windows of 2, (1 + 2) / 2 and (7 + 8) / 2.
    assert (kl.start, kl.end) == (1.5, 7.5)
    assert summary.source == "training batches"


def test_a_metric_that_was_not_logged_has_no_row(make_run: Any) -> None:
    folder = make_run(steps=1, evaluated=False, change=lambda line: {"step": 1, "objective/scores": 2.0})
    [row] = summarise(read_run(folder)).rows
    assert (row.metric, row.start, row.end) == ("objective/scores", 2.0, 2.0)


def test_end_window_is_a_quarter_from_one_to_five() -> None:
    assert [end_window(steps) for steps in (1, 7, 8, 19, 20, 1000)] == [1, 1, 2, 4, 5, 5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.18449, "0.184"),
        (-1.2345, "-1.23"),
        (12.34, "12.3"),
        (4096, "4096"),
        (1e-5, "1.00e-05"),
        (2.5e7, "2.50e+07"),
        (math.nan, "NaN"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers_keep_three_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_signed_numbers_show_their_plus() -> None:
    assert format_number(1.5, signed=True) == "+1.50"
    assert format_number(-1.5, signed=True) == "-1.50"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.28, "0.280 s"), (42.4, "42 s"), (59.6, "1 min 00 s"), (425, "7 min 05 s"), (7380, "2 h 03 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
