"""`selective_log_softmax` and `entropy_from_logits` against those of TRL 1.12."""

from collections.abc import Callable

import pytest
import torch
from trl.trainer import utils as theirs

from ppo_fast.integrations.trl import ppo as ours

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Check = Callable[..., None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (6, 1031), (3, 5, 257), (2, 3, 2, 64)], ids=str)
@pytest.mark.parametrize("picks", [None, 1, 8])
def test_selective_log_softmax(
    same: Check, dtype: torch.dtype, shape: tuple[int, ...], picks: int | None
) -> None:
    logits = (4 * torch.randn(*shape)).to(dtype)
    index = torch.randint(shape[-1], (*shape[:-1], *([] if picks is None else [picks])))
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits], index)


def test_confident_rows(same: Check) -> None:
    logits = torch.randn(4, 7, 300)
    logits[..., 5] += 30
    index = torch.full((4, 7), 5)
    for dtype in DTYPES:
        same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits.to(dtype)], index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_as_the_trainer_takes_it(same: Check, dtype: torch.dtype) -> None:
    """logits[:, P - 1 : -1] divided in place, with the responses as labels."""
    full = torch.randn(3, 12, 97).to(dtype)
    index = torch.randint(97, (3, 7))

    def sliced(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(leaf: torch.Tensor) -> torch.Tensor:
            logits = (leaf * 1)[:, 4:-1]
            logits /= 0.7 + 1e-7
            return function(logits, index)

        return call

    same(sliced(ours.selective_log_softmax), sliced(theirs.selective_log_softmax), [full])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impossible_tokens_and_nan(same: Check, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 3, 40)
    logits[0, :, 7:] = -torch.inf
    logits[1, 1, 3] = torch.nan
    logits[2, 2] = -torch.inf
    index = torch.randint(40, (4, 3))
    logits, many = logits.to(dtype), torch.randint(40, (4, 3, 5))
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits], index, gradients=False)
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits], many, gradients=False)
    same(ours.entropy_from_logits, theirs.entropy_from_logits, [logits], gradients=False)
    finite = logits[3:]
    same(ours.entropy_from_logits, theirs.entropy_from_logits, [finite])


def test_an_index_of_int32(same: Check) -> None:
    index = torch.randint(40, (4, 3), dtype=torch.int32)
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [torch.randn(4, 3, 40)], index)


def test_under_autocast(same: Check) -> None:
    logits, index = torch.randn(3, 5, 64), torch.randint(64, (3, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            same(ours.selective_log_softmax, theirs.selective_log_softmax, [logits.to(dtype)], index)
            same(ours.entropy_from_logits, theirs.entropy_from_logits, [logits.to(dtype)])


@pytest.mark.parametrize(
    ("logits", "index"),
    [
        (torch.randn(2, 3, 5), torch.tensor([[0, 1, 5], [0, 1, 2]])),
        (torch.randn(2, 3, 5), torch.tensor([[0, 1, -1], [0, 1, 2]])),
        (torch.randn(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64)),
        (torch.randn(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64)),
        (torch.randn(2, 3, 5).long(), torch.zeros(2, 3, dtype=torch.int64)),
    ],
    ids=["past the vocabulary", "negative", "too long", "no sequence", "integer logits"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors(same_error: Check, logits: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> None:
    logits = logits.to(dtype) if logits.is_floating_point() else logits
    same_error(ours.selective_log_softmax, theirs.selective_log_softmax, logits, index)


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 3, 5)], ids=str)
def test_no_token(same: Check, shape: tuple[int, ...]) -> None:
    index = torch.zeros(shape[:-1], dtype=torch.int64)
    same(ours.selective_log_softmax, theirs.selective_log_softmax, [torch.randn(shape)], index)
    same(ours.entropy_from_logits, theirs.entropy_from_logits, [torch.randn(shape)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(768,), (1, 1), (5, 768), (3, 4, 257), (2, 3, 2, 64)], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 16, 128])
def test_entropy(same: Check, dtype: torch.dtype, shape: tuple[int, ...], chunk_size: int) -> None:
    same(
        ours.entropy_from_logits,
        theirs.entropy_from_logits,
        [torch.randn(shape).to(dtype)],
        chunk_size=chunk_size,
    )


def test_entropy_errors(same_error: Check) -> None:
    same_error(ours.entropy_from_logits, theirs.entropy_from_logits, torch.randn(3, 4), chunk_size=-1)
    same_error(ours.entropy_from_logits, theirs.entropy_from_logits, torch.randn(()))
    same_error(ours.entropy_from_logits, theirs.entropy_from_logits, torch.zeros(3, 4, dtype=torch.int64))
