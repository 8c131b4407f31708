"""Reading a run folder: what may be missing, what a resumed run leaves, and how a broken file is reported."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ppo_fast.report import read_run


def test_training_and_evaluations_are_told_apart(make_run: Any) -> None:
    run = read_run(make_run(steps=8))
    assert [entry["step"] for entry in run.training] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [entry["step"] for entry in run.evaluations] == [0, 2, 4, 6, 8]
    assert run.judges == ("eval/vader",)
    assert run.config["objective"]["kl_coef"] == 0.05
    assert len(run.samples) == 12
    assert read_run(run) is run


def test_a_step_written_twice_counts_once_and_the_later_line_wins(make_run: Any) -> None:
    folder = make_run(steps=4, evaluated=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "objective/scores": 99.0}\n')
    run = read_run(folder)
    assert [entry["step"] for entry in run.training] == [1, 2, 3, 4]
    assert run.training[2]["objective/scores"] == 99.0


def test_pairs_match_prompts_between_first_and_last_step_largest_gain_first(make_run: Any) -> None:
    pairs = read_run(make_run(steps=4)).pairs()
    # First prompt: 1.3 - (-0.4) = 1.7; each later one gains 0.09 less.
    assert [round(pair.gain, 2) for pair in pairs] == [1.7, 1.61, 1.52, 1.43, 1.34, 1.25]
    assert (pairs[0].before.step, pairs[0].after.step) == (0, 4)


def test_a_prompt_that_is_there_twice_makes_two_pairs(make_run: Any) -> None:
    folder = make_run(steps=4)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        line["prompt"] = "The same"
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [round(pair.gain, 2) for pair in read_run(folder).pairs()] == [1.7, 1.61, 1.52, 1.43, 1.34, 1.25]


def test_a_torn_last_line_is_left_out(make_run: Any) -> None:
    folder = make_run(steps=2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 3, "objec')
    run = read_run(folder)
    assert [entry["step"] for entry in run.training] == [1, 2]
    assert len(run.samples) == 12


def test_a_pair_without_a_score_comes_last(make_run: Any) -> None:
    folder = make_run(steps=4)
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    lines[1]["score"] = None
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gains = [pair.gain for pair in read_run(folder).pairs()]
    assert math.isnan(gains[-1])
    assert [round(gain, 2) for gain in gains[:-1]] == [1.7, 1.52, 1.43, 1.34, 1.25]


def test_nan_null_and_foreign_fields_are_read(make_run: Any) -> None:
    folder = make_run(steps=1, evaluated=False)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss/policy": NaN, "eval/kl": null, "note": "hello"}\n'
    )
    [entry] = read_run(folder).training
    assert math.isnan(entry["loss/policy"])
    assert set(entry) == {"step", "loss/policy"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 3, "objective/sco', "not JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"objective/kl": 1.0}', "expected a number under 'step', got None"),
        ('{"step": 3, "objective/kl": "high"}', "expected a number under 'objective/kl', got 'high'"),
    ],
)
def test_a_broken_metrics_line_is_named_by_number(make_run: Any, line: str, message: str) -> None:
    folder = make_run(steps=2, evaluated=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + line + "\n")
    # Two good lines, one blank, then the broken one.
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 4: ") as error:
        read_run(folder)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ...}, "a sample needs the key 'prompt'"),
        ({"score": "good"}, "not a sample: could not convert string to float: 'good'"),
        ({"judges": [1]}, "not a sample"),
    ],
)
def test_a_broken_sample_is_named_by_number(make_run: Any, change: dict[str, Any], message: str) -> None:
    folder = make_run(steps=2)
    lines = (folder / "samples.jsonl").read_text().splitlines()
    broken = {key: value for key, value in (json.loads(lines[1]) | change).items() if value is not ...}
    (folder / "samples.jsonl").write_text("\n".join([lines[0], json.dumps(broken), *lines[2:]]))
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 2: ") as error:
        read_run(folder)
    assert message in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run: expected a folder with a metrics\.jsonl, got .*nowhere"):
        read_run(tmp_path / "nowhere")


def test_a_run_without_a_training_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "eval", "step": 0, "eval/score": 1.0}\n')
    with pytest.raises(ValueError, match="at least one training step"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "a: [", "not YAML"),
        ("config.yaml", "- a", "expected a YAML mapping, got list"),
        ("environment.json", "{", "not JSON"),
        ("environment.json", "[]", "expected a JSON object, got list"),
    ],
)
def test_broken_config_and_environment_are_named(
    make_run: Any, file: str, content: str, message: str
) -> None:
    folder = make_run(steps=1)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=f"{file}.*{message}"):
        read_run(folder)
