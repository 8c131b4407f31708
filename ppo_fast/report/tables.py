"""Tables for the terminal: samples before and after side by side, and start against end in numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from unicodedata import category

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ppo_fast.report.run_folder import RunRecord, Sample, SamplePair, read_run
from ppo_fast.report.summary import RunSummary, format_number, summarise


def visible_text(text: str) -> str:
    """`text` with control characters and lone surrogates as U+FFFD; newline and tab stay.

    A language model may emit any code point: an escape sequence must not drive the terminal, and a lone
    surrogate cannot be encoded.
    """
    return "".join(c if c in "\n\t" or category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def best_and_worst(pairs: Sequence[SamplePair], count: int) -> tuple[list[SamplePair], list[SamplePair]]:
    """The `count` first and the `count` last of `pairs`, which are sorted by gain; no pair is in both."""
    best = list(pairs[:count])
    return best, list(pairs[len(best) :][-count:]) if count else []


def sample_table(pairs: Sequence[SamplePair], title: str) -> Table:
    """Prompt, first answer and last answer of each pair, with scores, KL and length under each answer."""
    table = Table(title=title, title_justify="left", show_lines=True, expand=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("before", ratio=3, overflow="fold")
    table.add_column("after", ratio=3, overflow="fold")
    for pair in pairs:
        table.add_row(Text(visible_text(pair.before.prompt)), _answer(pair.before), _answer(pair.after))
    return table


def _answer(sample: Sample) -> Text:
    # Text, not a string: brackets in a response are not rich markup.
    return Text(visible_text(sample.response)).append(f"\n{facts(sample)}", style="dim")


def facts(sample: Sample) -> str:
    """One line on a sample: score, judges, KL, length and whether it ended by itself."""
    parts = [f"score {format_number(sample.score)}"]
    parts += [f"{visible_text(name)} {format_number(value)}" for name, value in sample.judges.items()]
    if not math.isnan(sample.kl):
        parts.append(f"KL {format_number(sample.kl)} nats")
    parts.append(f"{sample.length} tokens" if sample.eos else f"{sample.length} tokens, cut off")
    return " · ".join(parts)


def summary_table(summary: RunSummary) -> Table:
    """Metric, unit, start, end and change of a run."""
    table = Table(title=f"Start to end, {summary.source}", title_justify="left")
    table.add_column("metric")
    for column in ("start", "end", "change"):
        table.add_column(column, justify="right")
    table.add_column("unit", style="dim")
    for row in summary.rows:
        change = format_number(row.change, signed=True)
        table.add_row(Text(row.label), format_number(row.start), format_number(row.end), change, row.unit)
    return table


def print_samples(run: RunRecord | str | Path, *, count: int = 3, console: Console | None = None) -> None:
    """Print the `count` samples that gained most and the `count` that gained least between first and last
    step.
    """
    console = console or Console()
    pairs = read_run(run).pairs()
    if not pairs:
        console.print("No samples from two steps to compare.")
        return
    best, worst = best_and_worst(pairs, count)
    console.print(sample_table(best, f"Largest gain ({len(best)} of {len(pairs)} held-out prompts)"))
    if worst:
        console.print(sample_table(worst, f"Smallest gain ({len(worst)} of {len(pairs)})"))


def print_summary(run: RunRecord | str | Path, *, console: Console | None = None) -> None:
    """Print where score, judges, KL and length started and ended."""
    (console or Console()).print(summary_table(summarise(read_run(run))))
