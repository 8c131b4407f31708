"""What of the native code is built here: for a CPU, by instruction sets, and for GPUs, by CUDA targets."""

import importlib
import os
from types import ModuleType
from typing import TypedDict

ISA_VARIABLE = "PPO_FAST_ISA"


class CudaInfo(TypedDict):
    """State of the CUDA kernels in the native extension."""

    cuda: bool
    cuda_targets: list[str]
    cuda_compiler: str | None
    cuda_reason: str | None


class BuildInfo(CudaInfo):
    """State of the native extension; lists of instruction sets are best first, and empty where it is not built."""

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


def _cuda_missing() -> str | None:
    if _EXTENSION is None or hasattr(_EXTENSION, "cuda_targets"):
        return MISSING_REASON
    return (
        "the native extension is built without its CUDA kernels; `pip install .` builds them where nvcc is on PATH "
        "or in CUDA_HOME, unless PPO_FAST_CUDA=0"
    )


CUDA_MISSING_REASON = _cuda_missing()
CUDA_TARGETS: tuple[str, ...] = (
    () if _EXTENSION is None or CUDA_MISSING_REASON else tuple(_EXTENSION.cuda_targets.split())
)


def runs_on(capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs the CUDA kernels that are built: machine code, no PTX.

    Code for sm_80 runs on every 8.x; an `a` at the end, as in sm_90a, means that very capability.
    """
    major, minor = capability
    for target in CUDA_TARGETS:
        number = target.removeprefix("sm_").removesuffix("a")
        built = int(number[:-1]), int(number[-1])
        if built == capability or (built[0] == major and built[1] <= minor and not target.endswith("a")):
            return True
    return False


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
    """Report whether the native extension is built, by which compilers, with which instruction sets and targets.

    Where `native` is false, `reason` says why, and `cuda_reason` where `cuda` is; `impl="cpu"` and `impl="cuda"` then
    raise with the same reason.
    """
    cuda = CudaInfo(
        cuda=CUDA_MISSING_REASON is None,
        cuda_targets=list(CUDA_TARGETS),
        cuda_compiler=getattr(_EXTENSION, "cuda_compiler", None),
        cuda_reason=CUDA_MISSING_REASON,
    )
    if _EXTENSION is None:
        return BuildInfo(
            native=False,
            reason=MISSING_REASON,
            compiler=None,
            isas_compiled=[],
            isas_supported=[],
            isa=None,
            **cuda,
        )
    return BuildInfo(
        native=True,
        reason=None,
        compiler=_EXTENSION.compiler,
        isas_compiled=_EXTENSION.compiled_isas(),
        isas_supported=_EXTENSION.supported_isas(),
        isa=selected_isa(),
        **cuda,
    )
