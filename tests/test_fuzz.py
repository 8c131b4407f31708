"""Whatever is typed or written into a config file: exit code 0 or 2, one line that says why, and no folder touched."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ppo_fast import cli
from ppo_fast.ppo.config import PPOConfig

SECTIONS = {
    field.name: [inner.name for inner in fields(field.default_factory)]
    for field in fields(PPOConfig)
    if is_dataclass(field.default_factory)
}
NAMES = [field.name for field in fields(PPOConfig)]
NAMES += [f"{section}.{name}" for section, names in SECTIONS.items() for name in names]

# Twenty thousand digits of a number and four hundred levels of brackets are what people do not type but files hold.
WORDS = [
    "",
    "null",
    "true",
    "1e400",
    "nan",
    "-inf",
    "-1",
    "0",
    "3",
    "0.5",
    "[]",
    "{}",
    "[1",
    "{a: 1}",
    "auto",
    "9" * 20000,
]
WORDS += [
    "\0",
    "\ufeff",
    "\udce4",
    "é",
    "x" * 5000,
    "[" * 400,
    "!!python/object:os.system {}",
    "&a [*a]",
    "- 1",
    "a: b",
]
words = st.sampled_from(WORDS) | st.text(max_size=8)
overrides = st.builds("{}={}".format, st.sampled_from(NAMES) | st.text(max_size=8), words)
flags = st.sampled_from(
    [
        "--config",
        "--help",
        "--version",
        "--local_rank=1",
        "--local_rank",
        "--print_config",
        "--",
        "-x",
        "=",
        "--=",
    ]
)
arguments = st.lists(overrides | flags | words, max_size=6)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(scalars, below, max_size=3)
)
sections = st.sampled_from(sorted(SECTIONS)).flatmap(
    lambda name: st.tuples(
        st.just(name), trees | st.dictionaries(st.sampled_from(SECTIONS[name]), scalars | trees, max_size=4)
    )
)
configs = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), trees, max_size=3) | st.lists(
    sections, max_size=4
).map(dict)


def run(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a command that runs in `folder`."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(command)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.chdir(before)
    return code, err.getvalue()


def check(code: int, told: str, folder: Path, held: Sequence[str]) -> None:
    assert code in (0, 2)
    assert "Traceback" not in told
    if code == 2 and told:
        assert told.startswith("ppo-fast")
        assert told.count("\n") == 1
        assert len(told) < 800
    assert sorted(path.name for path in folder.iterdir()) == sorted(held)


# Each builds a parser anew, which takes longer than all the rest of it; more of them with PPO_FAST_FUZZ=1000.
quick = settings(
    max_examples=int(os.environ.get("PPO_FAST_FUZZ", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@quick
@given(command=st.sampled_from(sorted(cli.COMMANDS)) | words, rest=arguments)
@example(command="train", rest=["models=null"])
@example(command="train", rest=["objective.=3"])
@example(command="train", rest=["output_dir=\0", "data.prompts=x", "rewards=[{model: a}]"])
@example(command="train", rest=["rewards=[1]"])
@example(command="--local_rank", rest=["2"])
def test_command_lines(command: str, rest: list[str]) -> None:
    if cli.as_options([command, *rest]) == ["doctor"]:
        return  # the one that does its work
    with tempfile.TemporaryDirectory() as folder:
        code, told = run([command, *rest], Path(folder))
        check(code, told, Path(folder), [])
        helped = {"--help", "--version", "--print_config", "-h"} & {command, *rest} or any(
            argument.startswith(("--print_config=", "--help=")) for argument in rest
        )
        assert code == 2 or helped


@quick
@given(config=configs, command=st.sampled_from(["train", "sft", "reward"]))
@example(config={"objective": None}, command="train")
@example(config={"rollout": 5}, command="train")
@example(config={"rewards": [1]}, command="train")
@example(config={"models": {"actor": None}}, command="train")
def test_config_files(config: Any, command: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = yaml.safe_dump(config, allow_unicode=False)
        (Path(folder) / "run.yaml").write_text(text)
        code, told = run([command, "--config", "run.yaml"], Path(folder))
        assert code == 2
        check(code, told, Path(folder), ["run.yaml"])
        assert told


@quick
@given(data=st.data())
def test_config_files_with_bytes_changed(data: st.DataObject) -> None:
    """A good file with some bytes overwritten, cut or doubled."""
    good = yaml.safe_dump(
        {"output_dir": "run", "steps": 3, "objective": {"kl_coef": 0.1}, "rewards": [{"model": "rm"}]}
    )
    content = bytearray(good.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        content = content or bytearray(b"\0")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "run.yaml").write_bytes(bytes(content))
        code, told = run(["train", "--config", "run.yaml"], Path(folder))
        assert code == 2
        check(code, told, Path(folder), ["run.yaml"])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff\xfes\0t\0", "run.yaml: not UTF-8"),
        (b"", "run.yaml: holds no settings"),
        (b"- a\n", "run.yaml: holds no settings"),
        (b"steps: 1\nsteps: 2\n", "run.yaml: line 2: 'steps' is set twice"),
        (b"objective: {lam: 1, lam: 0.5}\n", "run.yaml: line 1: 'lam' is set twice"),
        (b"objective: null\nsteps: 3\n", "objective is None, expected a section of settings"),
        (b"steps:\nseed: 3\n", "steps is not set to anything"),
        (b"optimizer: {eps: }\n", "optimizer.eps is not set to anything"),
        (b"steps: [" + b"[" * 3000, "run.yaml: nested too deep"),
        (b"steps: {", "run.yaml: not YAML"),
        (b"objective: {kl_cof: 0.1}\n", "kl_cof"),
    ],
)
def test_config_files_that_say_what_is_wrong(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    code, errors = run(["train", "--config", "run.yaml"], tmp_path)
    assert code == 2
    assert told in errors
    check(code, errors, tmp_path, ["run.yaml"])
