"""The benchmark suites run, on their smallest case, and write what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_logprob_suite(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    suite = ROOT / "bench" / "test_logprob.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(suite),
        "-q",
        "-p",
        "no:cacheprovider",
        f"--benchmark-json={results}",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "-k", "8x257 and not compile"],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONSAFEPATH": "1"},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(results.read_text())["benchmarks"]
    assert len(benchmarks) == 4  # eager and fused, forward alone and with the backward
    for benchmark in benchmarks:
        assert benchmark["extra_info"]["gigabytes_per_second"] > 0
        assert benchmark["extra_info"]["times_eager"] > 0
