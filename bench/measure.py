"""What every suite measures in the same way: time, memory, bandwidth, and how far a result is from float64."""

import ctypes
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from pytest_benchmark.stats import Stats
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("PPO_FAST_TEST_DEVICE") != "cpu" else "cpu"
PEERS = {
    "liger": ("liger_kernel", "liger-kernel"),
    "trl": ("trl", "trl"),
    "flash": ("flash_attn", "flash-attn"),
    "verl": ("verl", "verl"),
    "openrlhf": ("openrlhf", "openrlhf"),
    "torchrl": ("torchrl", "torchrl"),
}

Run = Callable[[], None]


def peers() -> dict[str, str]:
    """The peers that are installed here, with their versions; kernels need a GPU, what is eager does not."""
    found = {name: names for name, names in PEERS.items() if importlib.util.find_spec(names[0]) is not None}
    return {name: version(package) for name, (_, package) in found.items()}


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def synchronised(run: Run) -> Run:
    """`run`, whose end is the end of the device's work."""

    def timed() -> None:
        run()
        synchronise()

    return timed


def best_of(run: Run, times: int = 3) -> float:
    """Shortest of a few runs in seconds."""
    best = float("inf")
    for _ in range(times):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        best = min(best, time.perf_counter() - start)
    return best


def extra_bytes(run: Run) -> int | None:
    """The most memory that `run` holds beyond what stands before: a GPU's by its allocator, a CPU's resident pages.

    None where the system does not tell: on a CPU only Linux forgets a peak when it is asked to. A first call brings
    code and tables with it, so call `run` once before.
    """
    if DEVICE == "cpu":
        return resident_bytes(run) if Path("/proc/self/clear_refs").exists() else None
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronise()
    return torch.cuda.max_memory_allocated() - before


def resident_bytes(run: Run) -> int:
    """How far the peak of resident memory rises above what is resident before."""
    # Here, since the driver for GPUs imports this module before it has installed the package.
    from ppo_fast.ops.backends import LARGE_BYTES, large_empty

    # What was freed and is kept would be taken again without a trace: our block for large results, of which a small one
    # takes the place, and the pages of the C library.
    large_empty((LARGE_BYTES,), torch.int8)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    run()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def copy_(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


def clone(source: Tensor) -> None:
    source.clone()


@lru_cache
def copy_bandwidth(device: str = DEVICE) -> float:
    """Gigabytes a second of the best of 20 copies, bytes read and bytes written counted: the roof."""
    size = 2**31 if device == "cuda" else 2**27
    source = torch.randint(100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_(target, source)
    seconds = best_of(lambda: copy_(target, source), times=20)
    return three_digits(2 * size / seconds / 1e9)


def copies(moved: int) -> dict[str, Run]:
    """Plain copies of `moved` bytes, half of them read and half written.

    `copy` writes over a buffer that stands; `clone` allocates what it writes, as an op its results.
    """
    source = torch.ones(moved // 2, dtype=torch.int8, device=DEVICE)
    target = torch.ones_like(source)
    return {"copy": lambda: copy_(target, source), "clone": lambda: clone(source)}


class Turns:
    """What a subject is compared to: timed once before each of its rounds, so that it is all under the same load."""

    def __init__(self, runs: dict[str, Run]) -> None:
        self.runs = runs
        self.seconds: dict[str, list[float]] = {name: [] for name in runs}

    def take(self) -> None:
        for name, run in self.runs.items():
            self.seconds[name].append(best_of(run, times=1))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def facts(self, subject: Stats, longer_than: Collection[str] = ()) -> dict[str, object]:
        """Medians and bests, in seconds, and ratios of medians: how many times faster than each the subject is.

        Of what is in `longer_than` the ratio is turned round: how many times longer than it the subject takes.
        """
        of_all = {"ours": [subject.median, subject.min]}
        of_all |= {name: [statistics.median(all_), min(all_)] for name, all_ in self.seconds.items()}
        ratios = {name: self.median(name) / subject.median for name in self.runs}
        return {
            "rounds": subject.rounds,
            "seconds": {name: [*map(three_digits, pair)] for name, pair in of_all.items()},
        } | {
            f"times_{name}": three_digits(1 / ratio if name in longer_than else ratio)
            for name, ratio in ratios.items()
        }


def three_digits(x: float) -> float:
    return float(f"{x:.3g}")


def facts(seconds: float, eager_seconds: float, moved: int, memory: int | None) -> dict[str, object]:
    """`extra_info` of one benchmark; `moved` is the traffic that the op needs at least, in bytes."""
    speed = moved / seconds / 1e9
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gigabytes_per_second": three_digits(speed),
        "share_of_copy": three_digits(speed / copy_bandwidth()),
        "times_eager": three_digits(eager_seconds / seconds),
        "peak_extra_bytes": memory,
    }


def assert_near(got: list[Tensor], truth: list[Tensor], tolerances: list[float]) -> None:
    """Every result within its tolerance, at the size of its largest element, of the one computed in float64."""
    for mine, exact, tolerance in zip(got, truth, tolerances, strict=True):
        size = exact.abs().max().item()
        torch.testing.assert_close(mine.double(), exact, rtol=tolerance, atol=tolerance * size)
