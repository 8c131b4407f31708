"""A plausible run folder, made of formulas: no model, no randomness that differs between machines."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIG = {
    "output_dir": "runs/reviews",
    "steps": 40,
    "models": {"actor": "/home/somebody/models/smollm2", "critic": "auto"},
    "rewards": [{"model": "/home/somebody/models/reward-model", "function": None, "weight": 1.0}],
    "objective": {"kl_coef": 0.05, "kl_target": None, "epochs": 2},
    "evaluation": {"judges": {"vader": "ppo_fast.demo.judges:vader"}},
}
PROMPTS = [
    "The film opens on a quiet street, and",
    "I had no hopes for this sequel because",
    "Two hours in a theatre with",
    "What the director understands is that",
    "My sister warned me that",
    "Nobody who has read the book",
]
BEFORE = "it was the kind of film that you could leave after ten minutes and miss nothing at all."
AFTER = "it was a wonderful, warm and funny story, with a cast that I would love to see again soon."


def training_step(step: int, steps: int = 40) -> dict[str, Any]:
    """Metrics of one step: the score climbs from -0.4 to 1.3, KL from 0 to 6 nats, entropy falls by a
    third.
    """
    done = step / steps
    noise = random.Random(step).gauss
    rise = 1 - math.exp(-3 * done)
    kl = 6 * rise + noise(0, 0.25) * done
    score = -0.4 + 1.8 * rise + noise(0, 0.12)
    times = {"rollout": 3.6, "scoring": 1.3, "experience": 0.02, "update": 6.1, "step": 11.3}
    return {
        "step": step,
        "episode": 16 * step,
        "objective/scores": score,
        "objective/kl": kl,
        "objective/kl_coef": 0.05,
        "objective/rlhf_reward": score - 0.05 * kl,
        "objective/non_score_reward": -0.05 * kl,
        "objective/entropy": 3.1 - 0.9 * rise + noise(0, 0.05),
        "loss/policy": -0.02 + noise(0, 0.015),
        "loss/value": 0.7 * math.exp(-2 * done) + abs(noise(0, 0.05)),
        "policy/entropy": 3.05 - 0.9 * rise,
        "policy/approx_kl": 0.004 + abs(noise(0, 0.001)),
        "policy/clip_fraction": 0.08 + 0.04 * done + abs(noise(0, 0.01)),
        "policy/ratio_mean": 1.0 + noise(0, 0.002),
        "policy/ratio_max": 2.1 + abs(noise(0, 0.3)),
        "value/clip_fraction": 0.2 * math.exp(-4 * done) + abs(noise(0, 0.01)),
        "value/explained_variance": 0.55 * rise + noise(0, 0.04),
        "value/mean": score - 0.1,
        "returns/mean": score,
        "advantages/mean": 0.1,
        "advantages/std": 0.6,
        "response/length_mean": 22.4 + noise(0, 0.4),
        "response/length_max": 24,
        "response/eos_fraction": 0.25 + noise(0, 0.05),
        "optim/skipped_updates": 0.0,
        "optim/micro_batch_size": 8.0,
        "objective/dropped": 0.0,
        "optim/actor_lr": 1e-5 * (1 - done),
        "optim/critic_lr": 1e-5 * (1 - done),
        "optim/actor_grad_norm": 1.4 + noise(0, 0.2),
        "optim/critic_grad_norm": 5.0 + noise(0, 0.6),
        "throughput/tokens_per_second": 33.0,
    } | {f"time/{part}": seconds for part, seconds in times.items()}


def evaluation(step: int, steps: int = 40) -> dict[str, Any]:
    """Metrics of one evaluation: score -0.42 to 1.29, VADER 0.04 to 0.41 at the last step."""
    rise = (1 - math.exp(-3 * step / steps)) / (1 - math.exp(-3))
    return {
        "event": "eval",
        "step": step,
        "eval/score": -0.42 + 1.71 * rise,
        "eval/score_std": 0.9,
        "eval/kl": 5.8 * rise,
        "eval/length_mean": 22.0,
        "eval/eos_fraction": 0.25,
        "eval/vader": 0.04 + 0.37 * rise,
    }


def sample(step: int, prompt: str, response: str, score: float) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": prompt,
        "response": response,
        "score": score,
        "judges": {"vader": 0.1 + score / 10},
        "kl": 0.0 if step == 0 else 5.5,
        "length": 24,
        "eos": score > 1,
    }


def write_lines(file: Path, entries: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(steps=40, evaluated=True, change=None)` writes a folder; `change` maps each metrics line to
    another.
    """
    return lambda **options: write_run(tmp_path / "reviews", **options)


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    evaluated: bool = True,
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [training_step(step, steps) for step in range(1, steps + 1)]
    if evaluated:
        lines += [
            evaluation(step, steps) for step in sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps})
        ]
    lines.sort(key=lambda line: (line["step"], "event" in line))
    write_lines(folder / "metrics.jsonl", [change(line) for line in lines] if change else lines)
    if evaluated:
        before = [sample(0, prompt, BEFORE, -0.4 - 0.01 * i) for i, prompt in enumerate(PROMPTS)]
        after = [sample(steps, prompt, AFTER, 1.3 - 0.1 * i) for i, prompt in enumerate(PROMPTS)]
        write_lines(folder / "samples.jsonl", before + after)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    return folder
