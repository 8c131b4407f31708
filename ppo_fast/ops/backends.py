"""Which fast implementation can run a call on a tensor, and if not, why not."""

import importlib.util
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ppo_fast import build

CPU_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}  # codes of csrc/cpu/logits.h
LARGE_BYTES = 4 * 2**20
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Settled once, at import: `unavailable` is traced into compiled graphs, and Triton reads its variable once too.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(impl: str, tensor: Tensor) -> str | None:
    """Say why `impl` ("cpu", "triton" or "cuda") cannot run on this tensor, or return None if it can."""
    if impl == "cpu":
        return _cpu_unavailable(tensor)
    if impl == "triton":
        return _triton_unavailable(tensor)
    if impl == "cuda":
        return _cuda_unavailable(tensor)
    return f"there is no fused implementation of the name {impl!r}, only cpu, triton and cuda"


def _cpu_unavailable(tensor: Tensor) -> str | None:
    if build.MISSING_REASON is not None:
        return build.MISSING_REASON
    if tensor.device.type != "cpu":
        return f"it needs tensors on the cpu, these are on {tensor.device}"
    if tensor.dtype not in CPU_DTYPES:
        return f"it has no kernel for {tensor.dtype}"
    return None


def _triton_unavailable(tensor: Tensor) -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed; `pip install ppo-fast[triton]` brings it"
    if tensor.device.type == "cpu" and not _TRITON_INTERPRETED:
        return "the tensors are on the cpu, where Triton runs only in its interpreter (TRITON_INTERPRET=1)"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"it needs tensors on a GPU, these are on {tensor.device}"
    if tensor.dtype not in TRITON_DTYPES:
        return f"it has no kernel for {tensor.dtype}"
    return None


def _cuda_unavailable(tensor: Tensor) -> str | None:
    if build.CUDA_MISSING_REASON is not None:
        return build.CUDA_MISSING_REASON
    if tensor.device.type != "cuda":
        return f"it needs tensors on an NVIDIA GPU, these are on {tensor.device}"
    if tensor.dtype not in TRITON_DTYPES:
        return f"it has no kernel for {tensor.dtype}"
    if not _TRITON_INSTALLED:
        return "its sums over tokens and its gradients are Triton's, and triton is not installed"
    capability = torch.cuda.get_device_capability(tensor.device)
    if not build.runs_on(capability):
        built = ", ".join(build.CUDA_TARGETS)
        return f"it is built for {built}, and this GPU is an sm_{capability[0]}{capability[1]}"
    return None


def comparable(mask: Tensor) -> Tensor:
    """Return `mask` as kernels can compare it with 0: the interpreter has no bfloat16 for it, few GPUs float8."""
    narrow = mask.is_floating_point() and mask.element_size() < 4
    return mask != 0 if narrow else mask


def large_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the CPU, for the result of a native op.

    Fresh pages cost several times what the kernel that fills them does: where it is large, it lies on huge pages, and
    the block of the last such result that was let go, up to 512 MiB, is kept for the next one.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    return torch.from_dlpack(build.extension().large_block(size)).view(dtype).view(*shape)
