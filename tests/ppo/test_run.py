"""A whole run from a config: what it leaves, how it resumes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_fast.ppo.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelsConfig,
    OptimizerConfig,
    PPOConfig,
    RewardSource,
    RolloutConfig,
)
from ppo_fast.ppo.run import build_trainer, train
from ppo_fast.report import read_run


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_run_leaves_everything_a_reader_needs(settings: Callable[..., PPOConfig]) -> None:
    folder = train(settings(tensorboard=True, checkpoint=CheckpointConfig(every=1, keep=2)))
    names = {path.name for path in folder.iterdir()}
    curves = {"reward.png", "kl.png", "losses.png", "clip_fraction.png", "entropy.png", "lengths.png"}
    files = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "finished.json",
    }
    assert files | curves | {"actor", "critic", "tensorboard", "checkpoints"} == names
    assert yaml.safe_load((folder / "config.yaml").read_text())["steps"] == 4
    steps = [record["step"] for record in records(folder) if "event" not in record]
    evaluations = [record for record in records(folder) if record.get("event") == "eval"]
    assert steps == [1, 2, 3, 4]
    assert [record["step"] for record in evaluations] == [0, 4]
    assert evaluations[0]["eval/kl"] == 0.0
    assert evaluations[0]["eval/words"] > 0
    assert len(records(folder, "samples.jsonl")) == 8
    assert list((folder / "tensorboard").glob("events*"))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    # The newest two and the name of the newest; the last step leaves the models themselves.
    assert kept == ["latest", "step_000002", "step_000003"]
    assert not list(folder.rglob("*.bin")) + list(folder.rglob("*.pt")) + list(folder.rglob("*.pkl"))
    assert len(read_run(folder).pairs()) == 4


def test_saved_models_load_and_are_the_trained_ones(settings: Callable[..., PPOConfig]) -> None:
    config = settings()
    folder = train(config)
    actor = AutoModelForCausalLM.from_pretrained(folder / "actor")
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert AutoTokenizer.from_pretrained(folder / "actor").get_vocab()
    before = AutoModelForCausalLM.from_pretrained(config.models.actor).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in actor.state_dict().items())
    assert critic.config.num_labels == 1
    card = (folder / "actor" / "README.md").read_text()
    assert "ppo-fast" in card
    assert str(folder.parent) not in card  # no machine path leaks into what is published


def test_same_seed_same_run_and_another_seed_another(
    settings: Callable[..., PPOConfig], tmp_path: Path
) -> None:
    runs = [
        train(settings(output_dir=str(tmp_path / name), seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    weights = [load_file(run / "actor" / "model.safetensors") for run in runs]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_resumed_run_equals_one_that_was_never_stopped(
    settings: Callable[..., PPOConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppo_fast.ppo.trainer import PPOTrainer

    # An adaptive KL coefficient and a falling learning rate, so that their state is part of the test.
    options: dict[str, Any] = {
        "checkpoint": CheckpointConfig(every=2, keep=1),
        "objective": {"kl_target": 0.5, "kl_horizon": 50},
        "optimizer": OptimizerConfig(1e-3, 1e-3, schedule="linear"),
        "resume": "auto",
    }
    whole = train(settings(output_dir=str(tmp_path / "whole"), **options))

    step = PPOTrainer.step

    def stopped(self: PPOTrainer) -> dict[str, float]:
        if self.steps_done == 3:
            raise KeyboardInterrupt
        return step(self)

    cut = settings(output_dir=str(tmp_path / "cut"), **options)
    monkeypatch.setattr(PPOTrainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "torn')  # what a kill in the middle of a write leaves
    resumed = train(cut)
    assert sorted(path.name for path in (resumed / "checkpoints").iterdir()) == ["latest", "step_000002"]
    for name in ("actor", "critic"):
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (resumed, whole))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert len(records(resumed)) == len(records(whole))
    for ours, theirs in zip(records(resumed), records(whole), strict=True):
        kept = {key for key in theirs if not key.startswith(("time/", "throughput/"))}
        assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}
    assert records(resumed, "samples.jsonl") == records(whole, "samples.jsonl")


def test_a_report_of_an_interrupted_run_does_not_finish_it(
    settings: Callable[..., PPOConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppo_fast.ppo.trainer import PPOTrainer
    from ppo_fast.report import write_report

    step = PPOTrainer.step

    def stopped(self: PPOTrainer) -> dict[str, float]:
        if self.steps_done == 2:
            raise KeyboardInterrupt
        return step(self)

    config = settings(resume="auto", checkpoint=CheckpointConfig(every=1))
    monkeypatch.setattr(PPOTrainer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    write_report(tmp_path / "run")
    folder = train(config)
    assert [record["step"] for record in records(folder) if "event" not in record] == [1, 2, 3, 4]
    assert (folder / "actor" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no settings"), ("a: [", "is no YAML"), ("steps: 3\n", "other settings")],
)
def test_settings_of_a_run_that_cannot_be_read(
    settings: Callable[..., PPOConfig], tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"config.yaml .*" + message):
        train(settings(resume="auto"))


def test_models_that_cannot_read_what_the_actor_samples(
    settings: Callable[..., PPOConfig], saved: Callable[..., str], world: Any, tmp_path: Path
) -> None:
    wide = saved(world.actor(vocab_size=64), "wide")
    with pytest.raises(
        ValueError, match="models.critic has embeddings for 40 tokens, expected at least the 64"
    ):
        train(settings(models=ModelsConfig(actor=wide, device="cpu")))
    narrow = saved(world.actor(vocab_size=9), "narrow")
    config = settings(models=ModelsConfig(actor=narrow, critic="actor", device="cpu"))
    with pytest.raises(ValueError, match="record 4 has token 11, but models.actor knows 9 tokens"):
        train(config)
    short = saved(world.classifier(max_position_embeddings=9), "short")
    with pytest.raises(ValueError, match="over the context of models.critic, 9 tokens"):
        train(settings(rewards=[RewardSource(model=short)]))
    assert not (tmp_path / "run").exists()


def test_a_torn_weights_file(
    settings: Callable[..., PPOConfig], saved: Callable[..., str], world: Any
) -> None:
    folder = saved(world.actor(), "torn")
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"models.actor: cannot load the folder .*torn"):
        train(settings(models=ModelsConfig(actor=folder, device="cpu")))


def test_a_finished_run_is_not_trained_again(settings: Callable[..., PPOConfig], capsys: Any) -> None:
    folder = train(settings(resume="auto"))
    before = (folder / "actor" / "model.safetensors").stat().st_mtime_ns
    train(settings(resume="auto"))
    assert "holds a finished run" in capsys.readouterr().out
    assert (folder / "actor" / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_of_other_settings_is_not_resumed(settings: Callable[..., PPOConfig]) -> None:
    train(settings(resume="auto"))
    with pytest.raises(ValueError, match=r"belongs to a run with other settings \(seed, steps\)"):
        train(settings(resume="auto", seed=5, steps=6))


def test_a_torn_checkpoint_is_refused_and_the_one_before_taken(
    settings: Callable[..., PPOConfig], tmp_path: Path, same_runs: Any
) -> None:
    options = {"checkpoint": CheckpointConfig(every=1, keep=2)}
    run = train(settings(**options))
    whole = train(settings(output_dir=str(tmp_path / "whole"), **options))
    (run / "finished.json").unlink()
    torn = run / "checkpoints" / "step_000003" / "critic_optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    before = (run / "metrics.jsonl").read_bytes()
    older = run / "checkpoints" / "step_000002"
    with pytest.raises(
        ValueError, match=rf"^{torn}: has .* torn. The one before it, .* resume={older} goes on"
    ):
        train(settings(resume="auto", **options))
    assert (run / "metrics.jsonl").read_bytes() == before
    train(settings(resume=str(older), **options))
    same_runs(run, whole)
    train(
        settings(resume=str(older.with_name("step_000003")), **options)
    )  # a finished run can be sent back, too
    same_runs(run, whole)


def test_evaluation_does_not_disturb_training(settings: Callable[..., PPOConfig], tmp_path: Path) -> None:
    evaluation = EvaluationConfig(every=1, max_prompts=3)
    often = train(settings(output_dir=str(tmp_path / "often"), evaluation=evaluation))
    seldom = train(settings(output_dir=str(tmp_path / "seldom")))
    ours, theirs = (load_file(run / "actor" / "model.safetensors") for run in (often, seldom))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("critic", ["auto", "reward", "actor", "folder"])
def test_critic_choices(
    settings: Callable[..., PPOConfig], saved: Callable[..., str], world: Any, critic: str
) -> None:
    config = settings()
    config.models.critic = saved(world.classifier(9), "critic") if critic == "folder" else critic
    trainer = build_trainer(config)
    head = trainer.critic.model.score.weight
    source = {"actor": 0 * head, "folder": world.classifier(9).score.weight}.get(
        critic, world.classifier().score.weight
    )
    assert torch.equal(head, source)


def test_critic_from_a_reward_that_is_a_function(settings: Callable[..., PPOConfig], tmp_path: Path) -> None:
    config = settings(rewards=[RewardSource(function=f"{tmp_path / 'judge.py'}:judge")])
    assert (
        float(build_trainer(config).critic.model.score.weight.abs().max()) == 0.0
    )  # auto: the actor's trunk
    config.models.critic = "reward"
    with pytest.raises(ValueError, match="models.critic is `reward`, but no reward model"):
        build_trainer(config)


def break_prompts(path: Path, content: str | None) -> str:
    if content is not None:
        path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "broken.jsonl: no such file"),
        ("", "broken.jsonl: holds no rows"),
        ('{"prompt": "the film"}\n{"prompt": ', "broken.jsonl: line 2: not JSON"),
        (
            '{"text": "the film"}\n',
            r"broken.jsonl: line 1: has keys \{text\}, expected \{prompt\} or \{messages\}",
        ),
        (
            '{"prompt": "the film"}\n{"prompt": "  "}\n',
            "broken.jsonl: record 2 has the prompt '  ', expected text",
        ),
        ('{"prompt": 5}\n', "broken.jsonl: record 1 has the prompt 5"),
        ('{"prompt": "' + "the " * 70 + '"}\n', "data.prompts: record 1 has 70 tokens"),
    ],
)
def test_prompts_that_cannot_be_used(
    settings: Callable[..., PPOConfig], tmp_path: Path, content: str | None, message: str
) -> None:
    path = break_prompts(tmp_path / "broken.jsonl", content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(settings(data=DataConfig(prompts=path)))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_empty_is_left_alone(settings: Callable[..., PPOConfig], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, expected a new folder or resume=auto"):
        train(settings())
    with pytest.raises(ValueError, match=r"holds files but no config.yaml: not a run to resume"):
        train(settings(resume="auto"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "rewards is empty"),
        ({"output_dir": ""}, "output_dir is not set"),
        ({"data": DataConfig()}, "data.prompts is not set"),
        ({"models": ModelsConfig(actor="./no/such/model", device="cpu")}, "models.actor: there is no folder"),
        ({"models": ModelsConfig(device="cpu")}, "models.actor is not set"),
        ({"rewards": [RewardSource(model="./no/reward")]}, "rewards.model: there is no folder './no/reward'"),
    ],
)
def test_settings_that_cannot_work(
    settings: Callable[..., PPOConfig], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(**changes))
    assert not (tmp_path / "run").exists()


def test_reference_of_another_vocabulary(
    settings: Callable[..., PPOConfig], saved: Callable[..., str], world: Any, tmp_path: Path
) -> None:
    config = settings()
    config.models.reference = saved(world.actor(vocab_size=48), "wide")
    with pytest.raises(
        ValueError, match="models.reference has a vocabulary of 48 tokens and models.actor one of 40"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_reward_function_that_breaks_in_the_middle_keeps_what_was_done(
    settings: Callable[..., PPOConfig], tmp_path: Path
) -> None:
    source = (
        "calls = []\ndef score(prompts, responses):\n    calls.append(1)\n"
        "    return [float('nan') if len(calls) > 3 else 1.0] * len(prompts)\n"
    )
    (tmp_path / "late.py").write_text(source)
    config = settings(rewards=[RewardSource(function=f"{tmp_path / 'late.py'}:score")])
    with pytest.raises(
        ValueError, match=r"late.py:score returned nan, expected a finite number, for sample 0"
    ):
        train(config)
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 1, 2]


def test_generation_settings_of_the_saved_actor_are_the_original_ones(
    settings: Callable[..., PPOConfig], world: Any
) -> None:
    folder = train(settings(rollout=RolloutConfig(batch_size=8, max_new_tokens=4, temperature=0.7)))
    saved_ends = json.loads((folder / "actor" / "generation_config.json").read_text())["eos_token_id"]
    assert saved_ends == world.actor().generation_config.eos_token_id
