"""Experience stage and loss step of DeepSpeed-Chat, trlX and TRL, their own and patched: time and peak memory.

    python -m pytest bench/test_stages.py --benchmark-json=stages.json

Each runs in a process of its own (stages.py), as peak memory and two versions of TRL ask for it; `extra_info` holds
seconds and megabytes of each stage.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from measure import DEVICE
from pytest_benchmark.fixture import BenchmarkFixture
from stages import PACKAGES, TRAINERS

SIZES = {"8x257": (2, 4, 257), "1024x32000": (8, 128, 32000), "8192x128256": (32, 256, 128256)}
LARGE = "1024x32000" if DEVICE == "cpu" else "8192x128256"
# The smallest is for the test that the suite runs at all.
CASES = [("deepspeed_chat", "8x257"), ("trl-1.16", "8x257"), *((trainer, LARGE) for trainer in TRAINERS)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("trainer", "size"), CASES)
def test_stages(benchmark: BenchmarkFixture, trainer: str, size: str, when: str) -> None:
    if trainer.startswith("trl-") and not (PACKAGES / f"{trainer}.0").exists():
        pytest.skip(f"{PACKAGES / trainer}.0 is missing: `make test` makes it")
    names = ("--sequences", "--tokens", "--vocab")
    options = [x for name, number in zip(names, SIZES[size], strict=True) for x in (name, str(number))]

    def child() -> dict[str, dict[str, float]]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "stages.py"), trainer, when, *options],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONSAFEPATH": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    stages = benchmark.pedantic(child, rounds=1)
    for name, facts in stages.items():
        benchmark.extra_info[f"{name}_seconds"] = round(facts["seconds"], 4)
        benchmark.extra_info[f"{name}_megabytes"] = round(facts["bytes"] / 1e6, 1)
