"""Two gloo processes against one: the same prompts, samples, metrics and weights, with and without DeepSpeed.

This file is also the program of a process: `python test_processes.py RESULTS`, started as a launcher starts it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast.ppo import PPOTrainer
from ppo_fast.ppo.config import ModelsConfig, OptimizerConfig, ParallelConfig
from ppo_fast.ppo.models import critic_from_classifier
from ppo_fast.ppo.parallel import LostRankError, Shard, agreed, process_group, told_of_lost_ranks
from ppo_fast.ppo.ranks import Ranks
from ppo_fast.ppo.rewards import FunctionReward, TokenReward, WeightedReward

PROCESSES = 2
STEPS = 2  # of 2 epochs of 2 minibatches: 8 updates
GENEROUS = 60.0  # seconds; a machine that is shared is slow
# Small parameters are split, too: by default ZeRO-3 keeps those of less than 100,000 numbers whole.
SPLIT = {"stage": 3, "stage3_param_persistence_threshold": 0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no DeepSpeed": ({}, {}),
    "ZeRO 0": ({"zero_stage": 0}, {}),
    "ZeRO 1": ({"zero_stage": 1}, {}),
    "ZeRO 2": ({"zero_stage": 2}, {}),
    "ZeRO 2, optimiser on the CPU, layers recomputed": (
        {"zero_stage": 2, "offload": "optimizer"},
        {"gradient_checkpointing": True},
    ),
    "ZeRO 3": ({"deepspeed": True}, {}),
    "ZeRO 3, all on the CPU, layers recomputed": (
        {"deepspeed": True, "offload": "all"},
        {"gradient_checkpointing": True},
    ),
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: `make test` installs it",
)


def load_world() -> Any:
    spec = importlib.util.spec_from_file_location("ppo_world", Path(__file__).with_name("conftest.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ppo_world"] = module
    spec.loader.exec_module(module)
    tokenizer = module.make_tokenizer()
    prompts = module.encode_prompts([{"prompt": text} for text in module.PROMPTS], tokenizer, "prompts")
    return module.World(tokenizer, prompts)


def make_trainer(world: Any, case: str, folder: Path, steps: int = STEPS) -> PPOTrainer:
    """Every part that processes could get wrong: ragged responses, clipping, a schedule, two rates, two rewards."""
    settings, models = CASES[case]
    parallel = dict(settings)
    if "deepspeed" in parallel:
        parallel["deepspeed"] = str(folder / "zero_3.json")
    config = world.config(
        steps=steps,
        objective={"entropy_coef": 0.1, "micro_batch_size": 2, "kl_target": 0.5, "kl_horizon": 100},
        optimizer=OptimizerConfig(1e-3, 3e-3, schedule="linear", max_grad_norm=0.5),
        models=ModelsConfig(device="cpu", **models),
        parallel=ParallelConfig(**parallel),
    )
    model = world.classifier().requires_grad_(False)
    function = sys.modules[type(world).__module__].even_words
    reward = WeightedReward((TokenReward("model", model, 3), FunctionReward("words", function)), (0.5, 2.0))
    return world.trainer(config, critic=critic_from_classifier(model), reward=reward)


def weights_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    return {
        f"{learner.name}.{name}": value.detach().clone()
        for learner in (trainer.actor, trainer.critic)
        for name, value in learner.weights().items()
    }


def run_steps(trainer: PPOTrainer) -> dict[str, Any]:
    """Two steps, with what was sampled, what was reported, and the weights."""
    scored: list[Any] = []
    experience = trainer.experience

    def noted(batch: Any) -> Any:
        scored.append(batch)
        return experience(batch)

    trainer.experience = noted  # type: ignore[method-assign]
    metrics = [trainer.step() for _ in range(STEPS)]
    return {
        "metrics": [
            {k: v for k, v in one.items() if not k.startswith(("time/", "throughput/"))} for one in metrics
        ],
        "responses": [one.rollout.responses for one in scored],
        "prompts": [one.rollout.prompts for one in scored],
        "tokens": [one.rollout.response_mask.sum(1) for one in scored],
        "weights": weights_of(trainer),
    }


def skip_together(trainer: PPOTrainer) -> dict[str, Any]:
    """An update that is not finite in rows of the second process alone."""
    scored = trainer.score(trainer.sample(trainer.sampler.draw(8 // trainer.shard.count)))
    scored = trainer._gather(scored, list(trainer.sampler.prompts), 1)
    experience = trainer.experience(scored)
    advantages = experience.advantages.clone()
    advantages[6] = torch.inf
    before = weights_of(trainer)
    stats = trainer.updater.minibatch(scored, experience._replace(advantages=advantages), slice(4, 8))
    after = weights_of(trainer)
    return {"skipped": stats.skipped, "kept": all(torch.equal(before[name], after[name]) for name in before)}


def gathers(trainer: PPOTrainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often ZeRO-3 gathers while a rollout is sampled, as a whole and by layer, and by layer in scoring."""
    import deepspeed
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    counts = {"whole": 0, "sampling": 0, "scoring": 0}
    enter = deepspeed.zero.GatheredParameters.__enter__
    fetch = PartitionedParameterCoordinator.fetch_sub_module
    phase = ["sampling"]

    def entered(self: Any) -> Any:
        counts["whole"] += 1
        return enter(self)

    def fetched(self: Any, *args: Any, **options: Any) -> Any:
        counts[phase[0]] += 1
        return fetch(self, *args, **options)

    monkeypatch.setattr(deepspeed.zero.GatheredParameters, "__enter__", entered)
    monkeypatch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", fetched)
    rollout = trainer.sample(list(trainer.sampler.prompts[:4]))
    phase[0] = "scoring"
    trainer.score(rollout)
    monkeypatch.undo()
    return counts


