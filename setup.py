"""Build the native extension `ppo_fast._C`; all else about the package stands in pyproject.toml.

The sources see plain pointers, so the build needs a C++17 compiler and pybind11, never torch. One binary carries
every instruction set and picks at run time: no -march flag, so that a wheel runs on any machine of its architecture.
Where nvcc is found, on PATH or in CUDA_HOME, the CUDA kernels are built too; PPO_FAST_CUDA=0 leaves them out. They
link the CUDA runtime statically, so that the extension loads on a machine without a driver.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

TARGETS = ("sm_80", "sm_90a", "sm_100")  # machine code alone: nothing is compiled by a driver at run time
CUDA_BINDINGS = "csrc/bindings_cuda.cpp"


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler, the targets of ours that it knows, and the static runtime beside it."""

    nvcc: str
    name: str
    targets: list[str]
    runtime: str


def find_cuda() -> Cuda | str:
    """The toolkit to build with, or why there is none."""
    if os.environ.get("PPO_FAST_CUDA") == "0":
        return "PPO_FAST_CUDA=0"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin")
    if nvcc is None:
        return "no nvcc on PATH or in CUDA_HOME"
    release = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))
    known = subprocess.check_output([nvcc, "--list-gpu-code"], text=True).split()
    # What nvcc calls its own folder: itself it may be a wrapper, or a link from somewhere else.
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-"], input="", capture_output=True, text=True
    ).stderr
    top = re.search(r"TOP=(\S+)", plan)
    folders = ("lib64", "lib", "targets/*/lib")
    runtimes = [x for lib in folders if top for x in Path(top.group(1)).glob(f"{lib}/libcudart_static.a")]
    if not runtimes:
        return f"{nvcc} comes without libcudart_static.a"
    name = f"nvcc {release.group(1) if release else 'of an unknown release'}"
    return Cuda(nvcc, name, [t for t in TARGETS if t.removesuffix("a") in known], str(runtimes[0]))


CUDA = find_cuda()


class BuildWithCuda(build_ext):
    """Compiles .cu files by nvcc, for every target at once; the rest as pybind11 does."""

    def build_extensions(self) -> None:
        """Say whether CUDA is in, and build."""
        if isinstance(CUDA, Cuda):
            print(f"ppo-fast: CUDA kernels by {CUDA.name} for {', '.join(CUDA.targets)}")
            self.compiler.src_extensions.append(".cu")
            self._compile_others = self.compiler._compile
            self.compiler._compile = self._compile
        else:
            print(f"ppo-fast: CUDA kernels left out ({CUDA}); Triton serves the GPU")
        self._forget_another_build()
        super().build_extensions()

    def _forget_another_build(self) -> None:
        """Build anew where the last build in this folder had another toolkit, or none: no file would be newer."""
        stamp = Path(self.build_temp, "cuda.txt")
        if not stamp.exists() or stamp.read_text() != str(CUDA):
            self.force = True
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(str(CUDA))

    def _compile(
        self, obj: str, src: str, ext: str, cc_args: list[str], postargs: list[str], pp_opts: list[str]
    ) -> None:
        if ext != ".cu":
            return self._compile_others(obj, src, ext, cc_args, postargs, pp_opts)
        codes = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in CUDA.targets]
        options = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
        self.spawn([CUDA.nvcc, *codes, *options, *pp_opts, "-c", src, "-o", obj])


ParallelCompile("PPO_FAST_BUILD_JOBS").install()
extension = Pybind11Extension(
    "ppo_fast._C",
    sources=sorted({*glob("csrc/**/*.cpp", recursive=True)} - {CUDA_BINDINGS}),
    depends=sorted(glob("csrc/**/*.*", recursive=True)),
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra"],
    extra_link_args=["-pthread", *(["-ldl"] if sys.platform == "linux" else [])],
)
if isinstance(CUDA, Cuda):
    extension.sources += [CUDA_BINDINGS, *sorted(glob("csrc/cuda/*.cu"))]
    named = {"PPO_FAST_CUDA": CUDA.name, "PPO_FAST_CUDA_TARGETS": " ".join(CUDA.targets)}
    extension.define_macros += [(name, f'"{value}"') for name, value in named.items()]
    # Not one name of this runtime is seen outside: torch brings another one.
    extension.extra_link_args += [CUDA.runtime, "-Wl,--exclude-libs,ALL", "-lrt"]

setup(cmdclass={"build_ext": BuildWithCuda}, ext_modules=[extension])
