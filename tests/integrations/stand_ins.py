"""Stand-ins for what a trainer imports and its numerics never reach: Ray, DeepSpeed, the engines."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

VERL = {"absent": ("ray", "datasets")}
OPENRLHF = {
    "absent": ("ray", "deepspeed", "openrlhf.trainer.ray.launcher"),
    "hollow": ("openrlhf.models", "openrlhf.utils"),
}


@contextmanager
def stand_ins(absent: tuple[str, ...], hollow: tuple[str, ...] = ()) -> Iterator[None]:
    """While it lasts, packages that are not installed are mocks, and `hollow` ones have no `__init__`."""
    stubs: dict[str, ModuleType] = {}
    for name in absent:
        if name not in sys.modules and ("." in name or importlib.util.find_spec(name) is None):
            stubs[name] = MagicMock(name=name)
    for name in hollow:
        if name not in sys.modules:
            root, *parts = name.split(".")
            stubs[name] = ModuleType(name)
            stubs[name].__path__ = [str(Path(importlib.util.find_spec(root).origin).parent.joinpath(*parts))]
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]