def resumed(world: Any, case: str, folder: Path) -> dict[str, Any]:
    """One step, a checkpoint, and the second step in a trainer that was made anew."""
    root = folder / case.replace(" ", "_")
    first = make_trainer(world, case, folder)
    metrics = [first.step()]
    first.save_checkpoint(root)
    second = make_trainer(world, case, folder)
    assert second.restore(root)
    metrics.append(second.step())
    return {"weights": weights_of(second), "metrics": metrics}


def program(folder: Path) -> None:
    world = load_world()
    results: dict[str, Any] = {}
    with process_group(1.0, cpu=True, engines=True) as ranks:
        for case in CASES:
            if case != "no DeepSpeed" and importlib.util.find_spec("deepspeed") is None:
                continue
            trainer = make_trainer(world, case, folder)
            found = run_steps(trainer)
            found["skip"] = skip_together(trainer)
            if case == "ZeRO 3":
                found["gathers"] = gathers(trainer, pytest.MonkeyPatch())
                found["local"] = sum(parameter.numel() for parameter in trainer.actor.model.parameters())
                found["frozen"] = sum(parameter.numel() for parameter in trainer.reference.parameters())
            if "," not in case:
                found["resumed"] = resumed(world, case, folder)
            results[case] = found
    torch.save(results, folder / f"rank_{ranks.index}.pt")


def start_processes(command: list[str], folder: Path, **environment: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    common = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(PROCESSES), **environment}
    common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "zero_3.json").write_text(json.dumps({"zero_optimization": SPLIT}))
    programs = start_processes([__file__, str(folder)], folder)
    said = [process.communicate(timeout=10 * GENEROUS)[0] for process in programs]
    assert [process.returncode for process in programs] == [0, 0], "\n".join(said)[-4000:]
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_steps(make_trainer(load_world(), "no DeepSpeed", tmp_path_factory.mktemp("alone")))


each_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case == "no DeepSpeed" else needs_deepspeed) for case in CASES],
)


