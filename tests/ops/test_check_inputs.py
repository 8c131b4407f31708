"""`check_inputs(True)` looks at the values too; by default a NaN is the caller's business."""

from collections.abc import Iterator

import pytest
import torch

import ppo_fast


@pytest.fixture
def _checked() -> Iterator[None]:
    previous = ppo_fast.check_inputs(True)
    yield
    ppo_fast.check_inputs(previous)


def float_arguments(call) -> list[str]:
    return [k for k, x in call.tensors.items() if x.is_floating_point() and k != "temperature"]


@pytest.mark.usefixtures("_checked")
def test_a_nan_that_counts_is_named(calls, op: str) -> None:
    call = calls.examples()[op]
    for name in float_arguments(call):
        bad = call.tensors[name].clone()
        bad.view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=f"^{op}: `{name}` holds nan at .*, expected a"):
            call(**{name: bad})


@pytest.mark.usefixtures("_checked")
def test_a_nan_under_a_false_mask_is_not(calls, masked_op: str) -> None:
    call = calls.examples()[masked_op]
    masked = call.tensors["mask"] == 0
    for name in call.covered:
        bad = call.tensors[name].clone()
        bad[masked] = torch.nan if bad.is_floating_point() else -100
        call(**{name: bad})


@pytest.mark.usefixtures("_checked")
def test_minus_infinity_is_a_logit_and_an_all_false_mask_is_fine(calls) -> None:
    call = calls.examples()["policy_loss_from_logits"]
    logits = call.tensors["logits"].clone()
    logits[..., (call.tensors["labels"][0, 0] + 1) % 7] = -torch.inf
    mask = torch.zeros_like(call.tensors["mask"])
    call(logits=logits, ref_logits=logits, mask=mask)
    ppo_fast.entropy_from_logits(logits)
    with pytest.raises(ValueError, match="`logits` holds inf"):
        ppo_fast.entropy_from_logits(-logits)


@pytest.mark.usefixtures("_checked")
def test_a_normalizer_tensor_is_looked_at() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="`normalizer` holds 0, expected above 0 and finite"):
        ppo_fast.policy_loss(x, x, x, x, normalizer=torch.tensor(0))


def test_the_default_lets_nan_through(calls) -> None:
    call = calls.examples()["gae"]
    assert call(rewards=call.tensors["rewards"] * torch.nan)[0].isnan().any()


def test_the_switch_returns_what_it_was_and_takes_a_bool() -> None:
    assert ppo_fast.check_inputs(True) is False
    assert ppo_fast.check_inputs(False) is True
    with pytest.raises(TypeError, match="`enabled` is a int, expected a bool"):
        ppo_fast.check_inputs(1)  # type: ignore[arg-type]
