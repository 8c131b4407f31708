"""The curves of a run as PNG files: what happened to reward, KL, losses, clipping, entropy and lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ppo_fast.report.run_folder import Metrics, RunRecord, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE = "#2a6fb0", "#c8641b", "#3c8a4e", "#7d5ba6"
GREY = "#8a8f98"
PIXELS_PER_INCH = 200
WIDTH, HEIGHT, EXTRA_HEIGHT = 6.4, 4.0, 1.4
"""Inches; the extra is for each panel beyond two. Small, so that the letters stay legible on a phone."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": "#24292f",
    "axes.edgecolor": "#c3c8cf",
    "axes.labelcolor": "#4b525b",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "xtick.color": "#4b525b",
    "ytick.color": "#4b525b",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}


@dataclass(frozen=True)
class Line:
    """One metric in a panel: a training metric every step, an `eval/` metric at its evaluations."""

    metric: str
    label: str
    colour: str


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `mark_start` draws the first line's initial value as a dashed line across."""

    ylabel: str
    lines: tuple[Line, ...]
    mark_start: bool = False
    from_zero: bool = False

    @property
    def has_legend(self) -> bool:
        """Whether there is more than one thing to tell apart."""
        return self.mark_start or len(self.lines) > 1


@dataclass(frozen=True)
class Curve:
    """One PNG file: panels stacked over a common step axis, the first `first_panel` times as high as the
    others.
    """

    file: str
    title: str
    panels: tuple[Panel, ...]
    first_panel: float = 1.0


def curves_of(run: RunRecord) -> tuple[Curve, ...]:
    """The six figures of a run, in the order of the report."""
    return (
        Curve("reward.png", "Reward", _reward_panels(run), first_panel=1.6),
        Curve(
            "kl.png",
            "KL to the reference",
            (
                Panel(
                    "nats per sequence",
                    (
                        Line("eval/kl", "held-out prompts", ORANGE),
                        Line("objective/kl", "training batches", BLUE),
                    ),
                ),
            ),
        ),
        Curve(
            "losses.png",
            "Losses",
            (
                Panel("policy loss", (Line("loss/policy", "policy", BLUE),)),
                Panel("value loss (reward²)", (Line("loss/value", "value", GREEN),), from_zero=True),
            ),
        ),
        Curve(
            "clip_fraction.png",
            "Clipped tokens",
            (
                Panel(
                    "fraction of tokens",
                    (
                        Line("policy/clip_fraction", "policy", BLUE),
                        Line("value/clip_fraction", "value", GREEN),
                    ),
                    from_zero=True,
                ),
            ),
        ),
        Curve(
            "entropy.png",
            "Policy entropy",
            (
                Panel(
                    "nats per token",
                    (Line("objective/entropy", "training batches", BLUE),),
                    mark_start=True,
                    from_zero=True,
                ),
            ),
        ),
        Curve("lengths.png", "Response lengths", _length_panels(), first_panel=1.6),
    )


def _reward_panels(run: RunRecord) -> tuple[Panel, ...]:
    score = Panel(
        "score",
        (Line("eval/score", "held-out prompts", ORANGE), Line("objective/scores", "training batches", BLUE)),
        mark_start=True,
    )
    colours = (PURPLE, GREEN, GREY)
    # A judge has a scale of its own, so it gets axes of its own.
    judges = tuple(
        Panel(
            judge.removeprefix("eval/"),
            (Line(judge, f"{judge.removeprefix('eval/')}, outside judge", colours[i % 3]),),
            mark_start=True,
        )
        for i, judge in enumerate(run.judges)
    )
    return (score, *judges)


def _length_panels() -> tuple[Panel, ...]:
    return (
        Panel(
            "tokens",
            (
                Line("response/length_mean", "mean", BLUE),
                Line("response/length_max", "longest", GREY),
                Line("eval/length_mean", "mean, held-out prompts", ORANGE),
            ),
            from_zero=True,
        ),
        Panel(
            "fraction that\nended itself",
            (
                Line("response/eos_fraction", "training batches", GREEN),
                Line("eval/eos_fraction", "held-out prompts", ORANGE),
            ),
            from_zero=True,
        ),
    )


