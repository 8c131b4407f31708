"""A pytest plugin: a trainer's own suite with our ops patched in, and a count of how often they were called.

    python -m pytest -p suite_plugin --patched verl --passed 153 .../site-packages/tests/trainer

The run fails when another number of tests passes, and when no op of ours was called: that would prove nothing.
"""

import sys
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from types import ModuleType

import pytest
from stand_ins import OPENRLHF, VERL, stand_ins

from ppo_fast.integrations import Patch, patch

KEY = pytest.StashKey[Patch]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--patched", required=True, help="the trainer to patch")
    parser.addoption("--passed", required=True, type=int, help="how many tests have to pass")


def pytest_configure(config: pytest.Config) -> None:
    trainer = config.getoption("--patched")
    with stand_ins(**{"verl": VERL, "openrlhf": OPENRLHF}[trainer]):
        config.stash[KEY] = patch(trainer)
    if trainer == "openrlhf":
        reach_modules_loaded_by_file()


def reach_modules_loaded_by_file() -> None:
    """OpenRLHF's tests execute its files under names of their own: put ours there too, by the file's path."""
    in_force = sys.modules["ppo_fast.integrations.patch"]._patched["openrlhf"]
    execute: Callable[[SourceFileLoader, ModuleType], None] = SourceFileLoader.exec_module

    def exec_module(self: SourceFileLoader, module: ModuleType) -> None:
        execute(self, module)
        for one in in_force:
            home, _, names = one.site.declared.path.partition(":")
            if self.path.endswith(f"/{home.replace('.', '/')}.py") and module.__name__ != home:
                *outer, last = names.split(".")
                setattr(getattr(module, outer[0]) if outer else module, last, one.stand_in)

    SourceFileLoader.exec_module = exec_module


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("calls of ppo-fast")
    for name, calls in config.stash[KEY].calls.items():
        terminalreporter.write_line(f"{calls:8} {name}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    passed, expected = len(reporter.stats.get("passed", [])), session.config.getoption("--passed")
    if passed != expected:
        reporter.write_line(f"\n{passed} tests passed, expected {expected}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if not any(session.config.stash[KEY].calls.values()):
        reporter.write_line("\nno op of ppo-fast was called", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
