"""Prompt files broken in more than twenty ways, through the command itself: one clear line, and no run folder."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ppo_fast.cli import main
from ppo_fast.ppo import PPOConfig
from ppo_fast.ppo.config import DataConfig

GOOD = b'{"prompt": "the film"}\n'
# Name of the file, its bytes, what is said about it.
BROKEN: list[tuple[str, str, bytes, str]] = [
    ("empty", "p.jsonl", b"", "holds no rows"),
    ("blank lines", "p.jsonl", b"\n  \n\t\n", "holds no rows"),
    ("latin-1", "p.jsonl", '{"prompt": "café"}\n'.encode("latin-1"), "line 1: not UTF-8"),
    ("utf-16", "p.jsonl", '{"prompt": "the film"}\n'.encode("utf-16"), "line 1: not UTF-8"),
    ("compressed", "p.jsonl", gzip.compress(GOOD), "line 1: not UTF-8"),
    ("cut off", "p.jsonl", GOOD + GOOD[:14], "line 2: not JSON"),
    ("byte order mark in the midst", "p.jsonl", GOOD + b"\xef\xbb\xbf" + GOOD, "line 2: not JSON"),
    ("one JSON list", "p.jsonl", b'[{"prompt": "the film"}]\n', "line 1: list .*, expected a JSON object"),
    ("a number", "p.jsonl", b"5\n", "line 1: int 5, expected a JSON object"),
    ("pretty-printed", "p.jsonl", b'{\n  "prompt": "the film"\n}\n', "line 1: not JSON"),
    ("trailing comma", "p.jsonl", b'{"prompt": "the film",}\n', "line 1: not JSON"),
    ("single quotes", "p.jsonl", b"{'prompt': 'the film'}\n", "line 1: not JSON"),
    ("another key", "p.jsonl", b'{"text": "the film"}\n', r"line 1: has keys \{text\}, expected \{prompt\}"),
    ("key twice", "p.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "line 1: has the key 'prompt' twice"),
    ("null", "p.jsonl", b'{"prompt": null}\n', "line 1: has keys"),
    ("prompt of another type", "p.jsonl", b'{"prompt": ["the", "film"]}\n', "record 1 has the prompt .'the'"),
    ("blank prompt", "p.jsonl", GOOD + b'{"prompt": " "}\n', "record 2 has the prompt ' '"),
    ("raw NUL", "p.jsonl", b'{"prompt": "the\0film"}\n', "line 1: not JSON"),
    (
        "escaped NUL",
        "p.jsonl",
        b'{"prompt": "the \\u0000 film"}\n',
        "record 1 has a NUL character at place 4",
    ),
    ("lone surrogate", "p.jsonl", b'{"prompt": "\\ud800"}\n', "record 1 has half of a surrogate pair"),
    ("zeros", "p.jsonl", b"\0" * 5000, "line 1: not JSON"),
    ("nested too deep", "p.jsonl", b'{"prompt": ' + b"[" * 200_000 + b"}\n", "line 1: nested too deep"),
    ("huge number", "p.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "line 1: .*digits"),
    ("huge line", "p.jsonl", b'{"prompt": "' + b"the " * 500_000 + b'"}\n', "record 1 has 500000 tokens"),
    ("messages that are text", "p.jsonl", b'{"messages": "hello"}\n', "no chat template"),
    ("csv without the column", "p.csv", b"text\nthe film\n", r"line 2: has keys \{text\}, expected"),
    ("csv with a column twice", "p.csv", b"prompt,prompt\na,b\n", "line 1: has the column 'prompt' twice"),
    ("csv of a header alone", "p.csv", b"prompt\n", "holds no rows"),
    ("csv not UTF-8", "p.csv", b"prompt\ncaf\xe9\n", "not UTF-8"),
    ("csv with a NUL", "p.csv", b"prompt\nthe \0 film\n", "NUL"),
    ("csv with a quote that never ends", "p.csv", b'prompt\n"' + b"the " * 50_000, "not csv .field larger"),
    ("csv with a row too short", "p.csv", b"id,prompt\n1\n", "line 2: has keys"),
]


@pytest.fixture
def command(settings: Callable[..., PPOConfig], tmp_path: Path) -> Callable[[str], list[str]]:
    """`ppo-fast train` on a prompts file, everything else in order."""

    def make(prompts: str) -> list[str]:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(settings(data=DataConfig(prompts=prompts)).to_dict()))
        return ["train", "--config", str(file)]

    return make


def check_refused(told: str, path: Path, run: Path) -> None:
    assert told.startswith("ppo-fast train: ")
    assert told.count("\n") == 1
    assert "Traceback" not in told
    assert str(path) in told or "data.prompts" in told
    assert not run.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_broken_prompt_files(
    command: Callable[[str], list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    message: str,
) -> None:
    import re

    path = tmp_path / name
    path.write_bytes(content)
    assert main(command(str(path))) == 2
    told = capfd.readouterr().err
    check_refused(told, path, tmp_path / "run")
    assert re.search(re.escape(str(path)) + r": .*" + message, told) or re.search(message, told), told


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder, expected a file"),
        (lambda path: os.mkfifo(path), "is no regular file"),
        (lambda path: path.symlink_to(path.with_name("gone")), "no such file"),
        (lambda path: path.symlink_to(path), "no such file|[Tt]oo many levels"),
    ],
    ids=["missing", "folder", "pipe", "dangling link", "link to itself"],
)
def test_paths_that_are_no_prompt_file(
    command: Callable[[str], list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    message: str,
) -> None:
    import re

    path = tmp_path / "prompts.jsonl"
    path.unlink()  # the good one of the fixture
    arguments = command(str(path))
    make(path)
    assert main(arguments) == 2
    told = capfd.readouterr().err
    check_refused(told, path, tmp_path / "run")
    assert re.search(message, told)


def test_a_broken_file_does_not_touch_a_run_that_is_there(
    command: Callable[[str], list[str]], settings: Callable[..., PPOConfig], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD)
    arguments = [*command(str(path)), "resume=auto", "steps=1"]
    assert main(arguments) == 0
    (tmp_path / "run" / "finished.json").unlink()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    path.write_bytes(GOOD[:9])
    assert main(arguments) == 2
    after = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert after == before


def test_a_byte_order_mark_at_the_start_is_no_fault(
    command: Callable[[str], list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "the film"}).encode() + b"\r\n")
    assert main([*command(str(path)), "steps=1"]) == 0
