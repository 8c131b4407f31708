"""A pytest plugin: TRL runs on our ops for the whole session, which ends with how often each replacement was called."""

import pytest

import ppo_fast
from ppo_fast.integrations import Patch

RECORD = pytest.StashKey[Patch]()


def pytest_configure(config: pytest.Config) -> None:
    """Before TRL's tests are imported: they hold functions of TRL by name."""
    config.stash[RECORD] = ppo_fast.patch("trl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """TRL keeps the tests of its kernels for a GPU, since only there its kernels run; ours run on a CPU too."""
    for holder in {parent for item in items for parent in item.listchain()}:
        holder.own_markers = [mark for mark in holder.own_markers if not _is_for_a_gpu(mark)]


def _is_for_a_gpu(mark: pytest.Mark) -> bool:
    return mark.name == "skipif" and mark.kwargs.get("reason") == "test requires accelerator"


def pytest_terminal_summary(terminalreporter: object, config: pytest.Config) -> None:
    calls = config.stash[RECORD].calls
    terminalreporter.write_line(f"calls of our ops: {sum(calls.values())}")
    for name, number in calls.items():
        terminalreporter.write_line(f"{number:6} {name}")