@each_case
def test_two_processes_sample_and_learn_as_one(
    of_two: list[dict[str, Any]], of_one: dict[str, Any], case: str
) -> None:
    """Weights within 2e-6 after eight updates that move them by more than 1e-3: float32 sums have another order."""
    found = of_two[0][case]
    assert found["prompts"] == of_one["prompts"]
    assert found["responses"] == of_one["responses"]
    for tokens in of_one["tokens"]:
        shares = [tokens[Shard(rank, PROCESSES).rows(8, 2)].tolist() for rank in range(PROCESSES)]
        assert sum(shares[0]) != sum(shares[1])  # so that a mean of means would be another number
    start = weights_of(make_trainer(load_world(), "no DeepSpeed", Path()))
    assert set(found["weights"]) == set(of_one["weights"])
    for name, truth in of_one["weights"].items():
        torch.testing.assert_close(found["weights"][name], truth, rtol=0, atol=2e-6, msg=name)
    assert max(float((start[name] - truth).abs().max()) for name, truth in of_one["weights"].items()) > 1e-3
    for ours, theirs in zip(found["metrics"], of_one["metrics"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-6)


@each_case
def test_every_process_reports_the_same(of_two: list[dict[str, Any]], case: str) -> None:
    assert of_two[0][case]["metrics"] == of_two[1][case]["metrics"]
    assert of_two[0][case]["responses"] == of_two[1][case]["responses"]


@each_case
def test_an_update_that_is_not_finite_on_one_process_is_skipped_on_all(
    of_two: list[dict[str, Any]], case: str
) -> None:
    assert [found[case]["skip"] for found in of_two] == [{"skipped": True, "kept": True}] * PROCESSES


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case == "no DeepSpeed" else needs_deepspeed)
        for case in CASES
        if "," not in case
    ],
)
def test_a_resumed_run_is_bitwise_the_one_that_went_on(of_two: list[dict[str, Any]], case: str) -> None:
    found = of_two[0][case]
    for name, value in found["weights"].items():
        assert torch.equal(found["resumed"]["weights"][name], value), name
    last = {key: found["resumed"]["metrics"][-1][key] for key in found["metrics"][-1]}
    assert last == found["metrics"][-1]


@needs_deepspeed
def test_zero_3_gathers_once_a_rollout_and_holds_shards(of_two: list[dict[str, Any]]) -> None:
    for found in of_two:
        counts = found["ZeRO 3"]["gathers"]
        assert (counts["whole"], counts["sampling"]) == (1, 0)
        assert counts["scoring"] > 10  # layer by layer, of four models
        assert (found["ZeRO 3"]["local"], found["ZeRO 3"]["frozen"]) == (
            0,
            0,
        )  # between the calls nothing is whole


def test_shards_are_every_row_once() -> None:
    for minibatches in (1, 2, 3):
        rows = [Shard(rank, 2).rows(12, minibatches) for rank in range(2)]
        assert sorted(rows[0] + rows[1]) == list(range(12))
        for start in range(0, 12, 12 // minibatches):
            minibatch = slice(start, start + 12 // minibatches)
            parts = [Shard(rank, 2).part(minibatch) for rank in range(2)]
            assert all(
                isinstance(part, slice) and part.stop - part.start == 6 // minibatches for part in parts
            )
            assert all(set(range(12)[part]) <= set(rows[rank]) for rank, part in enumerate(parts))
    order = torch.tensor([5, 3, 0, 2])
    assert [Shard(rank, 2).part(order).tolist() for rank in range(2)] == [[5, 3], [0, 2]]


@pytest.mark.parametrize(("batch", "minibatches", "count"), [(8, 4, 4), (6, 1, 4)])
def test_a_minibatch_that_does_not_divide_is_refused(batch: int, minibatches: int, count: int) -> None:
    with pytest.raises(ValueError, match=rf"expected a multiple of the number of processes \({count}\)"):
        Shard(0, count).check(batch, minibatches)


def test_an_error_of_another_kind_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    with pytest.raises(RuntimeError, match="^the weights were restored$"), told_of_lost_ranks(2.0):
        raise RuntimeError("the weights were restored")
    with (
        pytest.raises(LostRankError, match=r"rank 3 lost another .*parallel.timeout_minutes=2"),
        told_of_lost_ranks(2.0),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")


def test_one_process_refuses_where_another_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks()
    assert agreed(ranks, lambda: 5) == 5
    with pytest.raises(ValueError, match="mine"):
        agreed(ranks, lambda: int("mine"))
    monkeypatch.setattr(ranks, "all", lambda flag: False)
    with pytest.raises(ValueError, match="another process of the run has refused"):
        agreed(ranks, lambda: 5)


def test_recomputed_layers_give_the_same_gradient_and_hold_less(world: Any) -> None:
    found = []
    for recompute in (False, True):
        trainer = world.trainer(
            world.config(models=ModelsConfig(device="cpu", gradient_checkpointing=recompute))
        )
        calls: list[int] = []
        layer = trainer.actor.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer.step()
        found.append((weights_of(trainer), len(calls)))
    assert all(torch.equal(found[0][0][name], value) for name, value in found[1][0].items())
    assert found[1][1] == found[0][1] + 2 * 2 * 2  # once more for each micro-batch of the update


if __name__ == "__main__":
    program(Path(sys.argv[1]))
