"""Every shipped kernel configuration compiles, without a GPU, for every GPU it is written for, and spills nothing.

The CUDA C++ kernels are compiled where nvcc is; elsewhere their rows of the table are what the last run with it wrote.
"""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
KEYS = ("kernel", "target", "dtype", "vocab", "variant")
CUDA = "CUDA C++"  # the variant of its rows
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin")

Table = list[dict[str, str]]


def read(path: Path) -> Table:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The table made afresh, in a process of its own, since this one may hold Triton's interpreter."""
    result = tmp_path_factory.mktemp("resources") / "resources.csv"
    done = subprocess.run(
        [sys.executable, BENCH / "resources.py", result],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return read(result)


def keys_of(table: Table, *, cuda: bool) -> list[tuple[str, ...]]:
    return [tuple(row[key] for key in KEYS) for row in table if (row["variant"] == CUDA) == cuda]


def test_the_committed_table_lists_what_is_shipped(compiled: Table) -> None:
    committed = read(BENCH / "resources.csv")
    assert keys_of(committed, cuda=False) == keys_of(compiled, cuda=False), "run `make resources`"


@pytest.mark.skipif(NVCC is None, reason="nvcc, which compiles the CUDA C++ kernels, is not installed")
def test_the_committed_table_lists_the_cuda_kernels(compiled: Table) -> None:
    committed, shipped = (keys_of(t, cuda=True) for t in (read(BENCH / "resources.csv"), compiled))
    assert shipped
    assert committed == shipped, "run `python bench/resources.py --cuda-only`"
    assert {(target, dtype) for _, target, dtype, *_ in shipped if dtype} == {
        (target, dtype) for target in ("sm_80", "sm_90a", "sm_100") for dtype in ("bf16", "fp16", "fp32")
    }


def test_every_dtype_vocabulary_and_target_is_compiled(compiled: Table) -> None:
    rows = {tuple(row[key] for key in ("target", "dtype", "vocab")) for row in compiled}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dtype in ("bf16", "fp16", "fp32"):
            for vocab in ("32000", "50257", "128256", "151936", "262144"):
                assert (target, dtype, vocab) in rows


def test_nothing_spills(compiled: Table) -> None:
    """Also not in the committed rows of the CUDA C++ kernels, where nvcc is not there to take them anew."""
    rows = compiled + [row for row in read(BENCH / "resources.csv") if row["variant"] == CUDA]
    assert [" ".join(row[key] for key in KEYS) for row in rows if int(row["spill_bytes"])] == []
