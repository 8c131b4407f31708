"""SIGTERM: a run stops at the next token or micro-batch, and goes on as if it had never been stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ppo_fast.ppo import PPOConfig
from ppo_fast.ppo.config import CheckpointConfig, EvaluationConfig, OptimizerConfig
from ppo_fast.ppo.interruption import EndGeneration, Interrupted, StopSignal
from ppo_fast.ppo.rollout import generate
from ppo_fast.ppo.run import train


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Have a real SIGTERM come just before the n-th place from now where a run asks whether to stop."""
    check, token = StopSignal.check, EndGeneration.__call__
    left = 0

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def counting_check(self: StopSignal) -> None:
        count()
        check(self)

    def counting_token(self: EndGeneration, *args: Any, **kwargs: Any) -> Any:
        count()
        return token(self, *args, **kwargs)

    monkeypatch.setattr(StopSignal, "check", counting_check)
    monkeypatch.setattr(EndGeneration, "__call__", counting_token)

    def arm(places: int) -> None:
        nonlocal left
        left = places

    return arm


def changing(**options: Any) -> dict[str, Any]:
    """Settings under which every part of the state moves: schedule, adaptive KL, evaluations, shuffled minibatches."""
    return {
        "steps": 3,
        "resume": "auto",
        "objective": {"kl_target": 0.5, "kl_horizon": 50},
        "optimizer": OptimizerConfig(1e-3, 1e-3, schedule="linear"),
        "evaluation": EvaluationConfig(every=1, max_prompts=4),
        **options,
    }


def test_stopped_again_and_again_a_run_is_the_same_as_never_stopped(
    settings: Callable[..., PPOConfig],
    tmp_path: Path,
    stop_at: Callable[[int], None],
    same_runs: Any,
    capsys: Any,
) -> None:
    """Stops are five, eight, ... places apart, so that they fall into every phase of a step."""
    whole = train(settings(output_dir=str(tmp_path / "whole"), **changing()))
    capsys.readouterr()
    cut, stops, told = settings(output_dir=str(tmp_path / "cut"), **changing()), 0, ""
    for places in [5, 8, 14, 21, 9, 12, 18, 25, 11, 16]:
        stop_at(places)
        folder = train(cut)
        if (folder / "finished.json").is_file():
            break
        stops += 1
        told += capsys.readouterr().out
    stop_at(0)
    same_runs(train(cut), whole)
    assert stops >= 5
    assert "SIGTERM: stopped after step 0" in told
    assert "resuming in step " in told
    assert " of its updates" in told


def test_a_step_stopped_at_any_place_and_taken_up_again_is_the_same(
    world: Any, stop_at: Callable[[int], None]
) -> None:
    """Every token, every micro-batch of scoring and of the updates in turn."""
    whole = world.trainer()
    expected = whole.step()
    weights = whole.actor.model.state_dict()
    for place in range(1, 100):
        trainer = world.trainer()
        with trainer.stop.listening():
            stop_at(place)
            try:
                trainer.step()
            except Interrupted:
                trainer.stop.requested = False
            else:
                break
            found = trainer.step()
        assert {k: v for k, v in found.items() if k[0] != "t"} == {
            k: v for k, v in expected.items() if k[0] != "t"
        }
        assert all(
            torch.equal(weights[key], value) for key, value in trainer.actor.model.state_dict().items()
        )
        assert trainer.sampler.drawn == whole.sampler.drawn
    assert place > 15


def test_the_signal_is_heard_only_while_a_run_listens(
    settings: Callable[..., PPOConfig], stop_at: Callable[[int], None]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop_at(4)
    folder = train(settings(**changing()))
    assert (folder / "checkpoints" / "latest").is_file()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (folder / "finished.json").exists()


def test_generation_ends_at_the_next_token(world: Any) -> None:
    """A model that would go on for forty tokens is stopped after three."""
    actor, tokens = world.actor(), 0
    actor.generation_config.eos_token_id = None

    class Stopping(StopSignal):
        def __getattribute__(self, name: str) -> Any:
            nonlocal tokens
            if name == "requested":
                tokens += 1
                return tokens >= 3
            return super().__getattribute__(name)

    config = world.config().rollout
    config.max_new_tokens = 40
    with pytest.raises(Interrupted):
        generate(actor, world.tokenizer, world.prompts, config, stop=Stopping())
    assert tokens <= 5


def test_the_gradients_of_a_stopped_micro_batch_are_dropped(world: Any) -> None:
    trainer = world.trainer()
    scored = trainer.score(trainer.sample(world.prompts))
    experience = trainer.experience(scored)
    value_loss = trainer.updater.value_loss

    def then_stop(*args: Any) -> Any:
        trainer.stop.requested = True
        return value_loss(*args)

    trainer.updater.value_loss = then_stop
    before = {key: value.clone() for key, value in trainer.actor.model.state_dict().items()}
    with pytest.raises(Interrupted):
        trainer.updater.minibatch(scored, experience, slice(0, 8))
    assert all(torch.equal(before[key], value) for key, value in trainer.actor.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.actor.model.parameters())


def test_a_checkpoint_within_a_step_keeps_it_whole(world: Any) -> None:
    """Everything of a step that has begun comes back bit for bit, a truncated sampler's token sets included."""
    config = world.config()
    config.rollout.top_k = 5
    trainer = world.trainer(config)
    trainer.progress = progress = trainer._begin()
    for rows in progress.plan[:3]:
        progress.updates.append(trainer.updater.minibatch(progress.scored, progress.experience, rows))
    again = type(progress).of(progress.state(), torch.device("cpu"))
    assert again.scored.rollout.responses == progress.scored.rollout.responses
    for ours, theirs in [
        (again.scored.kept_tokens, progress.scored.kept_tokens),
        (again.scored.rollout.response_ids, progress.scored.rollout.response_ids),
        *zip(again.experience, progress.experience, strict=True),
    ]:
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert [type(rows) for rows in again.plan] == [type(rows) for rows in progress.plan]
    assert len(again.remaining) == 1
    assert torch.equal(torch.as_tensor(again.remaining[0]), torch.as_tensor(progress.remaining[0]))
    assert again.updates[2].means == progress.updates[2].means


def test_a_process_stopped_by_the_system_saves_and_exits_0(
    settings: Callable[..., PPOConfig], tmp_path: Path
) -> None:
    """The command itself, in a process of its own (some ten seconds, most of them imports)."""
    config = settings(steps=100_000, checkpoint=CheckpointConfig(every=0))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    code = "import sys; from ppo_fast.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "--config", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "SIGTERM: stopped" in told
    assert "Traceback" not in errors
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text().strip()
    assert (tmp_path / "run" / "checkpoints" / latest / "manifest.json").is_file()
