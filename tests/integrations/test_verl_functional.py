"""verl.utils.torch_functional: our functions against verl's own."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import ppo_fast.integrations.verl as ours
from ppo_fast.integrations import contract

from .conftest import MASK_DTYPES, MASKS, autocast_on_a_gpu, masks

Check = Callable[..., None]
ROWS = [(5, 33), (2, 3, 50)]


def logits_and_labels(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = 4 * torch.randn(shape)
    logits.view(-1, shape[-1])[0, 3] = 12.0  # a peaked row
    return logits.to(dtype), torch.randint(shape[-1], shape[:-1])


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logprobs(verl: SimpleNamespace, same: Check, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels(shape, dtype)
    same(ours.logprobs_from_logits, verl.functional.logprobs_from_logits, logits, labels)
    flags = {"inplace_backward": False}
    same(
        lambda x, y: ours.logprobs_from_logits(x, y, **flags),
        lambda x, y: verl.functional.logprobs_from_logits(x, y, **flags),
        logits,
        labels,
    )


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logprobs_in_half_precision(
    verl: SimpleNamespace, no_worse_than_theirs: Check, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    logits, labels = logits_and_labels(shape, dtype)
    no_worse_than_theirs(ours.logprobs_from_logits, verl.functional.logprobs_from_logits, logits, labels)


def test_logprobs_of_logits_that_are_not_finite(verl: SimpleNamespace, same: Check) -> None:
    """Row 0 has impossible tokens, 1 its label among them, 2 nothing else, 3 a NaN.

    A row with a logit of +inf is NaN in ours and, in float32 alone, -inf in verl's: README.md of the integrations.
    """
    logits, labels = torch.randn(4, 9), torch.full((4,), 4)
    logits[0, :3] = logits[1, 4] = logits[2] = -torch.inf
    logits[3, 0] = torch.nan
    same(ours.logprobs_from_logits, verl.functional.logprobs_from_logits, logits, labels)


def test_logprobs_of_narrow_labels(verl: SimpleNamespace, same: Check) -> None:
    logits, labels = logits_and_labels((5, 33), torch.float32)
    same(ours.logprobs_from_logits, verl.functional.logprobs_from_logits, logits, labels.int())


def test_autocast_widens_what_it_widens_in_verl(verl: SimpleNamespace) -> None:
    """verl's engines score under autocast, which gives softmax in float32 on a GPU."""
    with autocast_on_a_gpu() as (logits, labels):
        for module in (ours, verl.functional):
            assert module.logprobs_from_logits(logits, labels).dtype == torch.float32
            assert module.entropy_from_logits(logits).dtype == torch.float32
            assert module.calculate_sum_pi_squared_from_logits(logits).dtype == torch.float32


def test_logprobs_of_a_view(verl: SimpleNamespace, same: Check) -> None:
    logits, labels = logits_and_labels((3, 6, 17), torch.float32)
    same(
        lambda x, y: ours.logprobs_from_logits(x[:, :-1], y[:, 1:]),
        lambda x, y: verl.functional.logprobs_from_logits(x[:, :-1], y[:, 1:]),
        logits,
        labels,
    )


