"""State of a DeepSpeed engine as tensors and numbers: whole weights for readers, shards for an exact resume."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ppo_fast.ppo.ranks import Ranks
from ppo_fast.ppo.state import State, load_model_state


def shared_engine_state(engine: Any, model: nn.Module, stage: int) -> dict[str, Tensor]:
    """Whole weights on the first process's CPU, empty elsewhere; under ZeRO-3 one parameter is whole at a time."""
    first = Ranks().first
    if stage < 3:
        return {name: value.detach().cpu() for name, value in model.state_dict().items()} if first else {}
    import deepspeed

    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    persistent = set(model.state_dict())
    weights: dict[str, Tensor] = {}
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            if first:
                whole = parameter.detach().cpu().clone()
                weights |= dict.fromkeys(names[id(parameter)], whole)
    if first:
        weights |= {name: value.cpu() for name, value in model.named_buffers() if name in persistent}
    return weights


def own_engine_state(engine: Any) -> State:
    """This process's part of the optimiser (master weights, moments), and the schedule's place."""
    tensors: dict[str, Tensor] = {}
    numbers = {"optimizer": _take_apart(engine.optimizer.state_dict(), "optimizer", tensors)}
    numbers["schedule"] = _take_apart(engine.lr_scheduler.state_dict(), "schedule", tensors)
    return State(tensors, numbers)


def load_engine_state(engine: Any, model: nn.Module, weights: State, own: State, name: str) -> None:
    """Put weights, optimiser and schedule back; `name` is what an error calls the model."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage < 3:
        load_model_state(model, weights, name)
    present = optimizer.state_dict()
    state = _put_together(own.numbers["optimizer"], own.tensors, present)
    if stage == 0:
        optimizer.load_state_dict(state)
    else:
        ranks = Ranks()
        optimizer.load_state_dict([state if index == ranks.index else None for index in range(ranks.count)])
    if stage == 3:
        optimizer.checkpoint_event_epilogue()  # small parameters that are kept whole are gathered anew
    engine.lr_scheduler.load_state_dict(_put_together(own.numbers["schedule"], own.tensors, {}))


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON that holds a nested state, its tensors put into `tensors` under their paths.

    Objects of DeepSpeed's own (a loss scaler, addresses of parameters) are left out: they are made anew.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _take_apart(item, f"{path}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"list": [_take_apart(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    return {"anew": type(value).__name__}


def _put_together(saved: dict[str, Any], tensors: dict[str, Tensor], present: Any) -> Any:
    """What `_take_apart` took; objects it left out come from `present`, the state as it is now."""
    ((kind, content),) = saved.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        known = present if isinstance(present, dict) else {}
        return {key: _put_together(item, tensors, known.get(key)) for key, item in content}
    if kind == "list":
        fits = isinstance(present, (list, tuple)) and len(present) == len(content)
        places = present if fits else [None] * len(content)
        return [_put_together(item, tensors, now) for item, now in zip(content, places, strict=True)]
    return content if kind == "value" else present