def draw_curves(run: RunRecord | str | Path) -> list[Path]:
    """Write `reward.png`, `kl.png`, `losses.png`, `clip_fraction.png`, `entropy.png` and `lengths.png`.

    Each is 1280 x 800 pixels (reward.png higher with a second judge) and lies in the run's folder; files of
    these names are replaced. Training metrics are drawn raw and pale under a centred moving mean,
    evaluations as points. Missing metrics leave their axes empty and non-finite values leave gaps. Returns
    the paths in that order.
    """
    record = read_run(run)
    return [_draw(curve, record) for curve in curves_of(record)]


def _draw(curve: Curve, run: RunRecord) -> Path:
    # Figure without pyplot: no backend to choose, no global state in the caller's process.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    panels = len(curve.panels)
    window = smoothing_window(len(run.training))
    with rc_context(STYLE):
        height = HEIGHT + EXTRA_HEIGHT * max(0, panels - 2)
        figure = Figure(
            figsize=(WIDTH, height), dpi=PIXELS_PER_INCH, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
        )
        ratios = [curve.first_panel] + [1.0] * (panels - 1)
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for panel, ax in zip(curve.panels, axes, strict=True):
            _draw_panel(panel, ax, run, window)
        pad = 28 if curve.panels[0].has_legend else 10
        axes[0].set_title(curve.title, loc="left", fontsize=13, fontweight="bold", pad=pad)
        if window > 1:
            note = f"pale: every step, bold: mean of {window} steps"
            axes[0].set_title(note, loc="right", fontsize=9.5, color=GREY, pad=pad)
        axes[-1].set_xlabel("PPO step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.align_ylabels()
        figure.savefig(run.path / curve.file)
    return run.path / curve.file


def _draw_panel(panel: Panel, ax: Axes, run: RunRecord, window: int) -> None:
    drawn = [_draw_line(line, ax, run, window) for line in panel.lines]
    ax.set_ylabel(panel.ylabel)
    values = [value for points in drawn for _, value in points]
    if not values:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=GREY)
        return
    if panel.mark_start:
        start = next(points[0][1] for points in drawn if points)
        ax.axhline(
            start, color=GREY, linestyle=(0, (4, 3)), linewidth=1.1, label=f"start: {start:.3g}", zorder=1
        )
    if panel.from_zero:
        low, high = min(0.0, *values), max(0.0, *values)
        ax.set_ylim(1.08 * low, 1.08 * high if high > low else 1.0)
    if panel.has_legend:
        # Above the axes, so that no curve runs under it.
        ax.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=4, borderaxespad=0.2, handlelength=1.6
        )


def _draw_line(line: Line, ax: Axes, run: RunRecord, window: int) -> list[tuple[float, float]]:
    """Draw one metric and return its finite points, (step, value)."""
    held_out = line.metric.startswith("eval/")
    entries = [entry for entry in (run.evaluations if held_out else run.training) if line.metric in entry]
    steps, values = [entry["step"] for entry in entries], finite_or_nan(entries, line.metric)
    points = [(step, value) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    if not points:
        return []
    style: dict[str, Any] = {"color": line.colour, "label": line.label}
    if held_out:
        ax.plot(*zip(*points, strict=True), **style, marker="o", markersize=5, linewidth=1.6, zorder=4)
        return points
    if window > 1:
        ax.plot(steps, values, color=line.colour, linewidth=0.9, alpha=0.35, zorder=2)
    marker = "o" if len(points) <= 3 else ""
    ax.plot(steps, moving_mean(values, window), **style, marker=marker, linewidth=1.9, zorder=3)
    return points


def finite_or_nan(entries: Sequence[Metrics], metric: str) -> list[float]:
    """The metric's values with infinities as NaN, which matplotlib draws as a gap."""
    return [entry[metric] if math.isfinite(entry[metric]) else math.nan for entry in entries]


def smoothing_window(points: int) -> int:
    """Width of the moving mean: odd, about a tenth of the points, 1 (no smoothing) below 20 points."""
    return 1 if points < 20 else points // 10 // 2 * 2 + 1


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` (odd) values, fewer at the edges; NaN stays NaN and is left out of its
    neighbours.
    """
    half = window // 2
    smoothed = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - half) : index + half + 1] if not math.isnan(v)]
        smoothed.append(math.nan if math.isnan(value) else fmean(near))
    return smoothed