def test_logprobs_where_flash_attn_would_run(
    verl: SimpleNamespace, same: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cross entropy gives float32 for every dtype, and 0 for a label of -100; here one in torch stands in."""

    def cross_entropy_loss(
        logits: Tensor, labels: Tensor, inplace_backward: bool = False
    ) -> tuple[Tensor, Tensor]:
        losses = torch.nn.functional.cross_entropy(
            logits.float(), labels, reduction="none", ignore_index=-100
        )
        return losses, torch.zeros_like(losses)

    for name in ("flash_attn", "flash_attn.ops", "flash_attn.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("flash_attn.ops.triton.cross_entropy")
    module.cross_entropy_loss = cross_entropy_loss
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(verl.functional, "cross_entropy_loss", cross_entropy_loss, raising=False)
    monkeypatch.setattr(verl.functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    contract.flash_attn_cross_entropy.cache_clear()
    try:
        logits, labels = logits_and_labels((2, 3, 50), torch.bfloat16)
        labels[0, 1] = -100
        same(ours.logprobs_from_logits, verl.functional.logprobs_from_logits, logits, labels)
        monkeypatch.setenv("VERL_DISABLE_FLASH_ATTN_CE", "1")
        assert ours.logprobs_from_logits(logits, labels.abs() % 50).dtype == torch.bfloat16
    finally:
        contract.flash_attn_cross_entropy.cache_clear()


ENTROPIES = {
    "entropy_from_logits": ROWS,
    "entropy_from_logits_with_chunking": [(5, 33), (1, 7)],
    "calculate_sum_pi_squared_from_logits": ROWS,
}
CASES = [(name, shape) for name, shapes in ENTROPIES.items() for shape in shapes]


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_a_row(
    verl: SimpleNamespace, same: Check, name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    same(getattr(ours, name), getattr(verl.functional, name), logits_and_labels(shape, dtype)[0])


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_functions_of_a_row_in_half_precision(
    verl: SimpleNamespace, same: Check, no_worse_than_theirs: Check, name: str, shape: tuple[int, ...]
) -> None:
    logits = logits_and_labels(shape, torch.bfloat16)[0]
    if name == "entropy_from_logits_with_chunking":  # in float32 throughout
        same(getattr(ours, name), getattr(verl.functional, name), logits, moving=0)
    else:
        no_worse_than_theirs(getattr(ours, name), getattr(verl.functional, name), logits)


@pytest.mark.parametrize("name", list(ENTROPIES))
def test_impossible_tokens_keep_what_verl_makes_of_them(
    verl: SimpleNamespace, same: Check, name: str
) -> None:
    logits = torch.randn(4, 9)
    logits[0, :3], logits[1, 0], logits[2, 0] = -torch.inf, torch.nan, torch.inf
    same(getattr(ours, name), getattr(verl.functional, name), logits, moving=0)


def test_entropy_without_strictness_is_that_of_the_possible_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "_strict", False)
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert abs(ours.entropy_from_logits(logits).item() - 0.6931472) < 1e-6


def test_chunked_entropy_takes_rows_only(verl: SimpleNamespace) -> None:
    for function in (
        verl.functional.entropy_from_logits_with_chunking,
        ours.entropy_from_logits_with_chunking,
    ):
        with pytest.raises(RuntimeError):
            function(torch.zeros(2, 3, 5))


def test_entropy_compiles_as_the_engines_compile_it(verl: SimpleNamespace) -> None:
    compiled = torch.compile(ours.entropy_from_logits, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        logits = torch.randn(rows, 17, requires_grad=True)
        expected = verl.functional.entropy_from_logits(logits)
        torch.testing.assert_close(compiled(logits), expected)
        torch.autograd.grad(compiled(logits).sum(), logits)


@pytest.mark.parametrize("mask_name", MASKS)
@pytest.mark.parametrize("mask_dtype", list(MASK_DTYPES.values()), ids=list(MASK_DTYPES))
@pytest.mark.parametrize("axis", [None, -1, 0, (0, 1), [1]])
@pytest.mark.parametrize("garbage", [1e4, torch.nan])
def test_masked_mean(
    verl: SimpleNamespace,
    same: Check,
    batch: Callable[..., list[Tensor]],
    mask_name: str,
    mask_dtype: torch.dtype,
    axis: object,
    garbage: float,
) -> None:
    mask = masks()[mask_name].to(mask_dtype)
    for dtype in (torch.float32, torch.bfloat16):
        (values,) = batch(1, mask, dtype, garbage)
        rough = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        same(
            lambda x: ours.masked_mean(x, mask, axis),
            lambda x: verl.functional.masked_mean(x, mask, axis),
            values,
            **rough,
        )


def test_masked_mean_of_weights_a_broadcast_and_integers(verl: SimpleNamespace, same: Check) -> None:
    weights = torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, 0.25]])
    values = torch.randn(2, 3)
    for mask in (weights, weights[:1], torch.tensor([[3, 0, 1], [0, 0, 2]])):
        same(
            lambda x, m=mask: ours.masked_mean(x, m),
            lambda x, m=mask: verl.functional.masked_mean(x, m),
            values,
        )
    whole = torch.tensor([[1, 2, 3]])
    one = torch.ones(1, 3)
    assert ours.masked_mean(whole, one) == verl.functional.masked_mean(whole, one) == 2.0


@pytest.mark.parametrize("mask_name", MASKS[:-1])
@pytest.mark.parametrize("mask_dtype", list(MASK_DTYPES.values()), ids=list(MASK_DTYPES))
@pytest.mark.parametrize("garbage", [1e2, torch.nan])
def test_masked_var_and_whiten(
    verl: SimpleNamespace,
    same: Check,
    batch: Callable[..., list[Tensor]],
    mask_name: str,
    mask_dtype: torch.dtype,
    garbage: float,
) -> None:
    mask = masks()[mask_name].to(mask_dtype)
    (values,) = batch(1, mask, torch.float32, garbage)
    moving = int(garbage == garbage)  # under NaN, verl's gradient is NaN everywhere and ours is not
    for flag in (True, False):
        same(
            lambda x, f=flag: ours.masked_var(x, mask, unbiased=f),
            lambda x, f=flag: verl.functional.masked_var(x, mask, unbiased=f),
            values,
            moving=moving,
        )
        same(
            lambda x, f=flag: ours.masked_whiten(x, mask, shift_mean=f),
            lambda x, f=flag: verl.functional.masked_whiten(x, mask, shift_mean=f),
            values,
            moving=moving,
            rtol=1e-4,
        )
    (rough,) = batch(1, mask, torch.bfloat16)
    assert ours.masked_whiten(rough, mask).dtype == verl.functional.masked_whiten(rough, mask).dtype


@pytest.mark.parametrize("counted", [0, 1])
def test_masked_var_of_too_few_raises(verl: SimpleNamespace, counted: int) -> None:
    values, mask = torch.randn(1, 4), torch.tensor([[counted, 0, 0, 0]])
    for functions in (verl.functional, ours):
        for name in ("masked_var", "masked_whiten"):
            with pytest.raises(ValueError, match="At least one element|The sum of the mask is one"):
                getattr(functions, name)(values, mask)
    biased = [f.masked_var(values, mask, unbiased=False) for f in (ours, verl.functional)]
    assert biased[0] == biased[1] == 0


def test_masked_var_of_weights(verl: SimpleNamespace, same: Check) -> None:
    values, weights = torch.randn(2, 3), torch.tensor([[0.5, 0.0, 2.0], [1.0, 1.0, 0.25]])
    for flag in (True, False):
        same(
            lambda x, f=flag: ours.masked_var(x, weights, f),
            lambda x, f=flag: verl.functional.masked_var(x, weights, f),
            values,
        )
