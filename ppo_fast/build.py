"""What of the native code is built here, and which of its instruction sets this machine runs."""

import importlib
import os
from types import ModuleType
from typing import TypedDict

ISA_VARIABLE = "PPO_FAST_ISA"


class BuildInfo(TypedDict):
    """State of the native CPU extension; the lists are best first, and empty where it is not built."""

    native: bool
    reason: str | None
    compiler: str | None
    isas_compiled: list[str]
    isas_supported: list[str]
    isa: str | None


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("ppo_fast._C"), None
    except ImportError as error:
        return (
            None,
            f"the native extension is not built ({error}); `pip install .` builds it, with a C++17 compiler",
        )


_EXTENSION, MISSING_REASON = _load()


def extension() -> ModuleType:
    """Return the extension module `ppo_fast._C`; RuntimeError with the reason where it is not built."""
    if _EXTENSION is None:
        raise RuntimeError(MISSING_REASON)
    return _EXTENSION


def selected_isa() -> str:
    """Return the instruction set the native ops use: the best of this machine, or the one PPO_FAST_ISA names.

    ValueError where PPO_FAST_ISA names one that this machine or this build does not have.
    """
    supported: list[str] = extension().supported_isas()
    asked = os.environ.get(ISA_VARIABLE)
    if asked is None:
        return supported[0]
    if asked not in supported:
        raise ValueError(
            f"{ISA_VARIABLE} is {asked!r}, expected one of {', '.join(supported)} on this machine"
        )
    return asked


def build_info() -> BuildInfo:
    """Report whether the native extension is built, by which compiler, with which instruction sets, used or not.

    Where `native` is false, `reason` says why; `impl="cpu"` then raises with the same reason.
    """
    if _EXTENSION is None:
        return BuildInfo(
            native=False, reason=MISSING_REASON, compiler=None, isas_compiled=[], isas_supported=[], isa=None
        )
    return BuildInfo(
        native=True,
        reason=None,
        compiler=_EXTENSION.compiler,
        isas_compiled=_EXTENSION.compiled_isas(),
        isas_supported=_EXTENSION.supported_isas(),
        isa=selected_isa(),
    )
