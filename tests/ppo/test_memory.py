"""The memory estimate: its parts by hand, the peak that a process really has, and what a run says before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from ppo_fast.ppo import PPOConfig, run
from ppo_fast.ppo.memory import (
    GIB,
    SHAPES,
    ModelShape,
    Workload,
    check_memory,
    device_memory,
    devices_needed,
    estimate_memory,
    memory_table,
    table_estimate,
)
from ppo_fast.ppo.run import build_trainer

DOCUMENT = Path(__file__).parents[2] / "ppo_fast" / "ppo" / "README.md"
SMALL = ModelShape(parameters=1000, layers=2, hidden=10, intermediate=20, kv_width=4, vocabulary=50)
WORK = Workload(prompt=6, response=4, generated=8, micro_batch=2)


def test_parts_by_hand() -> None:
    found = estimate_memory(SMALL, SMALL, [SMALL, SMALL], WORK)
    assert found.weights == 4 * 4000
    assert found.gradients == 4 * 2000
    assert found.optimizer == 8 * 2000
    # 2 layers x (11 x 10 + 4 x 20) numbers a token; logits, their gradient and its padded form, 2 x 4 x 50 each.
    assert found.update == 4 * (2 * 190 * 2 * 10) + 3 * 4 * 400
    assert found.scoring == 2 * 4 * 400
    # The cache, both layers twice over here, and three forms of the next token's logits.
    assert found.sampling == 2 * (2 * 2 * 4 * 8 * 10 * 4) + 3 * 4 * 8 * 50
    assert found.peak == pytest.approx(1.05 * (found.base + 16_000 + 8000 + 16_000 + found.update))


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)]
)
def test_zero_shares_what_its_stage_shares(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    alone = estimate_memory(SMALL, SMALL, [SMALL], WORK)
    found = estimate_memory(SMALL, SMALL, [SMALL], replace(WORK, ranks=4, zero_stage=stage))
    assert found.weights == alone.weights / weights
    assert found.gradients == alone.gradients / gradients
    assert found.optimizer == alone.optimizer / optimizer
    gathered = found.sampling - alone.sampling
    assert gathered == (4 * 1000 if stage == 3 else 0)  # the actor, whole, for sampling


def test_linear_heads_hold_a_chunk_of_the_logits() -> None:
    wide = replace(SMALL, vocabulary=50_000)
    long = replace(WORK, response=8192, micro_batch=4)
    without, with_them = (
        estimate_memory(wide, wide, [wide], replace(long, linear_head=chosen)) for chosen in (False, True)
    )
    assert without.update - with_them.update == 4 * 50_000 * (3 * 4 * 8192 - 4096)


@pytest.mark.parametrize(("size", "billions"), [("1B", 1.2358), ("7B", 7.6156), ("70B", 70.5537)])
def test_named_sizes_have_the_parameters_that_they_are_known_for(size: str, billions: float) -> None:
    assert SHAPES[size].parameters / 1e9 == pytest.approx(billions, rel=2e-4)


def test_a_shape_is_read_from_a_model(world: Any) -> None:
    actor = world.actor()
    shape = ModelShape.of(actor)
    assert shape.parameters == sum(parameter.numel() for parameter in actor.parameters())
    assert (shape.layers, shape.hidden, shape.intermediate, shape.kv_width, shape.vocabulary) == (
        2,
        32,
        64,
        16,
        40,
    )
    by_formula = ModelShape.llama(
        layers=2, hidden=32, intermediate=64, kv_width=16, vocabulary=40, tied=False
    )
    assert shape.parameters - by_formula.parameters == 5 * 32  # the norms
    with torch.device("meta"):
        assert ModelShape.of(LlamaForCausalLM(actor.config)) == shape


def test_the_number_of_devices_is_the_least_that_fits() -> None:
    count = devices_needed("7B", 8192, 80 * GIB, linear_head=False)
    assert count is not None
    assert table_estimate("7B", 8192, count, linear_head=False).peak <= 80 * GIB
    assert table_estimate("7B", 8192, count - 1, linear_head=False).peak > 80 * GIB
    assert (
        devices_needed("70B", 2048, 80 * GIB, linear_head=True) is None
    )  # the gathered actor alone is 131 GB


def test_the_documented_table_is_the_functions_own() -> None:
    assert memory_table() in DOCUMENT.read_text()


PEAK = """
import json, sys
from pathlib import Path
from ppo_fast.ppo import run
from ppo_fast.ppo.config import *
seen = []
check = run.check_memory
run.check_memory = lambda estimate, *rest: (seen.append(estimate), check(estimate, *rest))
folder = Path(sys.argv[1])
config = PPOConfig(
    output_dir=str(folder / "run"), steps=2, tensorboard=False,
    models=ModelsConfig(actor=str(folder / "lm"), device="cpu"),
    rewards=[RewardSource(function=f"{folder / 'judge.py'}:judge")],
    data=DataConfig(prompts=str(folder / "prompts.jsonl")),
    rollout=RolloutConfig(batch_size=8, max_new_tokens=24),
    objective=ObjectiveConfig(epochs=1, micro_batch_size=8),
)
trainer = run.build_trainer(config)
trainer.step(), trainer.step()
# Not by getrusage, which counts what stood there before exec too: a copy of the process that started this one.
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
print(json.dumps([seen[0].peak, peak * 1024]))
"""


def test_the_estimate_is_near_the_peak_of_a_real_run(
    settings: Callable[..., PPOConfig], world: Any, tmp_path: Path, saved: Callable[..., str]
) -> None:
    """A process of its own (ten seconds): a model of 25 million parameters, whose batch is a third of the peak."""
    settings()  # writes prompts and judge
    wide = world.actor(
        vocab_size=32_000, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4
    )
    wide.generation_config.eos_token_id = None
    saved(wide, "lm")
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    estimate, peak = json.loads(done.stdout.splitlines()[-1])
    assert estimate == pytest.approx(peak, rel=0.25), (
        f"estimated {estimate / GIB:.2f} GB, measured {peak / GIB:.2f}"
    )


def test_a_run_that_cannot_fit_is_refused_before_it_loads(
    settings: Callable[..., PPOConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "device_memory", lambda device: 1000)
    with pytest.raises(
        ValueError, match=r"the four models take 0.5 GB .* and cpu has 0.0 GB: take models.dtype="
    ):
        build_trainer(settings())
    estimate = estimate_memory(SMALL, SMALL, [SMALL], WORK)
    monkeypatch.setattr(run, "device_memory", lambda device: int(estimate.base + 2_000_000))
    with pytest.warns(UserWarning, match="this run may take .* lower objective.micro_batch_size"):
        build_trainer(settings())
    assert not (tmp_path / "run").exists()


def test_checks_are_silent_where_it_fits(recwarn: pytest.WarningsRecorder) -> None:
    estimate = estimate_memory(SMALL, SMALL, [SMALL], WORK)
    check_memory(estimate, int(estimate.peak) + 1, "cpu", WORK)
    assert not recwarn.list
    with pytest.raises(ValueError, match="take models.dtype=bfloat16 or smaller models"):
        check_memory(estimate, int(estimate.held) - 1, "cpu", WORK)


def test_the_memory_of_this_machine() -> None:
    installed = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < device_memory(torch.device("cpu")) <= installed * 1.01
