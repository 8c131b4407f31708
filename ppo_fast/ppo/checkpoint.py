"""Resumable state in a folder: safetensors for every tensor, JSON for every number, nothing pickled.

A checkpoint is written under a temporary name, `state.json` last, and renamed: a folder called ``step_000020`` is
whole. Resuming takes the newest one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STATE = "state.json"


def save_checkpoint(
    root: Path,
    step: int,
    *,
    models: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step_NNNNNN` and delete all but the newest `keep`. Returns the folder."""
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step_{step:06d}"
    partial = root / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, model in models.items():
        save_file(_own_tensors(model.state_dict()), partial / f"{name}.safetensors")
    numbers: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        tensors, numbers[name] = _split_optimizer(optimizer)
        save_file(tensors, partial / f"{name}_optimizer.safetensors")
    save_file(_rng_state(), partial / "rng.safetensors")
    (partial / STATE).write_text(json.dumps({"step": step, "optimizers": numbers, **state}, indent=1))
    _sync(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in sorted(root.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(root: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    whole = [folder for folder in sorted(root.glob("step_*")) if (folder / STATE).is_file()]
    return whole[-1] if whole else None


def load_checkpoint(
    folder: Path, *, models: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, Any]:
    """Restore models, optimisers and random number generators in place; returns the saved `state`."""
    state = json.loads((folder / STATE).read_text())
    for name, model in models.items():
        missing, unexpected = model.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=False)
        if unexpected or set(missing) - _tied_names(model):
            raise ValueError(f"{folder / name}.safetensors does not fit the {name}: {missing + unexpected}")
    for name, optimizer in optimizers.items():
        _join_optimizer(
            optimizer, load_file(folder / f"{name}_optimizer.safetensors"), state["optimizers"][name]
        )
    _restore_rng(load_file(folder / "rng.safetensors"))
    return state


def _own_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each storage once: tied weights are written under their first name."""
    seen: set[int] = set()
    own = {}
    for name, tensor in state.items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        own[name] = tensor.detach().contiguous()
    return own


def _tied_names(model: nn.Module) -> set[str]:
    state = model.state_dict()
    return set(state) - set(_own_tensors(state))


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    saved = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value for index, entry in saved["state"].items() for name, value in entry.items()
    }
    return tensors, saved["param_groups"]


def _join_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _rng_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_rng(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    devices = [states[key] for key in sorted(states) if key.startswith("cuda.")]
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices)


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
