"""SIGKILL at random moments: what a run leaves, and that the resumed run is the one that was never killed.

Three kills in the suite; `make kills` does ten. A server that has imported everything forks the runs, which would take
their first seconds to import it otherwise.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from ppo_fast.ppo import PPOConfig
from ppo_fast.ppo.config import CheckpointConfig, EvaluationConfig, OptimizerConfig
from ppo_fast.ppo.run import train

KILLS = int(os.environ.get("PPO_FAST_KILLS", "3"))
EVERY, STEPS = 2, 16


def start(config: PPOConfig) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ppo_fast.ppo.run"])
    process = context.Process(target=train, args=(config,))
    process.start()
    return process


def finish(config: PPOConfig) -> None:
    """Let a run come to its end."""
    process = start(config)
    process.join(300)
    assert process.exitcode == 0


def kill_at(process: ForkServerProcess, run: Path, step: int, share: float) -> None:
    """SIGKILL once `step` is on record and then about `share` of a step's time has gone by."""
    while process.is_alive() and last_step(run) < step:
        time.sleep(0.002)
    seconds = [record["time/step"] for record in records(run) if "event" not in record]
    # A step's time, and what goes with it: records, evaluations, checkpoints.
    moment = time.monotonic() + 2 * share * (seconds[-1] if seconds else 0.1)
    while process.is_alive() and time.monotonic() < moment:
        time.sleep(0.002)
    process.kill()
    process.join()


def records(run: Path) -> list[dict[str, Any]]:
    """What is in metrics.jsonl, a torn line left out."""
    metrics = run / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_bytes().split(b"\n")[:-1]] if metrics.is_file() else []


def last_step(run: Path) -> int:
    """The last training step on record."""
    return max((record["step"] for record in records(run) if "event" not in record), default=0)


def check_nothing_more_was_lost(run: Path) -> None:
    """Every checkpoint that was due before the last step on record is there."""
    due = (last_step(run) - 1) // EVERY * EVERY
    if due > 0:
        latest = (run / "checkpoints" / "latest").read_text().strip()
        assert int(latest.removeprefix("step_")[:6]) >= due, f"{latest} after step {last_step(run)}"


def test_a_run_killed_at_random_moments_is_the_same_as_never_killed(
    settings: Callable[..., PPOConfig], tmp_path: Path, same_runs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For the server that forks: models this small are slower on two threads than on one.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options: dict[str, Any] = {
        "steps": STEPS,
        "resume": "auto",
        "checkpoint": CheckpointConfig(every=EVERY, keep=2),
        "evaluation": EvaluationConfig(every=3, max_prompts=4),
        "objective": {"kl_target": 0.5, "kl_horizon": 50},
        "optimizer": OptimizerConfig(1e-3, 1e-3, schedule="linear"),
    }
    whole = settings(output_dir=str(tmp_path / "whole"), **options)
    finish(whole)
    seed = random.randrange(2**32)
    moments, places, run = random.Random(seed), [], tmp_path
    for kill in range(KILLS):
        if kill % 3 == 0:  # a run is killed three times, then left to end
            cut = settings(output_dir=str(tmp_path / f"cut{kill}"), **options)
            run = Path(cut.output_dir)
        kill_at(start(cut), run, last_step(run) + moments.randrange(5), moments.random())
        assert not (run / "finished.json").exists(), f"seed {seed}: it came to its end before kill {kill}"
        places.append(last_step(run))
        check_nothing_more_was_lost(run)
        if kill % 3 == 2 or kill == KILLS - 1:
            finish(cut)
            same_runs(run, Path(whole.output_dir))
    print(f"seed {seed}: killed after steps {places}")


def test_runs_of_two_seeds_are_not_the_same(
    settings: Callable[..., PPOConfig], tmp_path: Path, same_runs: Any
) -> None:
    """The comparison above can fail."""
    first = train(settings(output_dir=str(tmp_path / "a"), steps=1))
    second = train(settings(output_dir=str(tmp_path / "b"), steps=1, seed=1))
    with pytest.raises(AssertionError):
        same_runs(first, second)
