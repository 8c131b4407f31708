"""A DeepSpeed JSON of the user: what of it is completed, kept, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppo_fast.ppo import PPOConfig
from ppo_fast.ppo.config import ModelsConfig, OptimizerConfig, ParallelConfig
from ppo_fast.ppo.engine_config import (
    frozen_settings,
    learner_settings,
    loading_device,
    optimizer_bytes,
    uses_deepspeed,
    zero_stage,
)

AUTO = "auto"


@pytest.fixture
def config(world: Any, tmp_path: Path) -> Callable[..., PPOConfig]:
    """A run of 8 prompts, 2 minibatches, micro-batches of 2, with a JSON file and other fields of `parallel`."""

    def make(settings: Any = None, dtype: str = "float32", **parallel: Any) -> PPOConfig:
        if settings is not None:
            (tmp_path / "ds.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
            parallel["deepspeed"] = str(tmp_path / "ds.json")
        return world.config(
            models=ModelsConfig(device="cpu", dtype=dtype),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(1e-3, 2e-3, warmup_steps=5, max_grad_norm=0.5),
            parallel=ParallelConfig(**parallel),
        )

    return make


def test_without_either_there_is_no_deepspeed(config: Callable[..., PPOConfig]) -> None:
    assert not uses_deepspeed(config())
    assert uses_deepspeed(config(zero_stage=0))
    assert uses_deepspeed(config({}))


def test_what_is_auto_or_left_out_comes_from_the_run(config: Callable[..., PPOConfig]) -> None:
    settings = {
        "train_batch_size": AUTO,
        "gradient_accumulation_steps": AUTO,
        "bf16": {"enabled": AUTO},
        "fp16": {"enabled": AUTO},
        "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": AUTO, "warmup_num_steps": 7}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": AUTO, "overlap_comm": True},
    }
    found = learner_settings(config(settings, dtype="bfloat16"), "critic", 2)
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 1  # a minibatch of 4, 2 a process
    assert found["train_batch_size"] == 4
    assert found["gradient_clipping"] == 0.5
    assert (found["bf16"]["enabled"], found["fp16"]["enabled"]) == (True, False)
    assert found["optimizer"]["params"] == {
        "lr": 2e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-5,
        "weight_decay": 0.0,
    }
    assert found["scheduler"]["params"] == {"warmup_max_lr": 2e-3, "warmup_num_steps": 7}
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True}  # DeepSpeed's own bucket size
    assert (
        learner_settings(config(settings, dtype="bfloat16"), "actor", 2)["optimizer"]["params"]["lr"] == 1e-3
    )


def test_a_stage_alone_is_enough(config: Callable[..., PPOConfig]) -> None:
    found = learner_settings(config(zero_stage=3, offload="all"), "actor", 2)
    assert found["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
    }  # fmt: skip
    assert found["zero_allow_untested_optimizer"] is True


@pytest.mark.parametrize(
    ("stage", "frozen", "expected"),
    [(2, "auto", None), (3, "auto", 3), (3, "inference", None), (1, "zero3", 3)],
)
def test_frozen_models_are_split_where_the_actor_is(
    config: Callable[..., PPOConfig], stage: int, frozen: str, expected: int | None
) -> None:
    found = frozen_settings(config(zero_stage=stage, frozen=frozen, offload="optimizer"))
    assert (found and found["zero_optimization"]) == (expected and {"stage": expected})


def test_models_that_will_be_split_are_loaded_in_cpu_memory(config: Callable[..., PPOConfig]) -> None:
    run = config(zero_stage=3)
    run.models.device = "cuda:5"
    assert loading_device(run) == "cpu"
    run.parallel.zero_stage = 2
    assert loading_device(run) == "cuda:5"


@pytest.mark.parametrize(
    ("settings", "dtype", "parallel", "expected"),
    [
        (None, "float32", {}, 8),
        (None, "bfloat16", {}, 4),
        (None, "bfloat16", {"zero_stage": 1}, 12),
        (None, "bfloat16", {"zero_stage": 2, "offload": "optimizer"}, 0),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "float32", {}, 0),
    ],
)
def test_memory_is_estimated_for_what_the_optimiser_keeps(
    config: Callable[..., PPOConfig], settings: Any, dtype: str, parallel: dict[str, Any], expected: int
) -> None:
    run = config(settings, dtype, **parallel)
    assert optimizer_bytes(run) == expected
    assert zero_stage(run) == (3 if settings else parallel.get("zero_stage", 0))


def test_models_too_large_for_one_process_may_fit_two(
    world: Any, saved: Callable[..., str], config: Callable[..., PPOConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate that a run is refused by counts on ZeRO 3 to split the models over the processes."""
    from ppo_fast.ppo import run as run_module

    settings = config(zero_stage=3)
    settings.models.actor = saved(world.actor(hidden_size=512, intermediate_size=2048), "large")
    asked: list[Any] = []
    monkeypatch.setattr(run_module, "check_memory", lambda *args: asked.append(args[0].held - args[0].base))
    run_module.check_fits(settings, 8)
    monkeypatch.setattr(run_module.Ranks, "__init__", lambda self: self.__dict__.update(count=4, index=0))
    run_module.check_fits(settings, 8)
    assert asked[1] == pytest.approx(asked[0] / 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{", "ds.json is no JSON"),
        ("[]", "ds.json holds list, expected an object"),
        ({"zero_optimization": 3}, "zero_optimization is 3, expected an object"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7, expected 0, 1, 2 or 3"),
        ({"train_batch_size": 32}, "train_batch_size is 32, but the run's settings make it 4"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but the run's settings make it 0.5"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but the run's settings make it False"),
        ({"bf16": True}, "bf16 is True, expected an object"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but the run's settings make it False"),
        ({"optimizer": {"params": {"lr": 1e-5}}}, "optimizer.params.lr is 1e-05, but .* make it 0.001"),
        ({"comms_logger": {"enabled": AUTO}}, "comms_logger.enabled is `auto`, which nothing here decides"),
        (
            {"zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}},
            "offload_param with ZeRO stage 1, expected stage 3",
        ),
    ],
)
def test_a_json_that_contradicts_the_run(
    config: Callable[..., PPOConfig], settings: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=r"ds\.json.*" + message.removeprefix("ds.json")):
        learner_settings(config(settings), "actor", 2)


def test_settings_that_contradict_one_another(config: Callable[..., PPOConfig]) -> None:
    with pytest.raises(ValueError, match="stage is 1, but parallel.zero_stage is 2"):
        learner_settings(config({"zero_optimization": {"stage": 1}}, zero_stage=2), "actor", 2)
    with pytest.raises(ValueError, match="parallel.offload is 'optimizer' with ZeRO stage 0"):
        learner_settings(config(zero_stage=0, offload="optimizer"), "actor", 2)
    with pytest.raises(ValueError, match=r"parallel.deepspeed: there is no file 'nowhere.json'"):
        learner_settings(config(deepspeed="nowhere.json"), "actor", 2)
    wide = {"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="grad_accum_dtype is fp32 with bf16 weights and ZeRO stage 1"):
        learner_settings(config(wide, dtype="bfloat16"), "actor", 2)
