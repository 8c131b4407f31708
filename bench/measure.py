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
}

Run = Callable[[], None]


def peers() -> dict[str, str]:
    """The peers that are installed here, with their versions; their kernels need a GPU."""
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
