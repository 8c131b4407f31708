"""What every suite measures in the same way: time, memory, bandwidth, and how far a result is from float64."""

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version

import torch
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
    """The most device memory that `run` allocates beyond what stands before; None on a CPU, which keeps no count."""
    if DEVICE == "cpu":
        return None
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronise()
    return torch.cuda.max_memory_allocated() - before


def copy_(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


@lru_cache
def copy_bandwidth(device: str = DEVICE) -> float:
    """Gigabytes a second of the best of 20 copies, bytes read and bytes written counted: the roof."""
    size = 2**31 if device == "cuda" else 2**27
    source = torch.randint(100, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy_(target, source)
    seconds = best_of(lambda: copy_(target, source), times=20)
    return three_digits(2 * size / seconds / 1e9)


class Copies:
    """Plain copies of `moved` bytes, half of them read and half written, timed in turn with what they are compared to.

    `copy` writes over a buffer that stands; `clone` allocates what it writes, as an op its results.
    """

    def __init__(self, moved: int) -> None:
        self.source = torch.ones(moved // 2, dtype=torch.int8, device=DEVICE)
        self.target = torch.ones_like(self.source)
        self.copy_seconds = self.clone_seconds = float("inf")

    def copy(self) -> None:
        self.target.copy_(self.source)

    def clone(self) -> None:
        self.source.clone()

    def take(self) -> None:
        self.copy_seconds = min(self.copy_seconds, best_of(self.copy, times=1))
        self.clone_seconds = min(self.clone_seconds, best_of(self.clone, times=1))

    def facts(self, seconds: float) -> dict[str, float]:
        return {
            "times_copy": three_digits(seconds / self.copy_seconds),
            "times_clone": three_digits(seconds / self.clone_seconds),
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
