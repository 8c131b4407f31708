"""The command line: help, overrides, exit codes."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_fast
from ppo_fast import build, reference
from ppo_fast.cli import COMMANDS, as_options, build_parser, main
from ppo_fast.ppo.config import PPOConfig


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)
    assert exit_code([]) == 2


def sections(config: type) -> list[tuple[str, str]]:
    """Dotted option names of a config dataclass with the field's own docstring's first words."""
    names = []
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(field.default_factory):
            nested = field.default_factory
            names += [(f"{field.name}.{inner.name}", "") for inner in dataclasses.fields(nested)]  # type: ignore[arg-type]
        else:
            names.append((field.name, ""))
    return names


@pytest.mark.parametrize("command", ["train", "sft", "reward"])
def test_help_explains_each_option_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code([command, "--help"]) == 0
    shown = capsys.readouterr().out
    blocks = [block for block in shown.replace("\n  --", "\0--").split("\0") if block.startswith("--")]
    options = [block for block in blocks if not block.split()[0].startswith(("--config", "--print"))]
    options = [
        block
        for block in options
        if " CONFIG" not in block.split("\n")[0] and ".help" not in block.split()[0]
    ]
    assert len(options) > 10
    for block in options:
        assert "default:" in block, block
        assert len(block.split("(type:")[0].split()) > 4, block  # more than the option's name: an explanation


def test_every_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(["train", "--help"])
    shown = capsys.readouterr().out
    names = [name for name, _ in sections(PPOConfig)]
    assert len(names) > 50
    assert [name for name in names if f"--{name}" not in shown] == []


def test_overrides_beat_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\nobjective:\n  kl_coef: 0.3\n  lam: 0.9\noptimizer:\n  actor_lr: 2e-6\n")
    arguments = [
        "train",
        "--config",
        str(file),
        "objective.lam=0.8",
        "--local_rank=3",
        "optimizer.critic_lr=1e-5",
    ]
    parsed = build_parser().parse_args(as_options(arguments)).train
    assert (parsed.steps, parsed.objective.kl_coef, parsed.objective.lam) == (7, 0.3, 0.8)
    assert (parsed.objective.gamma, parsed.optimizer.actor_lr, parsed.optimizer.critic_lr) == (
        1.0,
        2e-6,
        1e-5,
    )


def test_rewards_as_a_list_in_yaml_and_on_the_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rewards:\n- {model: rm, weight: 0.5}\n- {function: 'm:f'}\n")
    parser = build_parser()
    two = parser.instantiate(parser.parse_args(["train", "--config", str(file)])).train.rewards
    assert [(source.model, source.function, source.weight) for source in two] == [
        ("rm", None, 0.5),
        (None, "m:f", 1.0),
    ]
    line = as_options(["train", "rewards=[{model: other}]"])
    assert parser.instantiate(parser.parse_args(line)).train.rewards[0].model == "other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "objective.kl_cof=0.1"], "objective.kl_cof"),
        (["train", "objective.kl_coef=much"], "objective.kl_coef"),
        (["train", "objective.reduction=mean"], "objective.reduction"),
        (["train", "objective.gamma=2"], "objective.gamma is 2.0, expected a number in [0, 1]"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "rewards=[{model: a, function: 'b:c'}]"], "exactly one of `model` and `function`"),
        (["train"], "output_dir is not set"),
        (["train", "output_dir=x"], "data.prompts is not set"),
        (["dance"], "dance"),
        (["report", "no/such/run"], "no/such/run"),
    ],
)
def test_bad_input_exits_2_and_names_it(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_in_a_file_exits_2_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 7\nobjektive:\n  kl_coef: 0.3\n")
    assert exit_code(["train", "--config", str(file)]) == 2
    assert "objektive" in capsys.readouterr().err


def test_help_is_quick_and_imports_neither_torch_models_nor_triton() -> None:
    code = (
        "import sys; from ppo_fast.cli import build_parser; build_parser();"
        "print([name for name in ('transformers', 'triton', 'deepspeed', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_doctor_says_what_runs_here_and_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["doctor"]) == 0
    shown = capsys.readouterr().out
    for op in reference.__all__:
        (row,) = (line for line in shown.splitlines() if line.split()[0:1] == [op])
        cells = dict(zip(["reference", "cpu", "triton", "cuda"], row.split()[1:], strict=True))
        taken = [name for name, cell in cells.items() if cell == "auto"]
        assert taken == [ppo_fast.available_impls(op)[0]]
        asked = {name for name, cell in cells.items() if cell in ("auto", "yes")}
        assert asked == set(ppo_fast.available_impls(op))
    notes = {cell for line in shown.splitlines() for cell in line.split() if re.fullmatch(r"\(\d+\)", cell)}
    assert all(f"\n{note} " in shown for note in notes)
    assert build.build_info()["compiler"] in shown


def test_doctor_needs_no_extra_and_the_rest_says_which() -> None:
    """In a fresh process, where what the `train` extra brings cannot be imported."""
    block = "import sys; sys.modules['jsonargparse'] = None; from ppo_fast.cli import main; sys.exit(main())"
    doctor, train = (
        subprocess.run([sys.executable, "-c", block, name], capture_output=True, text=True)
        for name in ("doctor", "train")
    )
    assert doctor.returncode == 0, doctor.stderr
    assert "native extension:" in doctor.stdout
    assert train.returncode == 2
    assert "pip install ppo-fast[train]" in train.stderr
