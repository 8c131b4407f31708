"""The run in a few numbers: where score, judges, KL and length started and where they ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from ppo_fast.report.glossary import GLOSSARY
from ppo_fast.report.run_folder import Metrics, RunRecord

HELD_OUT = {
    "eval/score": "score",
    "eval/kl": "KL to the reference",
    "eval/length_mean": "response length",
    "eval/eos_fraction": "ended by themselves",
}
TRAINING = {
    "objective/scores": "score",
    "objective/kl": "KL to the reference",
    "response/length_mean": "response length",
    "response/eos_fraction": "ended by themselves",
}


@dataclass(frozen=True)
class SummaryRow:
    """A metric's value at the start and at the end of a run."""

    metric: str
    label: str
    unit: str
    start: float
    end: float

    @property
    def change(self) -> float:
        """End minus start, in the metric's unit."""
        return self.end - self.start


@dataclass(frozen=True)
class RunSummary:
    """How long a run was and what it changed; `source` says on which prompts the rows were measured."""

    steps: int
    episodes: int
    seconds: float
    source: str
    rows: tuple[SummaryRow, ...]

    @property
    def length(self) -> str:
        """The number of steps in words, `1 PPO step` or `40 PPO steps`."""
        return f"{self.steps} PPO step{'' if self.steps == 1 else 's'}"


def summarise(run: RunRecord) -> RunSummary:
    """First against last evaluation; for a run with fewer than two, the first against the last training
    steps.

    Training batches are noisy, so their start and end are means over up to five steps at either side, at
    most a quarter of the run each. Metrics that a run did not log have no row.
    """
    held_out = len(run.evaluations) >= 2
    if held_out:
        labels = (
            {"eval/score": "score"} | {judge: judge.removeprefix("eval/") for judge in run.judges} | HELD_OUT
        )
        rows = [_row(run.evaluations, metric, label, window=1) for metric, label in labels.items()]
    else:
        window = end_window(len(run.training))
        rows = [_row(run.training, metric, label, window) for metric, label in TRAINING.items()]
    last = run.training[-1]
    return RunSummary(
        steps=int(last["step"]),
        episodes=int(last.get("episode", 0)),
        seconds=sum(step.get("time/step", 0.0) for step in run.training),
        source="held-out prompts" if held_out else "training batches",
        rows=tuple(row for row in rows if row is not None),
    )


def end_window(steps: int) -> int:
    """How many steps at either end of a run stand for its start and its end: a quarter, from 1 to 5."""
    return max(1, min(5, steps // 4))


def _row(entries: Sequence[Metrics], metric: str, label: str, window: int) -> SummaryRow | None:
    values = [entry[metric] for entry in entries if metric in entry]
    if not values:
        return None
    unit = GLOSSARY[metric].unit if metric in GLOSSARY else ""
    return SummaryRow(metric, label, unit, start=fmean(values[:window]), end=fmean(values[-window:]))


def format_number(value: float, *, signed: bool = False) -> str:
    """Three significant digits, no exponent between 1e-3 and 1e6: 0.184, 12.3, 4096; `signed` adds a plus."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value:+}"
    sign = "+" if signed else ""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:{sign}.2e}"
    decimals = 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:{sign}.{decimals}f}"


def format_duration(seconds: float) -> str:
    """Seconds in the largest fitting units: 42 s, 7 min 05 s, 2 h 03 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{format_number(seconds)} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
