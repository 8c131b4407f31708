"""The PNG files of a run: all six, of the promised size, whatever the run lacks."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_fast.report import draw_curves, read_run
from ppo_fast.report.curves import curves_of, moving_mean, smoothing_window
from ppo_fast.report.glossary import GLOSSARY, is_judge

FILES = ["reward.png", "kl.png", "losses.png", "clip_fraction.png", "entropy.png", "lengths.png"]


def png_size(file: Path) -> tuple[int, int]:
    """Width and height from the header: signature (8 bytes), length and IHDR (8), two big-endian integers."""
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def colours(file: Path) -> set[tuple[int, ...]]:
    from matplotlib.image import imread

    pixels = (imread(file)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return set(map(tuple, pixels.tolist()))


def test_six_files_of_the_promised_size(make_run: Any) -> None:
    folder = make_run()
    paths = draw_curves(folder)
    assert [path.name for path in paths] == FILES
    assert {path.parent for path in paths} == {folder}
    assert {png_size(path) for path in paths} == {(1280, 800)}
    # Training blue, evaluation orange and the judge's purple are on the paper.
    assert {(0x2A, 0x6F, 0xB0), (0xC8, 0x64, 0x1B), (0x7D, 0x5B, 0xA6)} <= colours(paths[0])


def test_a_second_judge_gets_axes_of_its_own(make_run: Any) -> None:
    folder = make_run(
        steps=4, change=lambda line: line | ({"eval/length_judge": 1.0} if "event" in line else {})
    )
    # One panel more: 1.4 inches of 200 pixels.
    assert png_size(draw_curves(folder)[0]) == (1280, 800 + 280)


def test_one_step_without_evaluation_is_drawn_as_points(make_run: Any) -> None:
    paths = draw_curves(make_run(steps=1, evaluated=False))
    assert [path.name for path in paths] == FILES
    assert (0x2A, 0x6F, 0xB0) in colours(paths[1])


def test_missing_and_non_finite_values_are_tolerated(make_run: Any) -> None:
    def change(line: dict[str, Any]) -> dict[str, Any]:
        line = {key: value for key, value in line.items() if key != "objective/entropy"}
        return line | {"loss/policy": math.nan, "loss/value": math.inf if line["step"] == 2 else 0.5}

    paths = draw_curves(make_run(steps=4, change=change))
    assert {png_size(path) for path in paths} == {(1280, 800)}
    # "not recorded" in grey stands where the entropy would be in blue.
    assert (0x2A, 0x6F, 0xB0) not in colours(paths[4])
    assert (0x8A, 0x8F, 0x98) in colours(paths[4])


def test_every_metric_of_a_curve_is_in_the_glossary(make_run: Any) -> None:
    drawn = {
        line.metric for c in curves_of(read_run(make_run())) for panel in c.panels for line in panel.lines
    }
    assert {metric for metric in drawn if metric not in GLOSSARY} == {"eval/vader"}
    assert is_judge("eval/vader")
    assert not is_judge("eval/score")


def test_moving_mean_is_centred_narrows_at_the_edges_and_skips_nan() -> None:
    # (1+2)/2, (1+2+6)/3, (2+6+7)/3, (6+7)/2
    assert moving_mean([1.0, 2.0, 6.0, 7.0], 3) == [1.5, 3.0, 5.0, 6.5]
    smoothed = moving_mean([1.0, math.nan, 6.0], 3)
    assert smoothed[0] == 1.0
    assert math.isnan(smoothed[1])
    assert smoothed[2] == 6.0
    assert moving_mean([1.0, 5.0], 1) == [1.0, 5.0]


@pytest.mark.parametrize(("points", "window"), [(1, 1), (19, 1), (20, 3), (40, 5), (100, 11)])
def test_smoothing_is_light(points: int, window: int) -> None:
    assert smoothing_window(points) == window


def test_reading_and_warning_need_no_matplotlib() -> None:
    code = "import sys, ppo_fast.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, timeout=120).returncode == 0
