"""`torchrun` and `deepspeed` start a run: one folder, one report, an exact resume, and an end where a process dies."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: `make test` installs it",
)

MARK = "PPO_FAST_TEST_RUN"
GENEROUS = 300.0  # seconds; a machine that is shared is slow
SLOW = (
    "import time\ndef score(prompts, responses):\n    time.sleep({pause})\n"
    "    return [float(len(response)) for response in responses]\n"
)
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--master-port",
    "{port}",
    "-m",
    "ppo_fast.cli",
]
DEEPSPEED = [
    "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "{port}", "--module", "ppo_fast.cli",
]  # fmt: skip


@pytest.fixture
def arguments(world: Any, saved: Callable[..., str], tmp_path: Path) -> Callable[..., list[str]]:
    """Command line of a small run with saved models; keyword arguments are settings with `__` for a dot."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in world.prompts))
    actor, reward = saved(world.actor(), "lm"), saved(world.classifier(), "rm")
    (tmp_path / "slow.py").write_text(SLOW.format(pause=0.0))

    def make(folder: str, **changes: Any) -> list[str]:
        sources = f"[{{model: {reward}}}, {{function: '{tmp_path / 'slow.py'}:score', weight: 0.1}}]"
        settings = {
            "output_dir": tmp_path / folder,
            "steps": 4,
            "rewards": sources,
            "resume": "auto",
            "tensorboard": "false",
            "models__actor": actor,
            "models__device": "cpu",
            "data__prompts": prompts,
            "data__eval_prompts": prompts,
            "evaluation__max_prompts": 5,
            "rollout__batch_size": 8,
            "rollout__max_new_tokens": 6,
            "objective__minibatches": 2,
            "objective__micro_batch_size": 2,
            "optimizer__actor_lr": 1e-3,
            "checkpoint__every": 1,
            "parallel__timeout_minutes": 1,
            **changes,
        }
        return ["train", *(f"{name.replace('__', '.')}={value}" for name, value in settings.items())]

    return make


def launched(launcher: list[str], arguments: list[str]) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [part.format(port=port) for part in launcher]
    environment = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", MARK: arguments[1]}
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    try:
        said, _ = process.communicate(timeout=GENEROUS)
    finally:
        end_all(process)
    assert process.returncode == 0, said[-4000:]
    return said


def end_all(process: subprocess.Popen[str]) -> None:
    """End a launcher and its processes, which have sessions of their own, at once."""
    if process.poll() is None:
        process.kill()
    for number in ranks_of(process):
        os.kill(number, signal.SIGKILL)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not key.startswith(("time/", "throughput/"))}
        for line in lines
    ]


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of the run's ranks, in the order of the ranks: those that carry its mark in their environment."""
    (folder,) = [part for part in launcher.args if str(part).startswith("output_dir=")]  # type: ignore[union-attr]
    mark = f"{MARK}={folder}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except (ProcessLookupError, PermissionError, FileNotFoundError):
            continue
        rank = [value for value in variables if value.startswith(b"RANK=")]
        if mark in variables and rank:
            found[int(rank[0][5:])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture
def reference_run(arguments: Callable[..., list[str]], tmp_path: Path) -> Path:
    """The same run in one process, without DeepSpeed."""
    from ppo_fast.cli import main

    assert main(arguments("alone")) == 0
    return tmp_path / "alone"


def check_same_run(ours: Path, theirs: Path) -> None:
    """Metrics, samples and weights of two runs, up to the order of float32 sums."""
    for one, other in zip(records(ours), records(theirs), strict=True):
        assert one.pop("event", None) == other.pop("event", None)
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in (ours, theirs)]
    assert [json.loads(line)["response"] for line in samples[0]] == [
        json.loads(line)["response"] for line in samples[1]
    ]
    for name in ("actor", "critic"):
        weights = [load_file(folder / name / "model.safetensors") for folder in (ours, theirs)]
        assert set(weights[0]) == set(weights[1])
        for key, value in weights[1].items():
            torch.testing.assert_close(weights[0][key], value, rtol=0, atol=1e-5)
    left = [{path.name for path in folder.iterdir()} for folder in (ours, theirs)]
    assert left[0] == left[1]


