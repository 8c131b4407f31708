"""Compile every shipped kernel configuration for every GPU it is written for, and write what each one needs.

    python bench/resources.py [bench/resources.csv] [--cuda-only]

Needs no GPU: Triton's wheel carries the compilers and disassemblers. Arguments are specialised as the runtime does
it. Configurations that give the same source and options are compiled once and listed each. The CUDA C++ kernels are
listed too where nvcc is; `--cuda-only` takes these anew, in seconds, and leaves all other rows as they are.
"""

import argparse
import csv
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as conftest.py does; PYTHONSAFEPATH leaves it out

import resources_cuda
import triton
from shipped import Launch, launches
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource, make_backend

TARGETS = [GPUTarget("cuda", sm, 32) for sm in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
KEYS = ["kernel", "target", "dtype", "vocab", "variant"]
FIGURES = ["num_warps", "block", "registers", "spill_bytes", "shared_bytes", "load_bytes", "store_bytes"]
TABLE = Path(__file__).resolve().parent / "resources.csv"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Bytes that a thread moves in one instruction, by its suffix; none on NVIDIA means four.
NVIDIA_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def target_name(target: GPUTarget) -> str:
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def source_of(launch: Launch, target: GPUTarget) -> ASTSource:
    """The launch's source, specialised by Triton's own rule for that backend (alignment, ones, None)."""
    backend = make_backend(target)
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            kind, key = "constexpr", None
        else:
            specialise = not parameter.do_not_specialize
            kind, key = native_specialize_impl(BaseBackend, value, False, specialise, specialise)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif key:
            attributes[(position,)] = backend.parse_attr(key)
    return ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=attributes)


def widest_nvidia(instruction: str, sass: str) -> int:
    """Bytes of the widest LDG or STG."""
    found = re.findall(rf"\b{instruction}((?:\.\w+)+)", sass)
    return max(
        (max((NVIDIA_BYTES.get(s, 0) for s in x.split(".")), default=0) or 4 for x in found), default=0
    )


def widest_amd(direction: str, text: str) -> int:
    """Bytes of the widest load or store of global memory."""
    found = re.findall(rf"\b(?:global|buffer)_{direction}_[us]?(byte|short|dword(?:x\d)?)\b", text)
    return max((AMD_BYTES[size] for size in found), default=0)


def usage_figures(dump: str) -> dict[str, int]:
    """What cuobjdump says of one kernel."""
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return {
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "load_bytes": widest_nvidia("LDG", dump),
        "store_bytes": widest_nvidia("STG", dump),
    }


def nvidia_figures(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = subprocess.run(
            [CUOBJDUMP, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    return usage_figures(dump)


def amd_figures(compiled: Any) -> dict[str, int]:
    """An SGPR spilled into lanes of a VGPR counts too: four bytes each, beside the private segment's."""
    text = compiled.asm["amdgcn"]
    figure = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    spilled = figure["vgpr_spill_count"] + figure["sgpr_spill_count"]
    return {
        "registers": figure["vgpr_count"],
        "spill_bytes": 4 * spilled + figure["private_segment_fixed_size"],
        "load_bytes": widest_amd("load", text),
        "store_bytes": widest_amd("store", text),
    }


@lru_cache
def work() -> tuple[
    list[tuple[Launch, GPUTarget]], list[tuple[ASTSource, GPUTarget, dict[str, Any]]], list[int]
]:
    """Every configuration with its target, the compilations without repeats, and which of these serves which."""
    pairs = [(launch, target) for launch in launches() for target in TARGETS]
    compilations: dict[tuple[Any, ...], int] = {}
    unique, serves = [], []
    for launch, target in pairs:
        source = source_of(launch, target)
        key = (source.hash(), target, tuple(sorted(launch.options.items())))
        if key not in compilations:
            compilations[key] = len(unique)
            unique.append((source, target, launch.options))
        serves.append(compilations[key])
    return pairs, unique, serves


def figures(index: int) -> dict[str, int]:
    """Compile one; an index travels to the worker, since a source does not pickle."""
    source, target, options = work()[1][index]
    compiled = triton.compile(source, target=target, options=options)
    own = amd_figures(compiled) if target.backend == "hip" else nvidia_figures(compiled)
    return own | {"shared_bytes": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}


def table(processes: int = 2) -> list[dict[str, Any]]:
    """One row for every configuration of a Triton kernel and target."""
    pairs, unique, serves = work()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        measured = pool.map(figures, range(len(unique)), chunksize=4)
    rows = []
    for (launch, target), index in zip(pairs, serves, strict=True):
        keys = (launch.kernel, target_name(target), launch.dtype, launch.vocab, launch.variant)
        block = launch.arguments.get("BLOCK", "")
        rows.append(dict(zip(KEYS, keys, strict=True)) | {"block": block} | measured[index])
    return rows


def listed(path: Path, *, cuda: bool) -> list[dict[str, Any]]:
    """The rows of a table that is there, of the CUDA C++ kernels or all others."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if (row["variant"] == resources_cuda.VARIANT) == cuda]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("table", type=Path, nargs="?", default=TABLE)
    parser.add_argument("--cuda-only", action="store_true")
    arguments = parser.parse_args()
    target = arguments.table
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing: unset TRITON_INTERPRET"
    if arguments.cuda_only:
        rows = listed(target, cuda=False)
    else:
        with tempfile.TemporaryDirectory() as cache:
            triton.knobs.cache.dir = cache
            rows = table()
    if resources_cuda.nvcc() is None:
        print("no nvcc on PATH or in CUDA_HOME: the rows of the CUDA C++ kernels are left as they are")
        rows += listed(target, cuda=True)
    else:
        rows += resources_cuda.table(CUOBJDUMP, usage_figures)
    rows.sort(key=lambda row: [str(row[key]) for key in KEYS])
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*KEYS, *FIGURES], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    spilled = [row for row in rows if int(row["spill_bytes"])]
    print(f"{len(rows)} configurations, {len(spilled)} with spills: {target}")


if __name__ == "__main__":
    main()
