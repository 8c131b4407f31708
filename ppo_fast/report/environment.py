"""What a run ran on, in a few words: python, packages, processor, accelerator."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ppo-fast", "torch", "transformers", "triton")


def describe_environment() -> dict[str, str]:
    """Name -> value, in the order of the report: versions, platform, device.

    A trainer that saves this as `environment.json` (a plain JSON object) in its run folder has it shown in
    the report; otherwise the report describes the machine that writes the report and says so.
    """
    found = {"python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["device"] = _device()
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads"
