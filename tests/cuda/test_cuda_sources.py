"""What of the CUDA kernels can be told without a GPU: what is built, what it says, why it cannot run."""

import ctypes
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ppo_fast
from ppo_fast import build
from ppo_fast.ops import backends

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.environ.get("CUDA_HOME", "") + "/bin")
needs_cuda = pytest.mark.skipif(build.CUDA_MISSING_REASON is not None, reason=str(build.CUDA_MISSING_REASON))


@pytest.mark.skipif(
    NVCC is None or os.environ.get("PPO_FAST_CUDA") == "0",
    reason="nvcc, which compiles the CUDA kernels, is not installed or left out",
)
def test_the_extension_has_them_where_nvcc_is() -> None:
    info = build.build_info()
    assert info["cuda"], info["cuda_reason"]
    assert info["cuda_reason"] is None
    assert re.fullmatch(r"nvcc \d+\.\d+", info["cuda_compiler"])
    assert info["cuda_targets"] == ["sm_80", "sm_90a", "sm_100"]


@needs_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_driver_the_extension_loads_and_a_launch_says_what_cuda_says() -> None:
    with pytest.raises(RuntimeError, match=r"^cudaSetDevice: cudaError\w+: .+"):
        build.extension().cuda_merge_parts(parts=8, count=1, merged=8, groups=1, size=1, device=0, stream=0)


@needs_cuda
def test_its_cuda_runtime_is_its_own() -> None:
    """A name of it that others could see might be taken for torch's, or torch's for ours."""
    library = ctypes.CDLL(str(build.extension().__file__))
    assert not hasattr(library, "cudaMalloc")
    assert not hasattr(library, "cudaLaunchKernelExC")


ROWS: dict[str, Any] = {
    "logits": 16, "grad_logits": 16, "dtype": 0, "rows": 0, "vocab": 4, "inner_rows": 1, "outer_stride": 0,
    "inner_stride": 4, "labels": 8, "old_logprobs": 8, "advantages": 8, "weights": 8, "temperature": 8,
    "temperature_stride": 0, "coefficients": 8, "logprobs": 8, "entropy": 8, "state": 0, "cluster": 0,
    "device": 0, "stream": 0,
}  # fmt: skip


@needs_cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 1}, "logits is float64"),
        ({"dtype": 4}, "dtype is code 4"),
        ({"rows": -1}, "rows is -1"),
        ({"vocab": 0}, "vocab is 0"),
        ({"inner_rows": 0}, "inner_rows is 0"),
        ({"temperature_stride": 2}, "temperature_stride is 2"),
        ({"cluster": 3}, "cluster is 3"),
        ({"grad_logits": 24}, "grad_logits lies otherwise between multiples of 16 bytes"),
        ({"rows": 1, "labels": 0}, "null address"),
    ],
)
def test_checks_of_rows(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build.extension().cuda_policy_rows(**{**ROWS, **change})


def test_a_missing_build_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_EXTENSION", object())
    reason = build._cuda_missing()
    assert reason is not None
    assert "nvcc is on PATH or in CUDA_HOME" in reason
    monkeypatch.setattr(build, "CUDA_MISSING_REASON", reason)
    assert backends.unavailable("cuda", torch.zeros(1)) == reason
    x = torch.zeros(1, 2)
    with pytest.raises(
        ValueError, match="impl='cuda' is not available for gae: the native extension is built without"
    ):
        ppo_fast.gae(x, x, x, impl="cuda")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CUDA_MISSING_REASON", None)
    monkeypatch.setattr(build, "CUDA_TARGETS", ("sm_80", "sm_90a", "sm_100"))


class OnGpu:
    """As much of a tensor on a GPU as `unavailable` looks at."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.device = dtype, torch.device("cuda", 0)


@pytest.mark.usefixtures("built")
def test_it_needs_a_gpu_and_a_dtype() -> None:
    on_cpu = torch.zeros(1, device="cpu")
    assert backends.unavailable("cuda", on_cpu) == "it needs tensors on an NVIDIA GPU, these are on cpu"
    assert backends.unavailable("cuda", OnGpu(torch.float64)) == "it has no kernel for torch.float64"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 0), None),
        ((8, 9), None),
        ((9, 0), None),
        ((10, 0), None),
        ((10, 3), None),
        ((7, 5), "it is built for sm_80, sm_90a, sm_100, and this GPU is an sm_75"),
        ((12, 0), "it is built for sm_80, sm_90a, sm_100, and this GPU is an sm_120"),
    ],
)
@pytest.mark.usefixtures("built")
def test_it_needs_a_gpu_that_it_is_built_for(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", True)
    assert backends.unavailable("cuda", OnGpu()) == reason


@pytest.mark.usefixtures("built")
def test_it_needs_triton_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", False)
    assert "triton is not installed" in str(backends.unavailable("cuda", OnGpu()))


def test_auto_does_not_take_it_before_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from ppo_fast.ops import dispatch

    assert all("cuda" not in names for names in dispatch._PREFERENCE.values())


@pytest.mark.parametrize("path", sorted((CSRC / "cuda").iterdir()), ids=lambda path: path.name)
def test_only_one_file_knows_the_machine(path: Path) -> None:
    """PTX and the CUDA runtime stand in device.cuh, so that the emulator of the tests can take its place."""
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    if path.name != "device.cuh":
        assert not re.search(r"\basm\b|cuda_runtime|cudaError|<<<", text)
