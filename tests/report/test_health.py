"""Each warning fires on what it names and on nothing else; a healthy run gives none."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ppo_fast.report import read_run, warnings_for


def steps(count: int = 10, **changes: Any) -> list[dict[str, float]]:
    """Healthy training steps; a change is a value for every step or a function of the step."""
    healthy = {
        "objective/scores": 0.5,
        "objective/kl": 3.0,
        "objective/entropy": 2.0,
        "policy/clip_fraction": 0.1,
        "value/explained_variance": 0.4,
        "response/length_mean": 20.0,
        "response/length_max": 24.0,
        "response/eos_fraction": 0.5,
    }
    changes = {key.replace("__", "/"): value for key, value in changes.items()}
    return [
        {"step": step} | {key: _at(value, step) for key, value in (healthy | changes).items()}
        for step in range(1, count + 1)
    ]


def _at(value: Any, step: int) -> float:
    return value(step) if callable(value) else value


def evaluations(scores: list[float], vader: list[float]) -> list[dict[str, float]]:
    return [
        {"step": i, "eval/score": s, "eval/vader": v}
        for i, (s, v) in enumerate(zip(scores, vader, strict=True))
    ]


def test_a_healthy_run_gives_no_warning(make_run: Any) -> None:
    assert warnings_for(read_run(make_run()).metrics) == []
    assert warnings_for(steps()) == []


def test_a_run_of_one_step_with_an_untrained_critic_gives_no_warning() -> None:
    assert warnings_for(steps(1, value__explained_variance=-3.0, objective__kl=0.0)) == []


@pytest.mark.parametrize("key", ["objective__kl", "loss__policy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_named_with_their_first_step(key: str, value: float) -> None:
    metrics = steps(**{key: lambda step: value if step >= 7 else 0.1})
    [warning] = warnings_for(metrics)
    assert warning.startswith(f"NaN or infinite values from step 7 on in {key.replace('__', '/')}.")


def test_strongly_negative_kl_is_shouted_about_with_its_lowest_step() -> None:
    [warning] = warnings_for(steps(objective__kl=lambda step: -927.0 if step == 4 else 2.0))
    assert "strongly negative: -927 nats per sequence at step 4" in warning


def test_strongly_negative_kl_on_held_out_prompts_counts_too() -> None:
    [warning] = warnings_for([*steps(), {"step": 10, "eval/kl": -1.5}])
    assert "-1.50 nats per sequence at step 10" in warning


def test_slightly_negative_kl_is_noise() -> None:
    # 16 sequences, KL 0.1: deviation sqrt(2 * 0.1 / 16) = 0.11, so -0.3 is within four of them.
    assert warnings_for(steps(objective__kl=-0.3)) == []


def test_kl_above_one_nat_per_token_is_exploding() -> None:
    # Mean length 20: 19 nats per sequence pass, 21 do not.
    assert warnings_for(steps(objective__kl=19.0)) == []
    [warning] = warnings_for(steps(objective__kl=21.0))
    assert "exploding: 21.0 nats per sequence at the end, more than 1 nat per token" in warning


def test_kl_ten_times_its_median_is_exploding() -> None:
    # 20 steps: the end is the mean of the last five, (1 + 1 + 1 + 30 + 47) / 5 = 16 against a median of 1.
    late = {19: 30.0, 20: 47.0}
    [warning] = warnings_for(steps(20, objective__kl=lambda step: late.get(step, 1.0)))
    assert "16.0 nats per sequence at the end against a median of 1.00" in warning


def test_kl_that_climbs_evenly_is_not_exploding() -> None:
    assert warnings_for(steps(40, objective__kl=lambda step: 0.45 * step)) == []


def test_clipping_more_than_half_in_a_tenth_of_the_steps() -> None:
    metrics = steps(20, policy__clip_fraction=lambda step: 0.62 if step in (3, 4) else 0.2)
    [warning] = warnings_for(metrics)
    assert "in 2 of 20 steps (up to 62%)" in warning
    # One outlier in twenty is below a tenth.
    assert warnings_for(steps(20, policy__clip_fraction=lambda step: 0.62 if step == 3 else 0.2)) == []


def test_a_critic_worse_than_a_constant_at_the_end() -> None:
    [warning] = warnings_for(steps(value__explained_variance=lambda step: 0.3 if step < 9 else -0.2))
    assert "explained variance is -0.200 at the end" in warning
    # Bad at the start and good at the end is how a fresh critic learns.
    assert warnings_for(steps(value__explained_variance=lambda step: -2.0 if step < 5 else 0.3)) == []


def test_entropy_below_a_fifth_of_its_start() -> None:
    # 2.0 -> 0.39 is 19.5%, 2.0 -> 0.41 is 20.5%.
    [warning] = warnings_for(steps(objective__entropy=lambda step: 2.0 if step < 5 else 0.39))
    assert "Entropy collapsed from 2.00 to 0.390" in warning
    assert warnings_for(steps(objective__entropy=lambda step: 2.0 if step < 5 else 0.41)) == []


def test_every_response_at_the_length_limit() -> None:
    [warning] = warnings_for(steps(response__eos_fraction=0.0, response__length_mean=24.0))
    assert "length limit (24 tokens)" in warning
    # One response that ends in the last token, or one that is shorter, is enough to stay silent.
    assert warnings_for(steps(response__eos_fraction=0.01, response__length_mean=24.0)) == []
    assert warnings_for(steps(response__eos_fraction=0.0, response__length_mean=23.9)) == []


def test_score_up_while_a_judge_goes_down() -> None:
    [warning] = warnings_for([*steps(), *evaluations([0.1, 0.5, 0.9], [0.3, 0.4, 0.1])])
    assert "score rose from 0.100 to 0.900" in warning
    assert "judge vader fell from 0.300 to 0.100" in warning


@pytest.mark.parametrize(
    ("scores", "vader"),
    [
        ([0.1, 0.9], [0.3, 0.28]),  # within the judge's own noise
        ([0.9, 0.1], [0.3, 0.1]),  # both fell: that is failure, not exploitation
        ([0.1, 0.9], [0.1, 0.3]),
        ([0.1], [0.3]),
    ],
)
def test_score_and_judge_that_agree_give_no_warning(scores: list[float], vader: list[float]) -> None:
    assert warnings_for([*steps(), *evaluations(scores, vader)]) == []


def test_missing_metrics_give_no_warning() -> None:
    assert warnings_for([{"step": 1.0}]) == []
    assert warnings_for([]) == []


def test_skipped_updates_and_dropped_samples_are_told() -> None:
    (told,) = warnings_for(steps(optim__skipped_updates=lambda step: 3.0 * (step == 4)))
    assert told.startswith("3 updates were skipped")
    (told,) = warnings_for(steps(objective__dropped=0.5))
    assert told.startswith("5 responses were left out")
