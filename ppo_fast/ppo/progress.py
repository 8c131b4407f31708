"""A PPO step that has begun: what its updates read, which are done, and how that is stored.

The optimiser has moved the weights since the step began, so a run that is stopped within it cannot go back; it goes on
from here. What it then needs is small beside the weights: token tensors of one batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ppo.experience import Rows, ScoredRollout
from ppo_fast.ppo.state import State
from ppo_fast.ppo.update import UpdateStats
from ppo_fast.records import Experience, Rollout


@dataclass
class StepInProgress:
    """The batch of a step, the rows of all its updates, and the figures of those done."""

    scored: ScoredRollout
    experience: Experience
    plan: list[Rows]
    updates: list[UpdateStats] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def remaining(self) -> list[Rows]:
        """Rows of the updates to come."""
        return self.plan[len(self.updates) :]

    def state(self) -> State:
        """Everything, for a checkpoint."""
        state = State(numbers={"seconds": self.seconds})
        _pack(state, "scored", self.scored)
        for name, value in self.experience._asdict().items():
            state.tensors[f"experience.{name}"] = value.clone()
        state.numbers["plan"] = [
            [rows.start, rows.stop] if isinstance(rows, slice) else rows.tolist() for rows in self.plan
        ]
        state.numbers["slices"] = [isinstance(rows, slice) for rows in self.plan]
        state.numbers["updates"] = [list(update.means) for update in self.updates]
        state.numbers["skipped"] = [update.skipped for update in self.updates]
        for index, update in enumerate(self.updates):
            state.tensors[f"update.{index}"] = torch.stack(
                [value.double() for value in (update.tokens, update.ratio_max, *update.means.values())]
            )
        return state

    @classmethod
    def of(cls, state: State, device: torch.device) -> StepInProgress:
        """The inverse of `state`."""
        tensors = {name: value.to(device) for name, value in state.tensors.items()}
        scored = _unpack(ScoredRollout, State(tensors, state.numbers), "scored", rollout=Rollout)
        experience = Experience(*(tensors[f"experience.{name}"] for name in Experience._fields))
        plan: list[Rows] = [
            slice(*rows) if is_slice else torch.tensor(rows, dtype=torch.long)
            for rows, is_slice in zip(state.numbers["plan"], state.numbers["slices"], strict=True)
        ]
        updates = []
        for index, names in enumerate(state.numbers["updates"]):
            tokens, ratio_max, *values = tensors[f"update.{index}"].unbind()
            means = {name: value.float() for name, value in zip(names, values, strict=True)}
            skipped = state.numbers["skipped"][index]
            updates.append(UpdateStats(tokens.long(), means, ratio_max.float(), skipped))
        return cls(scored, experience, plan, updates, dict(state.numbers["seconds"]))


def _pack(state: State, prefix: str, record: Any) -> None:
    """Tensors, lists of texts and nested records of a dataclass; what is None is left out."""
    for entry in fields(record):
        value, name = getattr(record, entry.name), f"{prefix}.{entry.name}"
        if isinstance(value, Tensor):
            state.tensors[name] = value.clone(memory_format=torch.contiguous_format)
        elif is_dataclass(value):
            _pack(state, name, value)
        elif value is not None:
            state.numbers[name] = value


def _unpack(kind: Any, state: State, prefix: str, **nested: Any) -> Any:
    found = {}
    for entry in fields(kind):
        name = f"{prefix}.{entry.name}"
        if entry.name in nested:
            found[entry.name] = _unpack(nested[entry.name], state, name)
        else:
            found[entry.name] = state.tensors.get(name, state.numbers.get(name))
    return kind(**found)
