"""The command line: `ppo-fast train`, `ppo-fast reward`, `ppo-fast sft`, `ppo-fast report`, `ppo-fast doctor`.

Settings are the fields of the config dataclasses. A YAML file gives some, `section.field=value` arguments override
them, and what neither names has its default. Exit codes: 0 done, 1 another process of the run was lost, 2 bad input
(one line on stderr says what).
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast, get_args, get_type_hints

if TYPE_CHECKING:
    import jsonargparse
    import yaml

LONGEST = 600
"""Characters of an error: the parser likes to list every option there is."""
COMMANDS = {
    "train": "tune a language model with PPO against a reward",
    "reward": "train a reward model on pairs (Bradley-Terry) or on scored texts (regression)",
    "sft": "fine-tune a language model on texts or on prompts with responses",
    "report": "draw the curves and write report.html of a run folder again",
    "doctor": "say what is built and installed here, and which implementation each op takes, and why",
}
LOCAL_RANK = re.compile(r"--local[_-]rank(=\d+)?")
OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, or exits with 2 where the arguments do not parse."""
    arguments = as_options(sys.argv[1:] if argv is None else argv)
    if arguments == ["doctor"]:  # asked where something is missing: it needs none of the extras
        run_command("doctor", {})
        return 0
    try:
        parser = build_parser()
    except ModuleNotFoundError as error:
        return _refuse("", f"{error}; `pip install ppo-fast[train]` brings what the command line needs")
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    try:
        for path in config_files(arguments):
            check_config_file(path)
        parsed = parser.parse_args(arguments)
        if parsed.subcommand is None:
            parser.print_help()
            return 2
        if command not in ("report", "doctor"):
            check_settings(_config_class(command), parsed[command])
        run_command(command, vars(parser.instantiate(parsed)[command]))
    except KeyboardInterrupt:
        _refuse(command, "interrupted; resume=auto goes on from the last checkpoint, if there is one")
        return 130
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, MemoryError) as error:
        return _refuse(command, str(error) or type(error).__name__)
    except RuntimeError as error:
        # LostRankError of ppo_fast.ppo.parallel, which is imported where it is used.
        if type(error).__name__ != "LostRankError":
            raise
        return _refuse(command, str(error), code=1)
    return 0


def config_files(arguments: Sequence[str]) -> list[Path]:
    """The files that `--config` names."""
    following = [value for name, value in pairwise(arguments) if name == "--config"]
    joined = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("--config=")]
    return [Path(value) for value in following + joined if "\0" not in value]


def check_config_file(path: Path) -> None:
    """Check what the parser would trip over or pass over: other bytes than UTF-8, and a key given twice.

    Raises ValueError naming file and place. A file that is not there, and settings that are wrong, are the parser's.
    """
    import yaml

    try:
        if not path.is_file():
            return
        text = path.read_bytes().decode("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deep") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: holds no settings, expected `name: value` lines")
    _check_keys_once(root, path)


def _check_keys_once(node: yaml.MappingNode, path: Path) -> None:
    import yaml

    seen = set()
    for key, value in node.value:
        if str(key.value) in seen:
            raise ValueError(f"{path}: line {key.start_mark.line + 1}: {key.value!r} is set twice")
        seen.add(str(key.value))
        if isinstance(value, yaml.MappingNode) and value is not node:
            _check_keys_once(value, path)


def check_settings(config: type, settings: Any, prefix: str = "") -> None:
    """Check what the parser lets pass: a section that is none (`objective: 5`), and nothing for a value (`steps:`)."""
    import jsonargparse

    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, settings.get(field.name)
        section = field.default_factory
        if dataclasses.is_dataclass(section):
            if not isinstance(value, jsonargparse.Namespace):
                raise ValueError(f"{name} is {value!r}, expected a section of settings")
            check_settings(cast(type, section), value, f"{name}.")
        elif value is None and type(None) not in get_args(hints[field.name]):
            raise ValueError(f"{name} is not set to anything, expected a value or no such line")


def _refuse(command: str, message: str, code: int = 2) -> int:
    """Say in one line on stderr what is wrong, and which of several processes says it; returns the exit code."""
    rank = f" [rank {os.environ.get('RANK')}]" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    line = " ".join(message.split())
    shown = line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    print(f"ppo-fast {command}".rstrip() + f"{rank}: {shown}", file=sys.stderr)
    return code


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser; every option's help is the docstring of its config field."""
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        """Its errors are one line, and point to the help."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            sys.exit(
                _refuse(self.command, f"{message} (see ppo-fast {self.command} --help)".replace("  ", " "))
            )

        command = ""

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog="ppo-fast", description="PPO for language models.")
    parser.add_argument("--version", action="version", version=f"ppo-fast {version('ppo-fast')}")
    commands = parser.add_subcommands(required=False, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        arguments = {"report": "RUN", "doctor": ""}.get(name, "--config FILE [section.field=value ...]")
        usage = f"ppo-fast {name} {arguments}".rstrip()
        command = Parser(usage=usage, description=purpose[0].upper() + purpose[1:] + ".")
        command.command = name
        if name == "report":
            command.add_argument("run", type=str, help="folder of a run")
        elif name != "doctor":
            command.add_argument("--config", action="config", help="YAML file of settings")
            command.add_class_arguments(_config_class(name), None)
        commands.add_subcommand(name, command, help=purpose)
    return parser


def run_command(command: str, settings: dict[str, Any]) -> None:
    """Carry a parsed command out; `settings` are its instantiated options."""
    settings.pop("config", None)
    if command == "report":
        _report(settings["run"])
        return
    if command == "doctor":
        from ppo_fast import doctor

        print(doctor.report())
        return
    config = _config_class(command)(**settings)
    if command == "train":
        from ppo_fast.ppo.run import train

        train(config)
    elif command == "reward":
        from ppo_fast.prepare.reward_model import run_reward

        run_reward(config)
    else:
        from ppo_fast.prepare.sft import run_sft

        run_sft(config)


def _config_class(command: str) -> type[Any]:
    if command == "train":
        from ppo_fast.ppo.config import PPOConfig

        return PPOConfig
    if command == "reward":
        from ppo_fast.prepare.reward_model import RewardConfig

        return RewardConfig
    from ppo_fast.prepare.sft import SFTConfig

    return SFTConfig


def _report(run: str) -> None:
    from ppo_fast.report import print_samples, print_summary, write_report

    page = write_report(run)
    print_samples(run)
    print_summary(run)
    print(f"report: {page}")


def as_options(arguments: Sequence[str]) -> list[str]:
    """Turn `section.field=value` into `--section.field=value`; drop the --local_rank that launchers append."""
    kept: list[str] = []
    for before, argument in pairwise(["", *arguments]):
        number_of_rank = LOCAL_RANK.fullmatch(before) and "=" not in before and argument.isdigit()
        if not LOCAL_RANK.fullmatch(argument) and not number_of_rank:
            kept.append(argument)
    return [f"--{argument}" if OVERRIDE.fullmatch(argument) else argument for argument in kept]


def leave(code: int) -> NoReturn:
    """Exit; as one process of several at once.

    A thread of the transport that still waits for a peer would abort an orderly exit and hide the code.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":  # what `torchrun -m ppo_fast.cli` and `deepspeed -m ppo_fast.cli` run
    leave(main())
