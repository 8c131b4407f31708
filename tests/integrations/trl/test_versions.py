"""TRL 1.12 and 1.16, which cannot share an environment: each is tested in a child process, from its own folder.

`make test` puts the two folders beside the environment's packages, and a third with `datasets`, which both import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = Path(sys.prefix)


def run_inside(version: str, *files: str) -> None:
    """Run files of inside/ with this version of TRL; their failures are shown, and a skip is one."""
    folder = PACKAGES / f"trl-{version}"
    if not folder.exists():
        pytest.skip(f"{folder} is missing: `make test` and `make integration` make it")
    path = [str(folder), str(PACKAGES / "datasets"), os.environ.get("PYTHONPATH", "")]
    paths = [str(HERE / "inside" / file) for file in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PPO_FAST_TRL": version},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert "passed" in summary, done.stdout[-2000:]
    assert "skipped" not in summary, done.stdout[-2000:]


def test_1_12() -> None:
    run_inside("1.12.0", "rows_1_12.py", "ppo_1_12.py", "run_1_12.py", "snippet.py")


def test_1_16() -> None:
    run_inside("1.16.0", "rows_1_16.py", "lm_head_1_16.py", "snippet.py", "run_1_16.py")
