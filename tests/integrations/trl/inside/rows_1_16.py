"""The helpers in logits space and their kernel against those of TRL 1.16; its Triton kernel runs in the interpreter."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from trl.kernels import logprob_entropy as kernel
from trl.trainer import utils as theirs

import ppo_fast.integrations.trl as ours

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Check = Callable[..., None]
MASKS = {
    "none": None,
    "bool": torch.tensor([[1, 0, 1], [0, 0, 1]]).bool(),
    "int32": torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.int32),
    "int64": torch.tensor([[2, 0, 1], [0, 0, 1]]),
    "empty": torch.zeros(2, 3).bool(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_helpers(same: Check, dtype: torch.dtype, temperature: float, mask: str) -> None:
    logits, index = (3 * torch.randn(2, 3, 97)).to(dtype), torch.randint(97, (2, 3))
    options = {"temperature": temperature, "row_mask": MASKS[mask]}
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits], index, **options)
    for learns in (True, False):
        same(
            ours.selective_log_softmax_and_entropy,
            theirs.selective_log_softmax_and_entropy,
            [logits],
            index,
            learns,
            **options,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_temperature_in_a_tensor(same: Check, dtype: torch.dtype) -> None:
    logits, temperature = (3 * torch.randn(2, 3, 97)).to(dtype), torch.tensor(0.7)
    pairs = ((2, 3), ours.selective_log_softmax_and_entropy, theirs.selective_log_softmax_and_entropy)
    several = ((2, 3, 4), ours.selective_log_softmax, theirs.selective_log_softmax)
    for shape, mine, original in (pairs, ((2, 3), *several[1:]), several):
        same(mine, original, [logits], torch.randint(97, shape), temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("picks", [1, 8])
def test_several_labels_a_row(same: Check, dtype: torch.dtype, picks: int) -> None:
    logits, index = torch.randn(2, 3, 97).to(dtype), torch.randint(97, (2, 3, picks))
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits], index, temperature=0.7)
    row_mask = torch.randint(2, (2, 3, picks))
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits], index, row_mask=row_mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(768,), (5, 768), (3, 4, 257), (2, 0, 7)], ids=str)
def test_entropy(same: Check, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    same(ours.entropy_from_logits, theirs.entropy_from_logits, [torch.randn(shape).to(dtype)], chunk_size=3)


def test_impossible_tokens(same: Check) -> None:
    logits, index = torch.randn(2, 3, 40), torch.randint(5, (2, 3))
    logits[0, :, 7:] = -torch.inf
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        same(getattr(ours, name), getattr(theirs, name), [logits], index, gradients=False)
    same(ours.entropy_from_logits, theirs.entropy_from_logits, [logits], gradients=False)


def test_errors(same_error: Check) -> None:
    logits, index = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
        mine, original = getattr(ours, name), getattr(theirs, name)
        for temperature in (0, -1.0):
            same_error(mine, original, logits, index, temperature=temperature)
        same_error(mine, original, logits, index + 5)
        same_error(mine, original, logits, index[:, :2])
        same_error(mine, original, logits, index, row_mask=torch.ones(4, 3))
        same_error(mine, original, logits[:0], index[:0])


# The kernel itself: TRL launches it on a GPU alone, and the interpreter runs the same source.


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kernel(same: Check, dtype: torch.dtype, mask: str, temperature: float) -> None:
    logits, index = (3 * torch.randn(2, 3, 1031)).to(dtype), torch.randint(1031, (2, 3))
    same(
        ours.fused_logprob_entropy,
        kernel.selective_log_softmax_and_entropy,
        [logits],
        index.int() if mask == "int32" else index,
        temperature=temperature,
        row_mask=MASKS[mask],
        bits=False,
    )


def test_kernel_on_a_slice_and_on_one_axis(same: Check) -> None:
    """The strides that trainers pass: rows of a slice of a sequence; one row alone."""
    full, index = torch.randn(2, 6, 70), torch.randint(70, (2, 6))[:, 1:4]

    def sliced(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda leaf: function(leaf[:, 1:4], index, 0.9, MASKS["bool"])

    same(sliced(ours.fused_logprob_entropy), sliced(kernel.selective_log_softmax_and_entropy), [full])
    row = [torch.randn(70)]
    same(ours.fused_logprob_entropy, kernel.selective_log_softmax_and_entropy, row, torch.tensor(3))


def test_kernel_where_a_row_is_left_out(same: Check) -> None:
    """Neither its logits nor its index are looked at."""
    logits, index = torch.randn(2, 3, 70), torch.randint(70, (2, 3))
    logits[0, 1], index[0, 1] = torch.nan, -100
    mask = MASKS["bool"]
    same(ours.fused_logprob_entropy, kernel.selective_log_softmax_and_entropy, [logits], index, row_mask=mask)


def test_kernel_with_impossible_tokens(same: Check) -> None:
    logits, index = torch.randn(2, 3, 70), torch.randint(7, (2, 3))
    logits[0, :, 7:] = -torch.inf
    same(
        ours.fused_logprob_entropy,
        kernel.selective_log_softmax_and_entropy,
        [logits],
        index,
        gradients=False,
    )


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_helpers_where_the_kernel_is_taken(same: Check, mask: str) -> None:
    """As on a GPU, where the results are float32: both sides are told that the kernel can take the call."""
    logits, index = torch.randn(2, 3, 97).bfloat16(), torch.randint(97, (2, 3))
    options = {"temperature": 0.7, "row_mask": MASKS[mask]}
    with (
        patch.object(theirs, "_supports_trl_loss_kernel", lambda *args: True),
        patch("ppo_fast.integrations.trl.kernels._kernel_takes", lambda *args: True),
    ):
        for name in ("selective_log_softmax", "selective_log_softmax_and_entropy"):
            same(getattr(ours, name), getattr(theirs, name), [logits], index, **options)
        same(ours.entropy_from_logits, theirs.entropy_from_logits, [logits])


def test_when_the_kernel_is_taken() -> None:
    """Our rule is TRL's, over devices, dtypes, strides and shapes."""
    from ppo_fast.integrations.trl.kernels import _kernel_takes

    taken = 0
    for device in ("cpu", "meta", "cuda"):
        for dtype in (*DTYPES, torch.int64):
            for shape in ((), (0,), (5,), (2, 5), (2, 3, 5), (2, 2, 3, 5)):
                logits = _On(device, torch.zeros(shape, dtype=dtype))
                for index in _options(device, shape, (torch.int32, torch.int64, torch.int16)):
                    for row_mask in (
                        (None,) if index is None else _options(device, shape, (torch.bool, torch.float32))
                    ):
                        got = _kernel_takes(logits, index, row_mask)
                        assert bool(got) == bool(theirs._supports_trl_loss_kernel(logits, index, row_mask))
                        taken += bool(got)
    assert taken


class _On:
    """A tensor that says it is on another device."""

    def __init__(self, device: str, tensor: Tensor) -> None:
        self.device, self.tensor = torch.device(device), tensor

    def __getattr__(self, name: str) -> object:
        return (lambda: self.tensor.dim()) if name == "dim" else getattr(self.tensor, name)

    def stride(self, axis: int) -> int:
        return self.tensor.stride(axis) if self.tensor.dim() else 0


def _options(device: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list[_On | None]:
    on = [_On(device, torch.zeros(shape[:-1], dtype=dtype)) for dtype in dtypes]
    return [
        None,
        *on,
        _On("cpu", torch.zeros(shape[:-1], dtype=dtypes[0])),
        _On(device, torch.zeros(9, dtype=dtypes[0])),
    ]
