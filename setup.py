"""Build the native CPU extension `ppo_fast._C`; all else about the package stands in pyproject.toml.

The sources see plain pointers, so the build needs a C++17 compiler and pybind11, never torch. One binary carries
every instruction set and picks at run time: no -march flag, so that a wheel runs on any machine of its architecture.
"""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile("PPO_FAST_BUILD_JOBS").install()

setup(
    ext_modules=[
        Pybind11Extension(
            "ppo_fast._C",
            sources=sorted(glob("csrc/**/*.cpp", recursive=True)),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-pthread", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ]
)
