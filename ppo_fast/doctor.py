"""What of ppo-fast is built and installed on this machine, and which implementation each op takes here, and why."""

import importlib.util
import platform
from importlib.metadata import version

import torch

from ppo_fast import reference
from ppo_fast.build import build_info
from ppo_fast.ops.dispatch import reasons, resolve


def report() -> str:
    """The whole of it, as lines of text."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return "\n".join([*machine(), *(line for device in devices for line in ("", *choices(device)))])


def machine() -> list[str]:
    """Versions, the native extension, Triton and the GPU."""
    info = build_info()
    native = f"not built: {info['reason']}"
    if info["native"]:
        sets = ", ".join(f"{isa} (in use)" if isa == info["isa"] else isa for isa in info["isas_supported"])
        others = [isa for isa in info["isas_compiled"] if isa not in info["isas_supported"]]
        beyond = f"; built but not run by this processor: {', '.join(others)}" if others else ""
        native = f"built by {info['compiler']}; {sets}{beyond}"
    cuda = f"not built: {info['cuda_reason']}"
    if info["cuda"]:
        cuda = f"built by {info['cuda_compiler']} for {', '.join(info['cuda_targets'])}"
    triton = version("triton") if importlib.util.find_spec("triton") else "not installed"
    return [
        f"ppo-fast {version('ppo-fast')}, torch {torch.__version__}, Python {platform.python_version()}",
        f"native extension: {native}",
        f"CUDA kernels:     {cuda}",
        f"triton:           {triton}",
        f"GPU:              {gpu()}",
    ]


def gpu() -> str:
    """Name and compute capability of the current one, or why there is none."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    return "none that torch sees" if torch.version.cuda else "none: this torch is built without CUDA"


def choices(device: str) -> list[str]:
    """A row for each op on float32 tensors of `device`: what `auto` takes, what else can be asked for, why not."""
    notes: dict[str, int] = {}
    rows = []
    for op in sorted(reference.__all__):
        taken = resolve(op, "auto", torch.empty(1, 2, device=device))
        cells = {
            name: "auto" if name == taken else f"({notes.setdefault(why, len(notes) + 1)})" if why else "yes"
            for name, why in reasons(op, device).items()
        }
        rows.append(f"{op:34}" + "".join(f"{cell:>11}" for cell in cells.values()))
    head = f"{'impl, on ' + device:34}" + "".join(f"{name:>11}" for name in reasons("gae", device))
    return [head, *rows, *(f"({number}) {why}" for why, number in notes.items())]
