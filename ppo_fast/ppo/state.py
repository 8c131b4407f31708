"""What a checkpoint stores: tensors by name, numbers that JSON holds; and the parts of a run that have such state."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class State:
    """State of one thing: tensors go to a safetensors file of their own, numbers to JSON (floats keep every bit)."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


class Saved(Protocol):
    """A checkpoint as `Part.load_state` reads it, already verified."""

    def shared(self, name: str) -> State:
        """What `Part.shared_state` stored under `name`."""
        ...

    def own(self, name: str) -> State:
        """What `Part.own_state` of this rank stored under `name`."""
        ...


class Part(Protocol):
    """A part of a run whose state a checkpoint keeps. Names must differ between all parts of a run."""

    def shared_state(self) -> dict[str, State]:
        """State that is one for all ranks, by name. Every rank calls it (it may gather); the first rank writes it."""
        ...

    def own_state(self) -> dict[str, State]:
        """State that is this rank's alone, by name: a shard of an optimiser, random numbers, data position."""
        ...

    def load_state(self, saved: Saved) -> None:
        """Restore both in place; ValueError where they do not fit."""
        ...


def model_state(model: nn.Module) -> State:
    """Parameters and buffers, each storage once: tied weights are kept under their first name."""
    seen: set[int] = set()
    own = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        own[name] = tensor.detach().contiguous()
    return State(own)


def load_model_state(model: nn.Module, state: State, name: str) -> None:
    """Copy `model_state` back in place; ValueError naming `name` where names or shapes differ."""
    tied = set(model.state_dict()) - set(model_state(model).tensors)
    try:
        missing, unexpected = model.load_state_dict(state.tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the {name}: {error}") from error
    wrong = sorted((set(missing) - tied) | set(unexpected))
    if wrong:
        raise ValueError(f"the weights do not fit the {name}: {', '.join(wrong[:5])}")


def optimizer_state(optimizer: torch.optim.Optimizer, scheduler: Any) -> State:
    """Moments and step counts of every parameter, the groups' settings, the schedule's place."""
    saved = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value for index, entry in saved["state"].items() for name, value in entry.items()
    }
    return State(tensors, {"groups": saved["param_groups"], "schedule": scheduler.state_dict()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, scheduler: Any, state: State) -> None:
    """Put `optimizer_state` back."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in state.tensors.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": state.numbers["groups"]})
    scheduler.load_state_dict(state.numbers["schedule"])


def random_state() -> State:
    """The generators of this process: torch's on the CPU and on this rank's GPU, Python's, and numpy's global one.

    A generator that a reward function made for itself is not among them.
    """
    version, words, gauss = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(legacy["state"]["key"].astype("int64")),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numbers = {
        "python": [version, gauss],
        "numpy": [legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
    }
    return State(tensors, numbers)


def load_random_state(state: State) -> None:
    """Put every generator of `random_state` back where it was."""
    torch.set_rng_state(state.tensors["torch"])
    version, gauss = state.numbers["python"]
    random.setstate((version, tuple(state.tensors["python"].tolist()), gauss))
    place, has_gauss, cached = state.numbers["numpy"]
    numpy.random.set_state(
        ("MT19937", state.tensors["numpy"].numpy().astype("uint32"), place, has_gauss, cached)
    )
    if "cuda" in state.tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.tensors["cuda"])