def test_torchrun_with_zero_2_is_killed_and_resumes_to_the_same_bits(
    arguments: Callable[..., list[str]], reference_run: Path, tmp_path: Path
) -> None:
    """One run goes through, one is killed at once in the midst of its third step: the same weights, bit for bit."""
    settings = {"parallel__zero_stage": 2}
    finished(launched(TORCHRUN, arguments("whole", **settings)))
    check_same_run(tmp_path / "whole", reference_run)

    (tmp_path / "slow.py").write_text(SLOW.format(pause=1.0))
    process = launched(TORCHRUN, arguments("killed", **settings))
    try:
        wait_for_step(tmp_path / "killed", 2, process)
        end_all(process)
        process.communicate(timeout=GENEROUS)
    finally:
        end_all(process)
    (tmp_path / "slow.py").write_text(SLOW.format(pause=0.0))
    said = finished(launched(TORCHRUN, arguments("killed", **settings)))
    assert "resuming after step" in said
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    for name in ("actor", "critic"):
        ours, theirs = (load_file(tmp_path / run / name / "model.safetensors") for run in ("killed", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_deepspeed_starts_a_run_with_a_json_of_the_user(
    arguments: Callable[..., list[str]], reference_run: Path, tmp_path: Path
) -> None:
    """ZeRO 3 with small parameters split, too, a JSON as the Hugging Face trainer takes it, layers recomputed."""
    settings = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "reduce_bucket_size": "auto",
            "offload_optimizer": {"device": "cpu"},
        },
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True,
            },
        },
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 1.0,
        "wall_clock_breakdown": False,
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    changes = {"parallel__deepspeed": tmp_path / "ds.json", "models__gradient_checkpointing": "true"}
    said = finished(launched(DEEPSPEED, arguments("deepspeed", **changes)))
    check_same_run(tmp_path / "deepspeed", reference_run)
    assert said.count("report: ") == 1  # one process speaks


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + GENEROUS
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0][-4000:]
        path = folder / "metrics.jsonl"
        if path.is_file() and any(
            json.loads(line)["step"] == step and "event" not in json.loads(line)
            for line in path.read_text().split("\n")[:-1]
        ):
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached in {GENEROUS} seconds")


@pytest.fixture
def two_ranks(
    arguments: Callable[..., list[str]], tmp_path: Path
) -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Starts two processes of a run that no launcher looks after, as on two machines."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: str, **changes: Any) -> list[subprocess.Popen[str]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        common = {
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
        }
        for rank in range(2):
            process = subprocess.Popen(
                [sys.executable, "-m", "ppo_fast.cli", *arguments(folder, **changes)],
                env=os.environ | common | {"MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.append(process)
        return started

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        if process.stdout is not None and not process.stdout.closed:
            process.communicate(timeout=GENEROUS)


def test_a_process_that_dies_ends_the_others(
    two_ranks: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW.format(pause=0.5))
    first, second = two_ranks("lost", steps=100)
    wait_for_step(tmp_path / "lost", 1, first)
    second.kill()
    said, _ = first.communicate(timeout=90)  # the timeout of the run is a minute
    assert first.returncode == 1, said
    message = said.strip().splitlines()[-1]
    assert message.startswith("ppo-fast train [rank 0]: rank 0 lost another process of the run")
    assert "resume=auto goes on from the last checkpoint" in message


def test_a_process_that_hangs_is_waited_for_no_longer_than_the_timeout(
    two_ranks: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    """A stopped process answers nothing and closes no connection."""
    (tmp_path / "slow.py").write_text(SLOW.format(pause=0.2))
    first, second = two_ranks("hung", steps=1000, parallel__timeout_minutes=0.2)
    wait_for_step(tmp_path / "hung", 1, first)
    second.send_signal(signal.SIGSTOP)
    said, _ = first.communicate(timeout=90)
    assert first.returncode == 1, said
    assert "lost another process of the run" in said
    assert "parallel.timeout_minutes=0.2" in said


def test_a_refusal_comes_from_every_process_and_leaves_nothing(
    two_ranks: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    for rank, process in enumerate(two_ranks("refused", rollout__batch_size=6)):
        said, _ = process.communicate(timeout=GENEROUS)
        assert process.returncode == 2
        message = f"ppo-fast train [rank {rank}]: rollout.batch_size / objective.minibatches is 3 responses"
        assert said.strip().splitlines()[-1].startswith(message)
        assert "Traceback" not in said
    assert not (tmp_path / "refused").exists()
