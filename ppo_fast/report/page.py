"""The report: one self-contained HTML page that tells a run from its folder."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import fmean

import yaml

from ppo_fast.report.curves import curves_of, draw_curves
from ppo_fast.report.environment import describe_environment
from ppo_fast.report.glossary import GLOSSARY
from ppo_fast.report.health import warnings_for
from ppo_fast.report.page_style import CSS
from ppo_fast.report.run_folder import RunRecord, Sample, SamplePair, read_run
from ppo_fast.report.summary import RunSummary, SummaryRow, format_duration, format_number, summarise
from ppo_fast.report.tables import best_and_worst, facts, visible_text

SAMPLES_SHOWN = 4
"""Pairs shown open at either end of the ranking; the rest fold away."""
TIMED = {
    "time/rollout": ("rollout", "#2a6fb0"),
    "time/scoring": ("scoring", "#3c8a4e"),
    "time/experience": ("experience", "#7d5ba6"),
    "time/update": ("update", "#c8641b"),
}
OTHER_COLOUR = "#8a8f98"


def write_report(run: RunRecord | str | Path) -> Path:
    """Draw the curves of a run and write `report.html` beside them; both replace what an earlier call
    wrote.

    The page needs nothing else: images are inlined, there are no scripts, fonts or style sheets to fetch.
    Whatever comes from a model, a user or a file is escaped. Returns the page's path; raises as `read_run`
    does.
    """
    record = read_run(run)
    images = draw_curves(record)
    page = record.path / "report.html"
    # A page that is there is whole: it takes its name only when it is written.
    unfinished = record.path / "report.html.part"
    unfinished.write_text(render_page(record, images), encoding="utf-8")
    return unfinished.replace(page)


def render_page(run: RunRecord, images: Sequence[Path]) -> str:
    """The page as a string; `images` are the PNG files of `draw_curves`, in its order."""
    summary = summarise(run)
    name = _text(run.path.resolve().name)
    sections = [
        _header(name, summary),
        _warnings(warnings_for(run.metrics)),
        f'<h2>Start to end</h2><p class="soft">Measured on {summary.source}.</p>',
        f'<div class="tiles">{"".join(_tile(row) for row in summary.rows)}</div>',
        _curves(run, images),
        _samples(run.pairs()),
        _timing(run),
        _config(run),
        _environment(run),
        _glossary(),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name} · PPO run</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(visible_text(str(value)))


def _header(name: str, summary: RunSummary) -> str:
    parts = [summary.length]
    if summary.episodes:
        parts.append(f"{summary.episodes} responses")
    if summary.seconds:
        parts.append(format_duration(summary.seconds))
    return f'<h1>{name}</h1><p class="soft">{" · ".join(parts)}</p>'


def _warnings(found: Sequence[str]) -> str:
    if not found:
        return '<p class="soft">Nothing in the metrics of this run looks wrong.</p>'
    return f'<ul class="warnings">{"".join(f"<li>{_text(warning)}</li>" for warning in found)}</ul>'


def _tile(row: SummaryRow) -> str:
    return (
        f'<div class="tile"><div class="label">{_text(row.label)}</div>'
        f'<div class="value"><span class="from">{format_number(row.start)} →</span> '
        f"{format_number(row.end)}</div>"
        f'<div class="label">{format_number(row.change, signed=True)} {_text(row.unit)}</div></div>'
    )


def _curves(run: RunRecord, images: Sequence[Path]) -> str:
    figures = [
        f'<figure><img alt="{_text(curve.title)} over PPO steps" '
        f'src="data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"></figure>'
        for curve, image in zip(curves_of(run), images, strict=True)
    ]
    return f'<h2>Curves</h2><div class="curves">{"".join(figures)}</div>'


def _samples(pairs: Sequence[SamplePair]) -> str:
    if not pairs:
        return '<h2>Samples</h2><p class="soft">No held-out samples from two steps to compare.</p>'
    best, worst = best_and_worst(pairs, SAMPLES_SHOWN)
    rest = pairs[len(best) : len(pairs) - len(worst)]
    steps = f"step {pairs[0].before.step} against step {pairs[0].after.step}"
    parts = [f'<h2>Samples</h2><p class="soft">The same held-out prompts, {steps}.</p>']
    parts.append(f"<h3>Largest gain in score</h3>{''.join(map(_pair, best))}")
    if worst:
        parts.append(f"<h3>Smallest gain in score</h3>{''.join(map(_pair, worst))}")
    if rest:
        parts.append(f"<details><summary>{len(rest)} more</summary>{''.join(map(_pair, rest))}</details>")
    return "".join(parts)


def _pair(pair: SamplePair) -> str:
    return (
        f'<div class="sample"><p class="prompt" dir="auto">{_text(pair.before.prompt)}</p>'
        f'<div class="answers">{_answer(pair.before, "before")}{_answer(pair.after, "after")}</div></div>'
    )


def _answer(sample: Sample, when: str) -> str:
    return (
        f'<div class="answer {when}"><div class="when">{when}</div><p dir="auto">{_text(sample.response)}</p>'
        f'<div class="soft">{_text(facts(sample))}</div></div>'
    )


def _timing(run: RunRecord) -> str:
    whole = sum(step.get("time/step", 0.0) for step in run.training)
    if whole <= 0:
        return ""
    spent = [(*TIMED[key], sum(step.get(key, 0.0) for step in run.training)) for key in TIMED]
    rest = whole - sum(seconds for _, _, seconds in spent)
    if rest > 0.001 * whole:
        spent.append(("other", OTHER_COLOUR, rest))
    bar = "".join(
        f'<span style="width:{100 * seconds / whole:.2f}%;background:{colour}" title="{label}"></span>'
        for label, colour, seconds in spent
    )
    rows = "".join(
        f'<tr><td><span class="swatch" style="background:{colour}"></span>{label}</td>'
        f'<td class="number">{100 * seconds / whole:.1f} %</td>'
        f'<td class="number">{format_duration(seconds / len(run.training))}</td></tr>'
        for label, colour, seconds in spent
    )
    speeds = [
        step["throughput/tokens_per_second"]
        for step in run.training
        if "throughput/tokens_per_second" in step
    ]
    speed = (
        f'<p class="soft">{format_number(fmean(speeds))} response tokens per second on average.</p>'
        if speeds
        else ""
    )
    return (
        f'<h2>Time</h2><div class="bar">{bar}</div><div class="scroll"><table><tr><th>part</th><th>share</th>'
        f"<th>per step</th></tr>{rows}</table></div>{speed}"
    )


def _config(run: RunRecord) -> str:
    if not run.config:
        return ""
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100)
    return f'<h2>Configuration</h2><div class="box"><pre>{_text(text)}</pre></div>'


def _environment(run: RunRecord) -> str:
    entries = run.environment or describe_environment()
    note = "" if run.environment else '<p class="soft">Of the machine that wrote this report.</p>'
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in entries.items()
    )
    return f'<h2>Environment</h2>{note}<div class="scroll"><table>{rows}</table></div>'


def _glossary() -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(metric.unit)}</td><td>{_code(metric.meaning)}</td></tr>"
        for name, metric in GLOSSARY.items()
    )
    return (
        "<h2>Glossary</h2><details><summary>What every logged metric means</summary>"
        '<div class="scroll"><table><tr><th>metric</th><th>unit</th><th>meaning</th></tr>'
        f"{rows}</table></div></details>"
    )


def _code(markdown: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(markdown))
