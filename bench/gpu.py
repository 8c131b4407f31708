"""Everything that needs a GPU in one command: install, test, benchmark, and one JSON named for the device.

    python bench/gpu.py --results bench/results [--budget 500] [--device cpu]

Works offline, goes on past a failure and reports it, and starts no step that the budget (seconds) has no room for. A
step that runs out of time is interrupted, not killed: pytest then still writes what it has. `--device cpu` is a dry run
of this driver on the smallest cases.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent))  # as conftest.py does; PYTHONSAFEPATH leaves it out

import torch
import triton
from measure import copy_bandwidth, peers

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHORTEST = 15.0  # seconds: less is not enough to import torch and compile a kernel
GRACE = 20.0  # seconds for an interrupted pytest to write its results
# In order of importance.
SUITES = (
    "test_policy_loss",
    "test_linear",
    "test_logprob",
    "test_kl",
    "test_tokens",
    "test_experience",
    "test_integrations",
    "test_stages",
)
SMOKE = ["-k", "8x257 and not compile"]


@dataclass
class Step:
    """One command; `limit` is the most seconds it may take, whatever is left of the budget."""

    name: str
    command: list[str]
    limit: float
    seconds: float = 0.0
    outcome: str = "not run: out of time"
    counts: dict[str, int] = field(default_factory=dict)
    failing: list[str] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    output_tail: str = ""


def pytest_command(paths: list[str], *options: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, *options]


def steps_of(device: str, tests: list[str], suites: list[str]) -> list[Step]:
    """Kernel tests first, since no figure counts without them; then the suites; then the tests of the ops."""
    if device == "cpu":
        dry = [Step("tests " + path, pytest_command([path]), 120) for path in tests]
        return dry + [Step("bench " + s, pytest_command([f"bench/{s}.py"], *SMOKE), 120) for s in suites]
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", "."]
    # Compiling for other GPUs says nothing about this one.
    elsewhere = "--ignore=tests/kernels/test_ahead_of_time.py"
    first, *others = [Step("tests " + path, pytest_command([path], elsewhere), 150) for path in tests]
    benches = [Step("bench " + s, pytest_command([f"bench/{s}.py"]), 120) for s in suites]
    return [Step("install", install, 120), first, *benches, *others]


def run(step: Step, device: str, deadline: float) -> None:
    """Fill in how the step went; past its time, interrupt it."""
    available = min(step.limit, deadline - time.monotonic())
    if available < SHORTEST:
        return
    environment = os.environ | {"PYTHONSAFEPATH": "1", "PPO_FAST_TEST_DEVICE": device}
    if step.name.startswith("bench"):
        environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        junit, timings, log = (Path(folder) / name for name in ("junit.xml", "timings.json", "log"))
        extra = [f"--junitxml={junit}"] if "pytest" in step.command else []
        extra += [f"--benchmark-json={timings}"] if step.name.startswith("bench") else []
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [*step.command, *extra], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
            step.outcome = wait(process, available)
        step.seconds = round(time.monotonic() - start, 1)
        if step.outcome != "passed":
            step.output_tail = log.read_text(errors="replace")[-4000:]
        if junit.exists():
            step.counts, step.failing = read_junit(junit)
        if timings.exists() and timings.stat().st_size:
            step.benchmarks = read_benchmarks(timings)


def wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        return "passed" if process.wait(seconds) == 0 else "failed"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return f"interrupted after {seconds:.0f} s"


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    bad = [case for case in cases if any(child.tag in ("failure", "error") for child in case)]
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    return {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped}, names


def read_benchmarks(path: Path) -> list[dict[str, Any]]:
    entries = json.loads(path.read_text())["benchmarks"]
    return [
        {
            "name": entry["name"],
            "best_seconds": entry["stats"]["min"],
            "median_seconds": entry["stats"]["median"],
            **entry["extra_info"],
        }
        for entry in entries
    ]


def answer_of(*command: str) -> str | None:
    """A command's standard output, or None where the command is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": answer_of("git", "rev-parse", "HEAD"),
        "uncommitted": answer_of("git", "status", "--porcelain") is not None,
        "peers": peers(),
        "copy_gigabytes_per_second": copy_bandwidth(device),
    }


def write(report: dict[str, Any], results: Path) -> Path:
    results.mkdir(parents=True, exist_ok=True)
    path = results / (re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-") + ".json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds for everything")
    parser.add_argument("--tests", nargs="*", default=["tests/kernels", "tests/cuda", "tests/ops"])
    parser.add_argument("--suites", nargs="*", default=list(SUITES))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.budget - GRACE
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU: torch.cuda.is_available() is False here", file=sys.stderr)
        return 2

    report = machine(arguments.device)
    steps = steps_of(arguments.device, arguments.tests, arguments.suites)
    for step in steps:
        run(step, arguments.device, deadline)
        print(f"{step.name:40} {step.outcome} {step.seconds} s {step.counts or ''}", flush=True)
        # After every step, so that a machine that goes away leaves what was measured.
        path = write(report | {"steps": [asdict(one) for one in steps]}, arguments.results)
    print(path)
    return int(any(step.outcome != "passed" for step in steps))


if __name__ == "__main__":
    sys.exit(main())
