"""Signs in a run's metrics that its reader should know before believing the curves, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from ppo_fast.report.glossary import is_judge
from ppo_fast.report.run_folder import Metrics
from ppo_fast.report.summary import end_window, format_number

NEGATIVE_KL = -1.0
"""Nats per sequence. A batch of n estimates a KL of d with deviation sqrt(2 d / n), which at four deviations
reaches -8/n at the lowest: chance alone stays above -1 from n = 8 on."""
KL_PER_TOKEN = 1.0
"""Nats per token, as a mean over the response: the policy gives its own tokens e times the reference's
probability.
"""
KL_JUMP = 10.0
"""Both a factor over the run's median and a floor in nats per sequence."""
CLIP_FRACTION = 0.5
ENTROPY_LEFT = 0.2
"""Share of the starting entropy."""
FEW_STEPS = 5
"""Below this a run has no end to speak of: judgements on trends stay silent."""


def warnings_for(metrics: Sequence[Metrics]) -> list[str]:
    """Every warning that the metrics of a run give cause for, each one or two sentences; empty when all is
    well.

    `metrics` are the objects of metrics.jsonl, training steps and evaluations (told apart by their keys)
    sorted by step. "The end" is the mean over up to five last steps. Missing metrics give no warning.
    """
    training = [entry for entry in metrics if not _is_evaluation(entry)]
    evaluations = [entry for entry in metrics if _is_evaluation(entry)]
    return [
        *_not_finite(metrics),
        *_left_out(training),
        *_negative_kl(metrics),
        *_large_kl(training),
        *_clipping(training),
        *_critic(training),
        *_entropy(training),
        *_length_limit(training),
        *_judges(evaluations),
    ]


def _is_evaluation(entry: Metrics) -> bool:
    return any(key.startswith("eval/") for key in entry)


def _finite(entries: Sequence[Metrics], metric: str) -> list[float]:
    return [entry[metric] for entry in entries if metric in entry and math.isfinite(entry[metric])]


def _end(values: Sequence[float]) -> float:
    return fmean(values[-end_window(len(values)) :])


def _not_finite(metrics: Sequence[Metrics]) -> Iterator[str]:
    bad = [
        (entry["step"], key) for entry in metrics for key, value in entry.items() if not math.isfinite(value)
    ]
    if bad:
        first = min(step for step, _ in bad)
        names = ", ".join(sorted({key for _, key in bad}))
        yield f"NaN or infinite values from step {first:.0f} on in {names}. Trust nothing after that step."


def _left_out(training: Sequence[Metrics]) -> Iterator[str]:
    skipped, dropped = (
        sum(_finite(training, metric)) for metric in ("optim/skipped_updates", "objective/dropped")
    )
    if skipped:
        yield (
            f"{skipped:.0f} updates were skipped because a loss or gradient was not finite. Lower the learning "
            "rate, or look for the batches that cause it."
        )
    if dropped:
        yield f"{dropped:.0f} responses were left out because their reward failed: see the warnings of the run."


def _negative_kl(metrics: Sequence[Metrics]) -> Iterator[str]:
    found = [
        (entry[key], entry["step"])
        for entry in metrics
        for key in ("objective/kl", "eval/kl")
        if math.isfinite(entry.get(key, math.nan))
    ]
    lowest, step = min(found, default=(0.0, 0.0))
    if lowest < NEGATIVE_KL:
        yield (
            f"KL is strongly negative: {format_number(lowest)} nats per sequence at step {step:.0f}. A true "
            "KL is never negative: the distribution that sampled is not the one that was scored (forced or "
            "suppressed tokens, filters, another temperature, dropout). The reward of such a run is not "
            "meaningful."
        )


def _large_kl(training: Sequence[Metrics]) -> Iterator[str]:
    kl, lengths = _finite(training, "objective/kl"), _finite(training, "response/length_mean")
    if not kl:
        return
    end, typical = _end(kl), median(kl)
    if lengths and end > KL_PER_TOKEN * _end(lengths):
        yield (
            f"KL is exploding: {format_number(end)} nats per sequence at the end, more than "
            f"{KL_PER_TOKEN:g} nat per token. The policy has left the reference far behind: read the "
            "samples, then raise the KL coefficient or lower the learning rate."
        )
    elif len(kl) >= FEW_STEPS and end > KL_JUMP and end > KL_JUMP * typical:
        yield (
            f"KL is exploding: {format_number(end)} nats per sequence at the end against a median of "
            f"{format_number(typical)}. Lower the learning rate or raise the KL coefficient."
        )


def _clipping(training: Sequence[Metrics]) -> Iterator[str]:
    fractions = _finite(training, "policy/clip_fraction")
    above = [fraction for fraction in fractions if fraction > CLIP_FRACTION]
    if above and len(above) * 10 >= len(fractions):
        yield (
            f"More than half of the tokens were clipped in {len(above)} of {len(fractions)} steps (up to "
            f"{max(above):.0%}): updates are too large for the clip range. Lower the learning rate or the "
            "epochs."
        )


def _critic(training: Sequence[Metrics]) -> Iterator[str]:
    explained = _finite(training, "value/explained_variance")
    if len(explained) >= FEW_STEPS and _end(explained) < 0:
        yield (
            f"The critic explains nothing: explained variance is {format_number(_end(explained))} at the "
            "end, worse than a constant. Advantages are noisier than need be: train the critic faster or "
            "warm it up."
        )


def _entropy(training: Sequence[Metrics]) -> Iterator[str]:
    entropy = _finite(training, "objective/entropy")
    if len(entropy) < FEW_STEPS:
        return
    start, end = fmean(entropy[: end_window(len(entropy))]), _end(entropy)
    if end < ENTROPY_LEFT * start:
        yield (
            f"Entropy collapsed from {format_number(start)} to {format_number(end)} nats per token: the "
            "policy says nearly the same thing every time. Add an entropy bonus, raise the KL coefficient "
            "or stop earlier."
        )


def _length_limit(training: Sequence[Metrics]) -> Iterator[str]:
    keys = ("response/eos_fraction", "response/length_mean", "response/length_max")
    complete = [entry for entry in training if all(key in entry for key in keys)]
    end = complete[-end_window(len(complete)) :]
    if end and all(entry[keys[0]] == 0 and math.isclose(entry[keys[1]], entry[keys[2]]) for entry in end):
        yield (
            f"Every response runs into the length limit ({end[-1][keys[2]]:.0f} tokens) and none ends by "
            "itself. With a limit meant to be short that is expected; otherwise the policy does not know "
            "how to stop."
        )


def _judges(evaluations: Sequence[Metrics]) -> Iterator[str]:
    scores = _finite(evaluations, "eval/score")
    if len(scores) < 2 or scores[-1] <= scores[0]:
        return
    for judge in dict.fromkeys(key for entry in evaluations for key in entry if is_judge(key)):
        values = _finite(evaluations, judge)
        # A judge measured on a handful of prompts wobbles: less than this is no news.
        margin = 0.05 * max(1.0, abs(values[0])) if values else math.inf
        if len(values) >= 2 and values[-1] < values[0] - margin:
            yield (
                f"The score rose from {format_number(scores[0])} to {format_number(scores[-1])} while the "
                f"outside judge {judge.removeprefix('eval/')} fell from {format_number(values[0])} to "
                f"{format_number(values[-1])}: the policy may be exploiting the reward. Read the samples."
            )
