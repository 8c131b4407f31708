"""Every shipped kernel configuration compiles, without a GPU, for every GPU it is written for, and spills nothing."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
KEYS = ("kernel", "target", "dtype", "vocab", "variant")

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


def test_the_committed_table_lists_what_is_shipped(compiled: Table) -> None:
    listed, shipped = (
        [tuple(row[key] for key in KEYS) for row in t] for t in (read(BENCH / "resources.csv"), compiled)
    )
    assert listed == shipped, "run `make resources`"


def test_every_dtype_vocabulary_and_target_is_compiled(compiled: Table) -> None:
    rows = {tuple(row[key] for key in ("target", "dtype", "vocab")) for row in compiled}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for dtype in ("bf16", "fp16", "fp32"):
            for vocab in ("32000", "50257", "128256", "151936", "262144"):
                assert (target, dtype, vocab) in rows


def test_nothing_spills(compiled: Table) -> None:
    spilled = [" ".join(row[key] for key in KEYS) for row in compiled if int(row["spill_bytes"])]
    assert spilled == []
