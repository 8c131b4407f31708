"""Resumable state in folders that are whole or not there: safetensors for tensors, JSON for numbers, nothing pickled.

    checkpoints/
      latest                        name of the newest checkpoint; replaced last
      step_000020/                  the state after step 20; step_000020_update_0003 in the midst of step 21
        manifest.json               size and sha256 of every other file, and the settings of the run
        state.json                  numbers that are one for all ranks: schedules, optimiser settings
        actor.safetensors ...       tensors that are one for all ranks
        rank_0000/state.json        numbers of that rank: data position, KL coefficient, ...
        rank_0000/rng.safetensors   tensors of that rank: generators, shards of an optimiser, a step begun

A checkpoint is written under a temporary name, each file and folder forced to the disk, and renamed; then `latest`
moves. Loading verifies every file first. All ranks share one folder; each writes its own files, the first the rest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ppo_fast.ppo.config import differing_settings
from ppo_fast.ppo.ranks import Ranks
from ppo_fast.ppo.state import Part, State
from ppo_fast.report import describe_environment

FORMAT = 2
LATEST, MANIFEST, NUMBERS = "latest", "manifest.json", "state.json"
RANK_FILES = "files.json"
NAME = re.compile(r"step_(\d{6,})(?:_update_(\d{4,}))?")
MAY_DIFFER = ("output_dir", "resume")
"""Settings that a resumed run may change: a run folder can be moved."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used: the message names the file, and the checkpoint to take instead."""


@dataclass(frozen=True, order=True)
class Position:
    """Where a run stands: complete PPO steps, and updates done of the next one."""

    step: int
    update: int = 0

    @property
    def name(self) -> str:
        """Name of the checkpoint's folder."""
        return f"step_{self.step:06d}" + (f"_update_{self.update:04d}" if self.update else "")

    @classmethod
    def of(cls, name: str) -> Position | None:
        """The position that a folder's name says, or None for another name."""
        found = NAME.fullmatch(name)
        return cls(int(found[1]), int(found[2] or 0)) if found else None


