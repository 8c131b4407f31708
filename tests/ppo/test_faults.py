"""What goes wrong in the midst of a run: memory, rewards, the disk. The run says what, or goes on as it was told to."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_fast.cli import main
from ppo_fast.ppo import PPOConfig
from ppo_fast.ppo.config import CheckpointConfig, EvaluationConfig, RewardSource
from ppo_fast.ppo.experience import PolicyView
from ppo_fast.ppo.recorder import Recorder
from ppo_fast.ppo.rewards import (
    FunctionReward,
    RewardError,
    TokenReward,
    WeightedReward,
    call_reward_function,
)
from ppo_fast.ppo.run import train
from ppo_fast.ppo.shortage import MicroBatches, OutOfMemory, is_out_of_memory


def cpu_allocator_error() -> RuntimeError:
    """The error of torch's own allocator, as it comes."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    return caught.value


@pytest.fixture(params=["cuda", "torch on the CPU", "Python"])
def shortage(request: pytest.FixtureRequest) -> Exception:
    if request.param == "cuda":
        return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    return cpu_allocator_error() if request.param == "torch on the CPU" else MemoryError()


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, shortage: Exception) -> Callable[[int], None]:
    """Have forward passes of more sequences than that run out of memory."""
    from_hidden = PolicyView._from_hidden

    def arm(most: int) -> None:
        def limited(self: PolicyView, *asked: Any) -> Any:
            hidden, *head = from_hidden(self, *asked)
            if hidden.shape[0] > most:
                raise shortage
            return hidden, *head

        monkeypatch.setattr(PolicyView, "_from_hidden", limited)

    return arm


