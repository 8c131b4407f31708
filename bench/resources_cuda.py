"""What the CUDA C++ kernels of csrc/cuda need on every GPU they are built for, by nvcc and without a GPU.

Shared memory is the static part, which is none, and the KiB that the system keeps from sm_90 on: what a launch asks
for beside it follows from its row. A bulk copy counts as a load of 16 bytes, which it is a multiple of.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TARGETS = ("sm_80", "sm_90a", "sm_100")  # of setup.py
VARIANT = "CUDA C++"
DTYPES = {"Bf16": "bf16", "Fp16": "fp16", "_kernelIf": "fp32"}  # by what a mangled name holds


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin")


def sections(dump: str) -> Iterator[tuple[str, str]]:
    """(mangled name, what cuobjdump says of it) of each kernel; its usage and its code come one after the other."""
    found: dict[str, str] = {}
    for part in re.split(r"(?=Function :? ?_Z)", dump)[1:]:
        name = re.match(r"Function :? ?(\w+)", part)
        assert name is not None
        found[name.group(1)] = found.get(name.group(1), "") + part
    yield from found.items()


def table(cuobjdump: Path, figures_of: Any) -> list[dict[str, Any]]:
    """One row for every kernel, dtype and target; `figures_of` reads what cuobjdump says of one."""
    compiler, rows = nvcc(), []
    assert compiler is not None
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernels.cubin"
                flags = [
                    "-O3",
                    "-std=c++17",
                    f"-I{CSRC}",
                    f"-gencode=arch={target.replace('sm', 'compute')},code={target}",
                ]
                subprocess.run([compiler, *flags, "-cubin", source, "-o", cubin], check=True)
                command = [cuobjdump, "-res-usage", "-sass", cubin]
                dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            for mangled, text in sections(dump):
                kernel = re.search(r"\d([a-z_]+_kernel)", mangled)
                assert kernel is not None, mangled
                dtype = next((name for mark, name in DTYPES.items() if mark in mangled), "")
                shared = re.search(r"\bSHARED:(\d+)", text)
                rows.append(
                    {
                        "kernel": kernel.group(1),
                        "target": target,
                        "dtype": dtype,
                        "vocab": "",
                        "variant": VARIANT,
                    }
                    | {"num_warps": "", "block": "", "shared_bytes": int(shared.group(1)) if shared else 0}
                    | figures_of(text)
                    | ({"load_bytes": 16} if "UBLKCP" in text else {})
                )
    return rows