class Checkpoints:
    """The checkpoints of one run: `save`, `find` and `load`. Every rank of the run makes the same calls.

    Args:
        root: the folder that holds them.
        config: the run's settings as a nested dict; a checkpoint of other settings is refused.
        keep: newest checkpoints that are kept.
        ranks: the processes of the run. None: as torch.distributed says.
    """

    def __init__(self, root: Path, *, config: dict[str, Any], keep: int, ranks: Ranks | None = None) -> None:
        self.root = root
        # Through JSON, as it comes back from a manifest.
        self.config = {
            name: value for name, value in json.loads(json.dumps(config)).items() if name not in MAY_DIFFER
        }
        self.keep = keep
        self.ranks = ranks or Ranks()
        self._held: Position | None = None

    def save(self, position: Position, parts: Sequence[Part]) -> Path:
        """Write the state of `parts` at `position`, move `latest`, delete what is older than the `keep` newest.

        Returns the folder. A position that this object has just saved or loaded is not written again.

        Raises OSError where a file cannot be written, on every rank: what was begun is taken away, `latest` and the
        checkpoint it names stay as they were.
        """
        target = self.root / position.name
        if position == self._held:
            return target
        partial = self.root / f".{target.name}.partial"
        self._together(partial, lambda: self._clear(partial), first_only=True)
        self._together(partial, lambda: self._write(partial, parts))
        self._together(partial, lambda: self._publish(partial, target, position), first_only=True)
        self._held = position
        return target

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `resume` asks for: the newest (`auto`) or one by its path; None (`never`) for none.

        Raises CheckpointError where `latest` names no checkpoint, or the path is none of this run's.
        """
        if resume == "never":
            return None
        if resume != "auto":
            folder = Path(resume).expanduser()
            if folder.resolve().parent != self.root.resolve() or Position.of(folder.resolve().name) is None:
                raise CheckpointError(
                    f"resume is {resume!r}, expected `never`, `auto` or a checkpoint in {str(self.root)!r}"
                )
            if not folder.is_dir():
                raise CheckpointError(f"resume is {resume!r}: there is no such folder{self._offer(None)}")
            return self.root / folder.resolve().name
        latest = self.root / LATEST
        if not latest.is_file():
            return max(self._folders(), key=_position, default=None)
        name = latest.read_bytes().decode("utf-8", errors="replace").strip()
        if Position.of(name) is None or not (self.root / name).is_dir():
            raise CheckpointError(f"{latest} names {name[:80]!r}, which is no checkpoint{self._offer(None)}")
        return self.root / name

    def load(self, folder: Path, parts: Sequence[Part]) -> list[str]:
        """Verify a checkpoint, restore `parts` from it and make it the latest.

        Returns what the reader should know, a sentence each: where it was written by other versions, or on another
        number of threads, the run goes on but not to the same bits.

        Raises CheckpointError, before anything is restored, where a file is missing or torn, and where the checkpoint
        is of other settings or another number of ranks.
        """
        refusal, manifest = None, {}
        try:
            manifest = self._verified(folder)
        except CheckpointError as error:
            refusal = f"{error}{self._offer(_position(folder))}"
        if not self.ranks.all(refusal is None):
            raise CheckpointError(refusal or f"{folder}: another rank cannot use its part of it")
        saved = _SavedFolder(folder, self.ranks.index)
        for part in parts:
            try:
                part.load_state(saved)
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{folder}: {error}") from error
        self._together(folder, lambda: _replace_text(self.root / LATEST, folder.name), first_only=True)
        self._held = _position(folder)
        return [
            f"{name} was {value!r} when {folder.name} was written and is {_made_with().get(name)!r}: "
            "the run goes on, not to the same last bits"
            for name, value in manifest["made_with"].items()
            if _made_with().get(name) != value
        ]

    def _clear(self, partial: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def _write(self, partial: Path, parts: Sequence[Part]) -> None:
        """This rank's files, and on the first rank the shared ones."""
        shared = _Writer(partial)
        own = _Writer(partial, f"rank_{self.ranks.index:04d}")
        error: Exception | None = None
        for part in parts:
            # Gathering is for all ranks together: a rank whose disk is full goes on with the others to the end.
            for writer, states in ((shared, part.shared_state()), (own, part.own_state())):
                if error is None and (writer is own or self.ranks.first):
                    try:
                        writer.add(states)
                    except (OSError, SafetensorError) as caught:
                        error = caught
        if error is not None:
            raise error
        own.finish()
        files = own.files
        if self.ranks.first:
            shared.finish()
            files |= shared.files
        _write_text(own.folder / RANK_FILES, json.dumps(files))

    def _publish(self, partial: Path, target: Path, position: Position) -> None:
        files: dict[str, Any] = {}
        for own in sorted(partial.glob("rank_*")):
            files |= json.loads((own / RANK_FILES).read_text())
            (own / RANK_FILES).unlink()
            _sync(own)
        manifest = {
            "format": FORMAT,
            "step": position.step,
            "update": position.update,
            "ranks": self.ranks.count,
            "config_sha256": _config_digest(self.config),
            "config": self.config,
            "made_with": _made_with(),
            "files": files,
        }
        _write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        _sync(partial)
        # What stands there is of a future that was given up by resuming before it: never the one `latest` names.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        _sync(self.root)
        _replace_text(self.root / LATEST, target.name)
        past = sorted((folder for folder in self._folders() if _position(folder) <= position), key=_position)
        for folder in set(self._folders()) - set(past[-self.keep :]):
            shutil.rmtree(folder, ignore_errors=True)
        for leftover in self.root.glob(".*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _together(self, partial: Path, action: Callable[[], None], *, first_only: bool = False) -> None:
        """Do it on every rank (or the first); where one fails to write, all raise and the begun folder goes."""
        error: Exception | None = None
        if self.ranks.first or not first_only:
            try:
                action()
            except (OSError, SafetensorError) as caught:
                error = caught
        if self.ranks.all(error is None):
            return
        if self.ranks.first and partial.name.startswith("."):
            shutil.rmtree(partial, ignore_errors=True)
        raise _not_written(self.root, error) from error

    def _verified(self, folder: Path) -> dict[str, Any]:
        """The manifest of a checkpoint of this run whose shared files and this rank's own are whole.

        CheckpointError otherwise.
        """
        path = folder / MANIFEST
        manifest = _read_manifest(path)
        if manifest["ranks"] != self.ranks.count:
            raise CheckpointError(
                f"{path}: written by {manifest['ranks']} ranks, expected {self.ranks.count}, as many as run now"
            )
        differing = differing_settings(manifest["config"], self.config)
        if differing or manifest["config_sha256"] != _config_digest(self.config):
            raise CheckpointError(
                f"{path}: of a run with other settings ({', '.join(differing) or 'config_sha256'})"
            )
        own = f"rank_{self.ranks.index:04d}/"
        for name, entry in manifest["files"].items():
            file = folder / name
            if name.startswith("rank_") and not name.startswith(own):
                continue
            if not file.is_file():
                raise CheckpointError(f"{file}: is missing, the checkpoint is not whole")
            if file.stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{file}: has {file.stat().st_size} bytes, expected {entry['bytes']}: the checkpoint is torn"
                )
            if _sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{file}: its sha256 is not the manifest's: the checkpoint is damaged")
        return manifest

    def _offer(self, position: Position | None) -> str:
        """In words: the newest whole checkpoint before `position` (or of all), and how to take it."""
        older = [folder for folder in self._folders() if position is None or _position(folder) < position]
        for folder in sorted(older, key=_position, reverse=True):
            try:
                self._verified(folder)
            except CheckpointError:
                continue
            return f". The one before it, {folder.name}, is whole: resume={folder} goes on from there"
        return ". No other checkpoint of this run is whole: start again in another output_dir"

    def _folders(self) -> list[Path]:
        return [path for path in self.root.glob("step_*") if Position.of(path.name) and path.is_dir()]