def test_every_kind_of_shortage_is_known(shortage: Exception) -> None:
    assert is_out_of_memory(shortage)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_out_of_memory_says_which_setting_to_lower(world: Any, fits: Callable[[int], None]) -> None:
    trainer = world.trainer(world.config(objective={"micro_batch_size": 4}))
    scored = trainer.score(trainer.sample(world.prompts))
    experience = trainer.experience(scored)
    before = copy.deepcopy(trainer.actor.model.state_dict())
    fits(2)
    advice = r"of 4 sequence\(s\): lower objective.micro_batch_size \(now 4\), or allow objective.halve_on_oom=true"
    with pytest.raises(OutOfMemory, match="out of memory in a micro-batch of the update " + advice):
        trainer.updater.minibatch(scored, experience, slice(0, 8))
    with pytest.raises(OutOfMemory, match="out of memory in a micro-batch of scoring " + advice):
        trainer.score(scored.rollout)
    assert all(torch.equal(before[key], value) for key, value in trainer.actor.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:out of memory")
def test_halving_the_micro_batch_leaves_the_gradient_as_it_is(
    world: Any, fits: Callable[[int], None]
) -> None:
    """Bit for bit the update of a run that was configured with the smaller size, parts of a failed try forgotten."""
    small = world.trainer(world.config(objective={"micro_batch_size": 2}))
    large = world.trainer(world.config(objective={"micro_batch_size": 8, "halve_on_oom": True}))
    scored = small.score(small.sample(world.prompts))
    experience = small.experience(scored)
    expected = small.updater.minibatch(scored, experience, slice(0, 8))
    fits(3)
    with pytest.warns(
        UserWarning, match="out of memory in a micro-batch of the update of 8 sequences: goes on with 4"
    ):
        got = large.updater.minibatch(scored, experience, slice(0, 8))
    assert large.micro.size == 2
    assert got.means == expected.means
    theirs = small.actor.model.state_dict()
    assert all(torch.equal(theirs[key], value) for key, value in large.actor.model.state_dict().items())


def test_a_part_of_a_gradient_does_not_survive_the_shortage(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic's half of a micro-batch fails after the actor's gradient was added."""
    small = world.trainer(world.config(objective={"micro_batch_size": 4}))
    large = world.trainer(world.config(objective={"micro_batch_size": 8, "halve_on_oom": True}))
    scored = small.score(small.sample(world.prompts))
    experience = small.experience(scored)
    expected = small.updater.minibatch(scored, experience, slice(0, 8))
    value_loss = large.updater.value_loss

    def limited(scored: Any, experience: Any, rows: slice, normalizer: Any) -> Any:
        if rows.stop - rows.start > 4:
            raise cpu_allocator_error()
        return value_loss(scored, experience, rows, normalizer)

    large.updater.value_loss = limited
    with pytest.warns(UserWarning, match="goes on with 4"):
        got = large.updater.minibatch(scored, experience, slice(0, 8))
    assert got.means == expected.means


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_step_goes_on_and_tells_the_size(world: Any, fits: Callable[[int], None]) -> None:
    trainer = world.trainer(world.config(objective={"micro_batch_size": 4, "halve_on_oom": True}))
    fits(1)
    with pytest.warns(
        UserWarning, match="out of memory in a micro-batch of scoring of 4 sequences: goes on with 2"
    ):
        metrics = trainer.step()
    assert metrics["optim/micro_batch_size"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())
    fits(0)
    with pytest.raises(
        OutOfMemory, match=r"of 1 sequence\(s\): lower rollout.max_new_tokens, shorten the prompts"
    ):
        trainer.step()


def test_sampling_that_does_not_fit(world: Any, monkeypatch: pytest.MonkeyPatch, shortage: Exception) -> None:
    trainer = world.trainer()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise shortage

    monkeypatch.setattr(trainer.actor.model, "generate", fails)
    with pytest.raises(OutOfMemory, match=r"while sampling: lower rollout.generation_batch_size \(now 8\)"):
        trainer.step()


def test_other_errors_pass_through_unchanged() -> None:
    def fails(size: int) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="^shapes do not match$"):
        MicroBatches(4, may_halve=True).run("a test", fails)


def raises_for(text: str) -> Callable[[list[str], list[str]], list[float]]:
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if text in prompts:
            raise KeyError("no such word")
        return [float(len(prompt)) for prompt in prompts]

    return score


def nan_for(text: str) -> Callable[[list[str], list[str]], list[float]]:
    return lambda prompts, responses: [math.nan if prompt == text else 1.0 for prompt in prompts]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (raises_for, r"mine raised KeyError: 'no such word' for sample 4, prompt 'w3 w4 w5', response 'w"),
        (
            nan_for,
            r"mine returned nan, expected a finite number, for sample 4, prompt 'w3 w4 w5', response 'w",
        ),
    ],
)
def test_the_error_names_the_sample_or_the_sample_is_dropped(world: Any, make: Any, told: str) -> None:
    rollout = world.trainer().sample(world.prompts)
    with pytest.raises(RewardError, match="^reward function " + told):
        FunctionReward("mine", make("w3 w4 w5"))(rollout)
    with pytest.warns(UserWarning, match="^sample dropped: reward function " + told):
        scores = FunctionReward("mine", make("w3 w4 w5"), "drop")(rollout)
    assert torch.isnan(scores).tolist() == [row == 4 for row in range(8)]


def test_a_function_that_fails_for_no_sample_alone(world: Any) -> None:
    def small_batches(prompts: list[str], responses: list[str]) -> list[float]:
        if len(prompts) > 1:
            raise TimeoutError("busy")
        return [2.0]

    with pytest.raises(
        RewardError, match="raised TimeoutError: busy for a batch of 3 samples, though for none"
    ):
        call_reward_function(small_batches, "mine", ["a"] * 3, ["b"] * 3)
    assert call_reward_function(small_batches, "mine", ["a"] * 3, ["b"] * 3, on_error="drop") == [2.0] * 3


@pytest.mark.parametrize("wrong", [lambda p, r: [1.0], lambda p, r: 3.0, lambda p, r: ["x"] * 8])
def test_a_function_that_breaks_its_contract_stops_the_run_whatever_is_allowed(
    world: Any, wrong: Any
) -> None:
    with pytest.raises(RewardError, match="mine returned"):
        FunctionReward("mine", wrong, "drop")(world.trainer().sample(world.prompts))


def test_a_reward_model_that_scores_nan(world: Any) -> None:
    model = world.classifier()
    torch.nn.init.constant_(model.score.weight, math.nan)
    rollout = world.trainer().sample(world.prompts)
    with pytest.raises(RewardError, match="reward model rm gave nan, .* for sample 0, prompt 'the film was'"):
        TokenReward("rm", model, 4)(rollout)
    with pytest.warns(UserWarning, match="sample dropped: reward model rm gave nan"):
        assert torch.isnan(TokenReward("rm", model, 4, on_error="drop")(rollout)).all()


def test_a_dropped_sample_takes_no_part(world: Any) -> None:
    """Whatever a dropped sample holds, the update and the metrics are the same; and they are the others' alone."""
    drop = FunctionReward("mine", nan_for("w3 w4 w5"), "drop")
    outcomes = []
    for token in (20, 30):
        trainer = world.trainer(reward=drop)
        torch.manual_seed(3)
        rollout = trainer.sample(world.prompts)
        ids = rollout.response_ids.clone()
        ids[4] = token
        with pytest.warns(UserWarning, match="sample dropped"):
            scored = trainer.score(replace(rollout, response_ids=ids))
        assert not scored.rollout.response_mask[4].any()
        stats = trainer.updater.minibatch(scored, trainer.experience(scored), slice(0, 8))
        assert int(stats.tokens) == int(rollout.response_mask.sum() - rollout.response_mask[4].sum())
        outcomes.append((stats.means, trainer.actor.model.state_dict()))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(torch.equal(outcomes[0][1][key], value) for key, value in outcomes[1][1].items())


@pytest.mark.filterwarnings("ignore:sample dropped")
def test_a_step_counts_what_it_dropped(world: Any) -> None:
    reward = WeightedReward(
        (FunctionReward("a", nan_for("the"), "drop"), FunctionReward("b", raises_for("w6"), "drop")),
        (1.0, 0.0),
    )
    metrics = world.trainer(reward=reward).step()
    assert metrics["objective/dropped"] == 2.0
    assert metrics["objective/scores"] == 1.0  # the mean of the six that are left
    assert all(math.isfinite(value) for value in metrics.values())
    nothing = world.trainer(reward=FunctionReward("c", lambda p, r: [math.nan] * len(p), "drop"))
    with pytest.raises(RewardError, match="every one of the 8 samples was dropped"):
        nothing.step()


@pytest.mark.filterwarnings("ignore:sample dropped")
def test_a_run_with_dropped_samples_evaluates_and_reports(
    settings: Callable[..., PPOConfig], tmp_path: Path
) -> None:
    source = (
        "def score(prompts, responses):\n"
        "    return [float('nan') if p == 'a film' else len(r) / 10 for p, r in zip(prompts, responses)]\n"
    )
    (tmp_path / "partly.py").write_text(source)
    reward = RewardSource(function=f"{tmp_path / 'partly.py'}:score", on_error="drop")
    folder = train(settings(steps=2, rewards=[reward], evaluation=EvaluationConfig(every=1, max_prompts=4)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["objective/dropped"] for line in lines if "event" not in line] == [1.0, 1.0]
    assert all(math.isfinite(line["eval/score"]) for line in lines if "event" in line)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples if sample["score"] is None} == {"a film"}
    assert (folder / "report.html").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB: room for one checkpoint of the tiny models and the run's files, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_during_a_save_stops_the_run_with_the_last_checkpoint_whole(
    settings: Callable[..., PPOConfig], tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    config = settings(
        output_dir=str(small_disk / "run"), resume="auto", checkpoint=CheckpointConfig(every=1, keep=1)
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert main(["train", "--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert "the disk is full; step_000001 is whole" in told
    assert "Traceback" not in told
    assert sorted(path.name for path in (small_disk / "run" / "checkpoints").iterdir()) == [
        "latest",
        "step_000001",
    ]
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert main(["train", "--config", str(file)]) == 0
    whole = train(replace(config, output_dir=str(tmp_path / "whole")))
    for name in ("actor", "critic"):
        theirs = (whole / name / "model.safetensors").read_bytes()
        assert (small_disk / "run" / name / "model.safetensors").read_bytes() == theirs


def test_records_and_models_that_cannot_be_written_are_named(
    settings: Callable[..., PPOConfig], small_disk: Path
) -> None:
    """With the disk full from the start the first record fails, with little room the models at the end."""
    filler = small_disk / "filler"
    config = settings(output_dir=str(small_disk / "run"), steps=1)
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(free - 150_000))
    with pytest.raises(OSError, match=r"run/(actor|critic): the model could not be written .*No space left"):
        train(config)
    filler.unlink()
    train(replace(config, resume="auto"))
    shutil.rmtree(small_disk / "run")
    recorder = Recorder(small_disk, tensorboard=False, first_step=1)
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(OSError, match=r"samples.jsonl: could not be written .No space left"):
        recorder.samples([{"step": 0, "response": "x" * 100_000}])


def test_an_actor_whose_weights_are_lost(world: Any) -> None:
    trainer = world.trainer()
    torch.nn.init.constant_(trainer.actor.model.lm_head.weight, math.nan)
    with pytest.raises(FloatingPointError, match="the actor's logits are not finite.* optimizer.actor_lr"):
        trainer.step()
