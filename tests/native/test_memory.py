"""Large results of native ops: their memory is handed from one that is let go to the next, never to two at a time."""

import gc

import pytest
import torch

from ppo_fast import build
from ppo_fast.ops.backends import LARGE_BYTES, large_empty

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the native kernels run on the CPU")
LARGE = LARGE_BYTES // 4  # elements of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_and_dtype(dtype: torch.dtype) -> None:
    for shape in ((3, 0), (2, 3), (LARGE,), (3, LARGE // 2)):
        tensor = large_empty(shape, dtype)
        assert tensor.shape == shape
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        tensor.fill_(1)
        assert tensor.double().sum().item() == tensor.numel()


def test_a_block_serves_again_only_when_it_is_let_go() -> None:
    first = large_empty((LARGE,), torch.float32).fill_(1)
    at = first.data_ptr()
    second = large_empty((LARGE,), torch.float32).fill_(2)
    assert second.data_ptr() != at
    view = first[7:9].requires_grad_()
    kept = view * 2
    del first, view
    third = large_empty((LARGE,), torch.float32)
    assert third.data_ptr() != at, "a view of it still lives, in a graph"
    kept.sum().backward()
    assert kept.tolist() == [2.0, 2.0]
    del kept
    gc.collect()
    again = large_empty((2, LARGE // 2), torch.float32)
    assert again.data_ptr() == at
    assert second.unique().tolist() == [2.0]


def test_another_size_gets_another_block() -> None:
    first = large_empty((LARGE,), torch.float32)
    del first
    larger = large_empty((3 * LARGE,), torch.float32)
    larger.fill_(1)
    smaller = large_empty((LARGE,), torch.float32)
    smaller.fill_(2)
    assert larger.unique().tolist() == [1.0]


def test_a_capsule_that_nobody_takes_gives_its_block_back() -> None:
    capsule = build.extension().large_block(4 * LARGE)
    at = torch.from_dlpack(capsule).data_ptr()
    del capsule  # its block was taken and let go
    untaken = build.extension().large_block(4 * LARGE)
    del untaken
    assert large_empty((LARGE,), torch.float32).data_ptr() == at


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="bytes is 0, expected 1 or more"):
        build.extension().large_block(0)
    with pytest.raises(MemoryError):
        build.extension().large_block(2**62)
