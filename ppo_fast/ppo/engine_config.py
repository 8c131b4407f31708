"""The settings of DeepSpeed engines: a user's own JSON, or a preset by ZeRO stage, completed from the run's config.

What `ppo_fast` has a setting for is decided there: the JSON may say `"auto"` for it, leave it out, or give the same
value. Another value is refused, since one of the two would be ignored in silence.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

from ppo_fast.ppo.config import PPOConfig

AUTO = "auto"
QUIET = {"steps_per_print": 10**9}
Which = Literal["actor", "critic"]


def uses_deepspeed(config: PPOConfig) -> bool:
    """Whether the run's models are to live on DeepSpeed engines."""
    return config.parallel.deepspeed is not None or config.parallel.zero_stage is not None


def zero_stage(config: PPOConfig) -> int:
    """ZeRO stage of actor and critic; 0 without engines, which splits nothing either."""
    return int(_base(config)["zero_optimization"].get("stage", 0)) if uses_deepspeed(config) else 0


def optimizer_bytes(config: PPOConfig) -> int:
    """Bytes that the optimiser keeps of each trained parameter, on the device."""
    if uses_deepspeed(config) and "offload_optimizer" in _base(config)["zero_optimization"]:
        return 0
    if config.models.dtype == "float32":
        return 8
    return 12 if uses_deepspeed(config) else 4  # moments and a master copy in float32, or moments in bfloat16


def loading_device(config: PPOConfig) -> str:
    """Where models are loaded: on their device, or under ZeRO-3, which splits them from there, in CPU memory."""
    return "cpu" if zero_stage(config) == 3 else config.models.device


def learner_settings(config: PPOConfig, which: Which, processes: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given for the actor or the critic.

    Raises ValueError naming the file and the key where the JSON cannot be read, contradicts the run's config, or asks
    for what is not supported here.
    """
    settings = _base(config)
    where = config.parallel.deepspeed or "parallel"
    for path, value in _own_values(config, which, processes).items():
        _settle(settings, path, value, where)
    _check_supported(settings, config, where)
    zero = settings["zero_optimization"]
    for key in [key for key, value in zero.items() if value == AUTO]:
        del zero[key]  # DeepSpeed's own default stands
    if "optimizer" not in settings:
        # torch's AdamW, as without DeepSpeed; it is exact with every stage, offloaded or not.
        settings.setdefault("zero_allow_untested_optimizer", True)
        settings.setdefault("zero_force_ds_cpu_optimizer", False)
    left = _autos(settings)
    if left:
        raise ValueError(f"{where}: {left[0]} is `auto`, which nothing here decides: expected a value")
    return {**QUIET, **settings}


def frozen_settings(config: PPOConfig) -> dict[str, Any] | None:
    """Settings of a frozen model's ZeRO-3 engine, or None for an inference engine: by `parallel.frozen`."""
    settings = _base(config)
    stage = settings["zero_optimization"].get("stage", 0)
    kind = config.parallel.frozen
    if kind == "inference" or (kind == AUTO and stage < 3):
        return None
    kept = {key: value for key, value in settings["zero_optimization"].items() if value != AUTO}
    kept.pop("offload_optimizer", None)
    return {
        **QUIET,
        "train_micro_batch_size_per_gpu": config.objective.micro_batch_size,
        "zero_optimization": {**kept, "stage": 3},
        "bf16": {"enabled": config.models.dtype == "bfloat16"},
    }


def _base(config: PPOConfig) -> dict[str, Any]:
    parallel = config.parallel
    settings = _read(parallel.deepspeed) if parallel.deepspeed is not None else {}
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"{parallel.deepspeed}: zero_optimization is {zero!r}, expected an object")
    stage = parallel.zero_stage
    if stage is not None and zero.setdefault("stage", stage) != stage:
        raise ValueError(
            f"{parallel.deepspeed}: zero_optimization.stage is {zero['stage']!r}, but parallel.zero_stage is "
            f"{stage}: expected one of the two to be left out, or the same"
        )
    if parallel.offload != "none":
        zero.setdefault("offload_optimizer", {"device": "cpu"})
    if parallel.offload == "all":
        zero.setdefault("offload_param", {"device": "cpu"})
    return settings


def _read(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"parallel.deepspeed: there is no file {path!r}")
    try:
        settings = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"parallel.deepspeed: {path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"parallel.deepspeed: {path} holds {type(settings).__name__}, expected an object")
    return copy.deepcopy(settings)


def _own_values(config: PPOConfig, which: Which, processes: int) -> dict[str, Any]:
    """Dotted key of DeepSpeed -> the value that the run's config gives it.

    Micro-batches need not fill evenly: what DeepSpeed calls the train batch size is a bound of a minibatch.
    """
    optimizer = config.optimizer
    micro = config.objective.micro_batch_size
    own = config.minibatch_size // processes
    accumulation = -(-own // micro)
    rate = optimizer.actor_lr if which == "actor" else optimizer.critic_lr
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * processes,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16.enabled": config.models.dtype == "bfloat16",
        "fp16.enabled": False,
        "optimizer.params.lr": rate,
        "optimizer.params.betas": [optimizer.beta1, optimizer.beta2],
        "optimizer.params.eps": optimizer.eps,
        "optimizer.params.weight_decay": optimizer.weight_decay,
        "scheduler.params.warmup_min_lr": 0.0,
        "scheduler.params.warmup_max_lr": rate,
        "scheduler.params.warmup_num_steps": optimizer.warmup_steps,
        "scheduler.params.total_num_steps": config.optimizer_steps,
    }


def _settle(settings: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Put our value where the JSON says `auto` or nothing; ValueError where it says another."""
    *outer, key = path.split(".")
    section = settings
    for name in outer:
        if name not in section:
            if outer[0] in ("optimizer", "scheduler", "fp16"):
                return  # a section that is not there is not asked for
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise ValueError(f"{where}: {'.'.join(outer)} is {section!r}, expected an object")
    asked = section.get(key, AUTO)
    if outer[:1] == ["scheduler"]:
        if asked == AUTO and key in section:
            section[key] = value
        return  # a schedule of DeepSpeed's is the user's own; ours has no part in it
    if asked != AUTO and asked != value:
        raise ValueError(
            f"{where}: {path} is {asked!r}, but the run's settings make it {value!r}: "
            'expected that, "auto", or no such key'
        )
    section[key] = value


def _check_supported(settings: dict[str, Any], config: PPOConfig, where: str) -> None:
    zero = settings["zero_optimization"]
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{where}: zero_optimization.stage is {stage!r}, expected 0, 1, 2 or 3")
    wide = settings.get("data_types", {}).get("grad_accum_dtype") in ("fp32", "float32")
    if stage < 2 and wide and config.models.dtype == "bfloat16":
        raise ValueError(
            f"{where}: data_types.grad_accum_dtype is fp32 with bf16 weights and ZeRO stage {stage}, "
            "expected stage 2 or 3, or no data_types"
        )
    if stage == 0 and config.parallel.offload != "none":
        raise ValueError(
            f"parallel.offload is {config.parallel.offload!r} with ZeRO stage 0, expected stage 1, 2 or 3"
        )
    if stage < 3 and "offload_param" in zero and zero["offload_param"] != AUTO:
        raise ValueError(f"{where}: offload_param with ZeRO stage {stage}, expected stage 3")


def _autos(settings: Any, path: str = "") -> list[str]:
    if isinstance(settings, dict):
        items = settings.items()
        return [found for key, value in items for found in _autos(value, f"{path}.{key}" if path else key)]
    return [path] if settings == AUTO else []