class _Writer:
    """Writes states below one folder and remembers size and hash of every file."""

    def __init__(self, root: Path, below: str = "") -> None:
        self.root = root
        self.folder = root / below
        self.files: dict[str, dict[str, Any]] = {}
        self.numbers: dict[str, Any] = {}

    def add(self, states: dict[str, State]) -> None:
        self.folder.mkdir(exist_ok=True)
        for name, state in states.items():
            self.numbers[name] = state.numbers
            if state.tensors:
                path = self.folder / f"{name}.safetensors"
                save_file(state.tensors, path)
                self._note(path)

    def finish(self) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / NUMBERS
        _write_text(path, json.dumps(self.numbers, indent=1))
        self._note(path)
        _sync(self.folder)

    def _note(self, path: Path) -> None:
        _sync(path)
        entry = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        self.files[str(path.relative_to(self.root))] = entry


class _SavedFolder:
    """A verified checkpoint, read a file at a time."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.rank = rank

    def shared(self, name: str) -> State:
        return _read_state(self.folder, name)

    def own(self, name: str) -> State:
        return _read_state(self.folder / f"rank_{self.rank:04d}", name)


def _read_state(folder: Path, name: str) -> State:
    numbers = json.loads((folder / NUMBERS).read_text())
    if name not in numbers:
        raise CheckpointError(f"{folder / NUMBERS}: holds nothing under {name!r}")
    path = folder / f"{name}.safetensors"
    # Copies: what load_file maps would read the file, as it is then, for as long as the run lasts.
    tensors = {key: value.clone() for key, value in load_file(path).items()} if path.is_file() else {}
    return State(tensors, numbers[name])


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing, the checkpoint is not whole") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON, the checkpoint is torn ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{path}: has format {found!r}, this version reads format {FORMAT}")
    kinds = {"ranks": int, "config": dict, "config_sha256": str, "made_with": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise CheckpointError(f"{path}: has no {name!r}, the checkpoint is damaged")
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or {"bytes", "sha256"} - set(entry):
            raise CheckpointError(f"{path}: says nothing of {name!r}, the checkpoint is damaged")
    return manifest


def _position(folder: Path) -> Position:
    position = Position.of(folder.name)
    assert position is not None  # folders are listed by their names
    return position


def _config_digest(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _made_with() -> dict[str, str]:
    """What the last bits of a sum depend on: versions, device, threads, vector instructions."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {**describe_environment(), "threads": str(torch.get_num_threads()), "cpu": capability}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    _write_text(partial, text + "\n")
    partial.replace(path)
    _sync(path.parent)


def _not_written(root: Path, error: Exception | None) -> OSError:
    """What every rank raises where a save failed, with the system's error number where there is one."""
    if error is None:
        return OSError(f"{root}: the checkpoint was not written: another rank could not write its files")
    latest = root / LATEST
    before = f"{latest.read_text().strip()} is whole" if latest.is_file() else "there was none before it"
    cause = "the disk is full" if _is_disk_full(error) else "a file could not be written"
    number = getattr(error, "errno", None) or (errno.ENOSPC if _is_disk_full(error) else errno.EIO)
    return OSError(number, f"{root}: the checkpoint was not written, {cause}; {before} ({error})")


def _is_disk_full(error: Exception) -> bool:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors puts the system's error into words.
    return any(f"os error {number}" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
