"""Read a run folder: metrics.jsonl, samples.jsonl, config.yaml and environment.json as one frozen record."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ppo_fast.report.glossary import GLOSSARY, is_judge

Metrics = Mapping[str, float]
"""One line of metrics.jsonl: metric name -> number; `null` values and other people's text fields are left
out.
"""


@dataclass(frozen=True)
class Sample:
    """One response to a held-out prompt: `kl` in nats over the sequence, `length` in tokens."""

    step: int
    prompt: str
    response: str
    score: float
    kl: float
    length: int
    eos: bool
    judges: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplePair:
    """The same held-out prompt answered at the first and at the last sampled step."""

    before: Sample
    after: Sample

    @property
    def gain(self) -> float:
        """Score after minus score before."""
        return self.after.score - self.before.score


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it; `training` and `evaluations` are sorted by step, one entry a step."""

    path: Path
    training: tuple[Metrics, ...]
    evaluations: tuple[Metrics, ...]
    samples: tuple[Sample, ...]
    config: Mapping[str, Any]
    environment: Mapping[str, str]

    @property
    def metrics(self) -> tuple[Metrics, ...]:
        """Training steps and evaluations together."""
        return self.training + self.evaluations

    @property
    def judges(self) -> tuple[str, ...]:
        """Metric names of the outside judges that an evaluation reports, such as `eval/vader`."""
        return tuple(dict.fromkeys(key for entry in self.evaluations for key in entry if is_judge(key)))

    def pairs(self) -> list[SamplePair]:
        """First and last answers to each held-out prompt, largest gain in score first; none with one step."""
        steps = sorted({sample.step for sample in self.samples})
        if len(steps) < 2:
            return []
        first, last = self._by_prompt(steps[0]), self._by_prompt(steps[-1])
        found = [SamplePair(first[key], last[key]) for key in first if key in last]
        # NaN compares false with everything and would scramble the order: such pairs go last.
        return sorted(found, key=lambda pair: math.inf if math.isnan(pair.gain) else -pair.gain)

    def _by_prompt(self, step: int) -> dict[tuple[str, int], Sample]:
        """The samples of a step by prompt and, for a prompt that is there several times, its occurrence."""
        seen: Counter[str] = Counter()
        found = {}
        for sample in self.samples:
            if sample.step == step:
                found[sample.prompt, seen[sample.prompt]] = sample
                seen[sample.prompt] += 1
        return found


def read_run(run: str | Path | RunRecord) -> RunRecord:
    """Read the folder of a run.

    `metrics.jsonl` must be there with at least one training step; `samples.jsonl`, `config.yaml` and
    `environment.json` may be missing. Of two lines for one step the later counts. A last line that breaks off
    without its newline was torn by a kill, or is being written: it is left out.

    Raises ValueError naming file and line for anything that cannot be read. A RunRecord is returned as it
    is.
    """
    if isinstance(run, RunRecord):
        return run
    path = Path(run)
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"run: expected a folder with a metrics.jsonl, got {str(path)!r}, which has none")
    training, evaluations = _read_metrics(path / "metrics.jsonl")
    return RunRecord(
        path=path,
        training=training,
        evaluations=evaluations,
        samples=_read_samples(path / "samples.jsonl"),
        config=_read_config(path / "config.yaml"),
        environment=_read_environment(path / "environment.json"),
    )


def _read_metrics(file: Path) -> tuple[tuple[Metrics, ...], tuple[Metrics, ...]]:
    by_step: dict[str, dict[int, Metrics]] = {"train": {}, "eval": {}}
    for place, entry in _json_lines(file):
        kind = "eval" if entry.get("event") == "eval" else "train"
        numbers = _numbers(entry, place)
        if "step" not in numbers:
            raise ValueError(f"{place}: expected a number under 'step', got {entry.get('step')!r}")
        by_step[kind][int(numbers["step"])] = numbers
    if not by_step["train"]:
        raise ValueError(f"{file}: expected at least one training step, got none")
    training, evaluations = (tuple(steps[step] for step in sorted(steps)) for steps in by_step.values())
    return training, evaluations


def _numbers(entry: Mapping[str, Any], place: str) -> Metrics:
    numbers = {}
    for key, value in entry.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            numbers[key] = float(value)
        elif key in GLOSSARY and key != "event" and value is not None:
            raise ValueError(f"{place}: expected a number under {key!r}, got {value!r}")
    return numbers


def _read_samples(file: Path) -> tuple[Sample, ...]:
    if not file.is_file():
        return ()
    samples = []
    for place, entry in _json_lines(file):
        try:
            samples.append(_sample(entry))
        except KeyError as error:
            raise ValueError(f"{place}: a sample needs the key {error}, got {sorted(entry)}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{place}: not a sample: {error}") from error
    return tuple(samples)


def _sample(entry: Mapping[str, Any]) -> Sample:
    return Sample(
        step=int(entry["step"]),
        prompt=str(entry["prompt"]),
        response=str(entry["response"]),
        score=_number_or_nan(entry["score"]),
        kl=_number_or_nan(entry.get("kl")),
        length=int(entry["length"]),
        eos=bool(entry["eos"]),
        judges={str(name): _number_or_nan(value) for name, value in entry.get("judges", {}).items()},
    )


def _number_or_nan(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of a jsonl file with its place in words, `file, line n`; no blank lines, no torn last one."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    return
                raise ValueError(f"{place}: not JSON ({error.msg}): {line.strip()[:80]!r}") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{place}: expected a JSON object, got {line.strip()[:80]!r}")
            yield place, entry


def _read_config(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a YAML mapping, got {type(config).__name__}")
    return config


def _read_environment(file: Path) -> Mapping[str, str]:
    if not file.is_file():
        return {}
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(entries).__name__}")
    return {str(key): str(value) for key, value in entries.items()}
