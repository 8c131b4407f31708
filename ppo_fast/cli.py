"""The command line: `ppo-fast train`, `ppo-fast reward`, `ppo-fast sft`, `ppo-fast report`, `ppo-fast doctor`.

Settings are the fields of the config dataclasses. A YAML file gives some, `section.field=value` arguments override
them, and what neither names has its default. Exit codes: 0 done, 2 bad input (one line on stderr says what).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jsonargparse

COMMANDS = {
    "train": "tune a language model with PPO against a reward",
    "reward": "train a reward model on pairs (Bradley-Terry) or on scored texts (regression)",
    "sft": "fine-tune a language model on texts or on prompts with responses",
    "report": "draw the curves and write report.html of a run folder again",
    "doctor": "say what is built and installed here, and which implementation each op takes, and why",
}
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
        print(
            f"ppo-fast: {error}; `pip install ppo-fast[train]` brings what the command line needs",
            file=sys.stderr,
        )
        return 2
    parsed = parser.parse_args(arguments)
    command = parsed.subcommand
    if command is None:
        parser.print_help()
        return 2
    try:
        run_command(command, vars(parser.instantiate(parsed)[command]))
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError, MemoryError) as error:
        print(f"ppo-fast {command}: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser; every option's help is the docstring of its config field."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog="ppo-fast", description="PPO for language models.")
    parser.add_argument("--version", action="version", version=f"ppo-fast {version('ppo-fast')}")
    commands = parser.add_subcommands(required=False, metavar="COMMAND")
    for name, purpose in COMMANDS.items():
        arguments = {"report": "RUN", "doctor": ""}.get(name, "--config FILE [section.field=value ...]")
        usage = f"ppo-fast {name} {arguments}".rstrip()
        command = jsonargparse.ArgumentParser(usage=usage, description=purpose[0].upper() + purpose[1:] + ".")
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
    kept = [argument for argument in arguments if not re.fullmatch(r"--local[_-]rank(=\d+)?", argument)]
    return [f"--{argument}" if OVERRIDE.fullmatch(argument) else argument for argument in kept]
