"""The benchmark suites and the driver for GPUs run, on their smallest case, and write what they promise."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


# The native ops beside what they replace, and what each of these benchmarks reports.
RATIOS = {
    "test_logprobs_forward_and_backward": {"eager / fused, median", "eager / fused, best"},
    "test_logprobs_forward": {"fused / sum, median", "fused / sum, best"},
    "test_policy_loss_forward_and_backward": {"source / fused, median", "source / fused, best"},
    "test_policy_loss_memory": {"fused in place, extra memory / logits", "source, extra memory / logits"},
}


def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run in a process of its own: no interpreter of Triton's and no GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=inherited | {"PYTHONSAFEPATH": "1", "PPO_FAST_TEST_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        timeout=300,
    )


def test_suites(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    smallest = ("-k", "8x257 and not compile")
    options = ("-q", "-p", "no:cacheprovider", f"--benchmark-json={results}", *smallest)
    done = python("-m", "pytest", ROOT / "bench", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks: list[dict[str, Any]] = json.loads(results.read_text())["benchmarks"]
    count: dict[str, int] = {}
    for benchmark in benchmarks:
        suite = benchmark["name"].split("[")[0]
        count[suite] = count.get(suite, 0) + 1
        facts = benchmark["extra_info"]
        if suite in RATIOS:
            assert RATIOS[suite] <= set(facts)
            assert all(facts[name] >= 0 for name in RATIOS[suite])
            continue
        if suite == "test_stages":
            assert facts["experience_seconds"] > 0
            assert facts["loss_seconds"] > 0
            assert {"experience_megabytes", "loss_megabytes"} <= set(facts)
            continue
        assert facts["gigabytes_per_second"] > 0
        assert facts["share_of_copy"] > 0
        assert facts["times_eager"] > 0
        if suite == "test_experience":
            # Peers that run on a CPU take part where they are installed.
            rivals = {"gae": ("torchrl",), "experience": ("verl", "openrlhf")}[benchmark["params"]["op"]]
            present = {name for name in rivals if importlib.util.find_spec(name) is not None}
            own = {"copy", "clone", "source"} | ({"chunked"} if benchmark["params"]["op"] == "gae" else set())
            assert set(facts["seconds"]) == own | present | {"ours"}
            assert all(facts[f"times_{name}"] > 0 for name in own | present)
        if suite in ("test_experience_stage", "test_loss_step"):
            assert facts["times_before"] > 0
            assert {"peak_extra_bytes", "peak_extra_bytes_before"} <= set(facts)
    heads = sum(
        importlib.util.find_spec(name) is not None for name in ("liger_kernel", "trl", "verl", "openrlhf")
    )
    trainers = sum(importlib.util.find_spec(name) is not None for name in ("verl", "openrlhf"))
    # Implementations x works or objectives x ops: fused (twice in the policy loss) and eager; compile is left out.
    assert count == {
        "test_logprob": 2 * 2 * 3,
        "test_kl": 2 * 2,
        "test_policy_loss": 3 * 2,
        "test_tokens": 2 * 3,
        "test_experience": 2,
        **dict.fromkeys(RATIOS, 1),
        "test_linear": 3 * 2 + heads,
        "test_active_rows": 2,
        **dict.fromkeys(("test_experience_stage", "test_loss_step"), trainers),
        "test_stages": 4 if (Path(sys.prefix) / "trl-1.16.0").exists() else 2,
    }


def test_the_driver_goes_past_a_failure_and_reports_it(tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_red():\n    assert False\n\n\ndef test_green():\n    pass\n")
    options = ("--device", "cpu", "--results", tmp_path, "--tests", failing, "--suites", "test_kl")
    done = python(ROOT / "bench" / "gpu.py", *options, "--budget", "240")
    assert done.returncode == 1, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    report = json.loads(written.read_text())
    assert report["torch"] == torch.__version__
    assert report["copy_gigabytes_per_second"] > 0
    tests, suite = report["steps"]
    assert tests["outcome"] == "failed"
    assert tests["counts"] == {"passed": 1, "failed": 1, "skipped": 0}
    assert [name.split("::")[-1] for name in tests["failing"]] == ["test_red"]
    assert suite["outcome"] == "passed", suite["output_tail"]
    assert len(suite["benchmarks"]) == 4


def test_the_driver_starts_nothing_without_time(tmp_path: Path) -> None:
    done = python(ROOT / "bench" / "gpu.py", "--device", "cpu", "--results", tmp_path, "--budget", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    assert {step["outcome"] for step in json.loads(written.read_text())["steps"]} == {"not run: out of time"}


def test_without_a_gpu_the_driver_says_so(tmp_path: Path) -> None:
    done = python(ROOT / "bench" / "gpu.py", "--results", tmp_path)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
    assert not list(tmp_path.glob("*.json"))
