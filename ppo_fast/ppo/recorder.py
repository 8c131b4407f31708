"""What a run leaves behind while it goes: metrics.jsonl, samples.jsonl, tensorboard, config.yaml."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from ppo_fast.ppo.config import differing_settings
from ppo_fast.prepare.folders import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
CONFIG = "config.yaml"


class Recorder:
    """Appends one JSON object a step and one a sample; a line is on disk before the next step begins."""

    def __init__(self, folder: Path, *, tensorboard: bool, first_step: int) -> None:
        self.folder = folder
        self.writer = _tensorboard(folder / "tensorboard", first_step) if tensorboard else None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()

    def metrics(self, record: dict[str, Any]) -> None:
        """Write one step's (or evaluation's) numbers; `step` is their place on every axis.

        A number that is not finite becomes null, as JSON has no other word for it.
        """
        record = {name: None if _not_finite(value) else value for name, value in record.items()}
        _append(self.folder / METRICS, [record])
        if self.writer is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.writer.add_scalar(name, value, record["step"])

    def samples(self, records: list[dict[str, Any]]) -> None:
        """Write the samples of one evaluation."""
        _append(self.folder / SAMPLES, records)


def check_folder(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Check that a run may write to `folder`; nothing is written here.

    Raises ValueError where the folder holds files already and `resume` is False, or where it holds a run of another
    config.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is a file, expected a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    saved = folder / CONFIG
    if not resume:
        raise ValueError(f"output_dir {str(folder)!r} is not empty, expected a new folder or resume=auto")
    if not saved.is_file():
        raise ValueError(f"output_dir {str(folder)!r} holds files but no {CONFIG}: not a run to resume")
    _check_same_config(_saved_config(saved), config, saved)


def open_folder(folder: Path, config: dict[str, Any]) -> None:
    """Make the run folder and write its config.yaml, unless a run that is resumed has done so."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).is_file():
        write_whole(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))


def drop_after(folder: Path, step: int, *, evaluated: bool = True) -> None:
    """Forget records later than `step`, and a line torn by a kill: what a resumed run will do again.

    With `evaluated` False the evaluation after `step` goes, too: the run was stopped in the midst of it.
    """
    for name in (METRICS, SAMPLES):
        path = folder / name
        if path.is_file():
            last_evaluation = step if evaluated else step - 1
            whole = path.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]
            records = [(line, _record(path, number, line)) for number, line in enumerate(whole, start=1)]
            kept = [
                line
                for line, record in records
                if record["step"] <= (last_evaluation if name == SAMPLES or "event" in record else step)
            ]
            write_whole(path, "".join(line + "\n" for line in kept))


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {number}: not JSON ({error.msg}), expected a record of a run"
        ) from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{path}: line {number}: no record of a run: {line[:80]!r}")
    return record


def _saved_config(path: Path) -> dict[str, Any]:
    try:
        saved = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({error}), expected a run's settings") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds no settings, expected those of a run")
    return saved


def _check_same_config(saved: dict[str, Any], config: dict[str, Any], path: Path) -> None:
    differing = [name for name in differing_settings(saved, config) if name not in ("output_dir", "resume")]
    if differing:
        raise ValueError(
            f"{path} belongs to a run with other settings ({', '.join(differing)}), "
            "expected the same settings to resume, or another output_dir"
        )


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    try:
        with path.open("a") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(error.errno, f"{path}: could not be written ({error.strerror})") from error


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run drew past its checkpoint is taken back, as in metrics.jsonl.
    return SummaryWriter(log_dir=str(folder), purge_step=first_step)
