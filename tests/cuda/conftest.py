"""Where the CUDA kernels are tested: on an NVIDIA GPU (PPO_FAST_TEST_DEVICE=cuda), else on a CPU that emulates one."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops import native_cuda

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = Path(__file__).resolve().parent / "emulator"
ON_GPU = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu") == "cuda"
DEVICES = ["gpu"] if ON_GPU else ["clusters", "no clusters"]


def compile_emulation(folder: Path, clusters: bool) -> ModuleType:
    """The kernels as they stand, compiled for a CPU, with and without what compute capability 9.0 brought."""
    import pybind11

    sources = [
        *(ROOT / "csrc" / "cuda").glob("*.cu"),
        ROOT / "csrc" / "bindings_cuda.cpp",
        *EMULATOR.glob("*.cpp"),
    ]
    includes = [EMULATOR, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    target = folder / "emulated.so"
    command = [
        os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        f"-DPPO_FAST_CLUSTERS={int(clusters)}", '-DPPO_FAST_CUDA="an emulator"', '-DPPO_FAST_CUDA_TARGETS="none"',
        *(f"-I{path}" for path in includes), "-x", "c++", *map(str, sources), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("emulated", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModuleType]:
    """Compiles each kind of emulated device once, when it is first asked for."""
    made: dict[str, ModuleType] = {}

    def of(device: str) -> ModuleType:
        if device not in made:
            made[device] = compile_emulation(tmp_path_factory.mktemp("emulated"), device == "clusters")
        return made[device]

    return of


@contextlib.contextmanager
def emulated_place(tensor: Tensor) -> Iterator[dict[str, int]]:
    yield {"device": 0, "stream": 0}


@pytest.fixture(params=DEVICES)
def device(
    request: pytest.FixtureRequest, emulation: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The launchers of `native_cuda` run on this device, with the tensors of the test."""
    if request.param == "gpu":
        if build.CUDA_MISSING_REASON is not None:
            pytest.skip(build.CUDA_MISSING_REASON)
        yield request.param
        return
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to emulate a GPU with")
    module = emulation(request.param)
    monkeypatch.setattr(build, "_EXTENSION", module)
    monkeypatch.setattr(native_cuda, "_launching_on", emulated_place)
    yield request.param
    module.set_seed(0)


@pytest.fixture
def schedules(device: str) -> Callable[[int], None]:
    """Choose the order in which the emulated threads run and copies are done; a GPU chooses for itself."""
    return (lambda seed: None) if device == "gpu" else build.extension().set_seed
