"""Every bad input raises before any work, and the message names the op, the argument, what came, what was wanted."""

import inspect
from typing import Any

import pytest
import torch

import ppo_fast

NAN, INF = float("nan"), float("inf")
BAD_SHAPE = torch.zeros(2, 9)
INTS = torch.zeros(4, 5, dtype=torch.int64)

VALUE_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    (
        "logprobs_from_logits",
        {"labels": INTS[:2]},
        r"`labels` has shape \(2, 5\), expected \(4, 5\) \(logits w",
    ),
    ("logprobs_from_logits", {"temperature": 0.0}, "`temperature` is 0.0, expected a number above 0"),
    ("logprobs_from_logits", {"temperature": NAN}, "`temperature` is nan, expected a finite number"),
    ("logprobs_from_logits", {"temperature": torch.ones(4)}, r"`temperature` has shape \(4,\)"),
    ("logprobs_from_logits", {"temperature": torch.zeros(4, 5)}, r"`temperature` holds 0.0 at \(0, 0\)"),
    ("logprobs_from_logits", {"labels": INTS + 7}, r"`labels` holds 7 at \(0, 0\), expected in \[0, 7\)"),
    ("logprobs_from_logits", {"labels": INTS - 100}, "`labels` holds -100"),
    ("logprobs_from_logits", {"logits": torch.zeros(4, 5, 0)}, "expected a vocabulary of at least 1"),
    ("entropy_from_logits", {"logits": torch.tensor(1.0)}, "`logits` has no dimensions"),
    ("entropy_from_logits", {"impl": "fastest"}, "`impl` is 'fastest', expected one of auto, reference, cpu"),
    ("kl_from_logits", {"ref_logits": torch.zeros(4, 5, 6)}, r"`ref_logits` has shape \(4, 5, 6\)"),
    ("linear_logprobs", {"weight": torch.zeros(7, 4)}, r"`weight` has shape \(7, 4\), expected \(7, 3\)"),
    ("linear_logprobs", {"weight": torch.zeros(7)}, r"`weight` has shape \(7,\), expected \[V, D\]"),
    ("linear_logprobs", {"bias": torch.zeros(6)}, r"`bias` has shape \(6,\), expected \(7,\)"),
    ("linear_logprobs", {"softcap": 0.0}, "`softcap` is 0.0, expected a number above 0"),
    ("linear_logprobs", {"labels": INTS + 7}, "`labels` holds 7"),
    ("linear_kl", {"ref_weight": torch.zeros(8, 3)}, r"`ref_weight` has shape \(8, 3\), expected \(7, 3\)"),
    (
        "linear_kl",
        {"ref_hidden": torch.zeros(3, 3)},
        r"`ref_hidden` has shape \(3, 3\), expected \(4, 5, 3\)",
    ),
    ("linear_policy_loss", {"hidden": torch.zeros(4, 3)}, r"`hidden` has shape \(4, 3\), expected 3 dimen"),
    ("policy_loss_from_logits", {"logits": torch.zeros(4, 7)}, r"`logits` has shape \(4, 7\), expected 3"),
    (
        "policy_loss_from_logits",
        {"ref_logits": None},
        "`ref_logits` is None, expected a tensor, since `kl_coef`",
    ),
    ("policy_loss_from_logits", {"entropy_coef": NAN}, "`entropy_coef` is nan"),
    ("policy_loss_from_logits", {"kl_coef": INF}, "`kl_coef` is inf"),
    ("policy_loss_from_logits", {"labels": INTS + 7}, r"`labels` holds 7 at \(0, 0\)"),
    (
        "policy_loss_from_logits",
        {"old_logprobs": BAD_SHAPE},
        r"`old_logprobs` has shape \(2, 9\), expected \(4, 5\)",
    ),
    ("kl_estimate", {"ref_logprobs": BAD_SHAPE}, r"`ref_logprobs` has shape \(2, 9\)"),
    ("kl_estimate", {"kind": "k4"}, "`kind` is 'k4', expected one of k1, k2, k3, abs"),
    ("kl_estimate", {"output_clamp": -1.0}, "`output_clamp` is -1.0, expected a number above 0"),
    (
        "kl_shaped_rewards",
        {"scores": torch.zeros(5)},
        r"`scores` has shape \(5,\), expected \(4,\) \(one for each",
    ),
    ("kl_shaped_rewards", {"clip_score": 0.0}, "`clip_score` is 0.0"),
    ("kl_shaped_rewards", {"kl_coef": NAN}, "`kl_coef` is nan"),
    ("kl_shaped_rewards", {"token_rewards": BAD_SHAPE}, "`token_rewards` has shape"),
    (
        "kl_shaped_rewards",
        {"score_index": torch.tensor([0, 1, 1, 0])},
        "`score_index` holds 1 at 1, expected a slot",
    ),
    ("kl_shaped_rewards", {"score_index": torch.tensor([5, 0, 1, 0])}, "holds 5 at 0"),
    ("kl_shaped_rewards", {"score_index": torch.tensor([-1, 0, 1, 0])}, "holds -1 at 0"),
    ("gae", {"values": BAD_SHAPE}, r"`values` has shape \(2, 9\), expected \(4, 5\) \(shape of rewards\)"),
    ("gae", {"mask": BAD_SHAPE}, r"`mask` has shape \(2, 9\)"),
    ("gae", {"gamma": 1.01}, "`gamma` is 1.01, expected at most 1"),
    ("gae", {"lam": -0.1}, "`lam` is -0.1, expected at least 0"),
    ("gae", {"gamma": torch.ones(3)}, r"`gamma` has shape \(3,\), expected \(4,\)"),
    ("gae", {"lam": torch.tensor([1, 1, NAN, 1])}, "`lam` holds nan at 2, expected between 0 and 1"),
    ("gae", {"mask_rule": "skip"}, "`mask_rule` is 'skip', expected one of carry, multiply, none"),
    ("gae", {"bootstrap": torch.zeros(5)}, "`bootstrap` has shape"),
    ("gae", {"rewards": torch.zeros(4)}, r"`rewards` has shape \(4,\), expected \[B, T\] \(or packed"),
    ("gae", {"cu_seqlens": torch.tensor([0, 20])}, "`rewards` has shape .*, expected packed"),
    (
        "shaped_gae",
        {"values": BAD_SHAPE},
        r"`values` has shape \(2, 9\), expected \(4, 5\) \(shape of logprobs",
    ),
    ("masked_mean", {"axis": 2}, r"`axis` is 2, expected an axis of x, in \[-2, 2\)"),
    ("masked_whiten", {"mask": BAD_SHAPE}, "`mask` has shape"),
    ("policy_loss", {"clip_low": 1.5}, "`clip_low` is 1.5, expected at most 1"),
    ("policy_loss", {"clip_high": -0.1}, "`clip_high` is -0.1, expected at least 0"),
    ("policy_loss", {"dual_clip": 1.0}, "`dual_clip` is 1.0, expected a number above 1"),
    ("policy_loss", {"reduction": "mean"}, "`reduction` is 'mean', expected one of token-mean, seq-mean"),
    ("policy_loss", {"normalizer": 0.0}, "`normalizer` is 0.0, expected a number above 0"),
    ("policy_loss", {"normalizer": torch.ones(2)}, r"`normalizer` has shape \(2,\), expected \(\)"),
    ("policy_loss", {"log_ratio_clamp": INF}, "`log_ratio_clamp` is inf"),
    ("policy_loss", {"advantages": torch.zeros(4)}, r"`advantages` has shape \(4,\)"),
    ("value_loss", {"clip": 0.0}, "`clip` is 0.0, expected a number above 0"),
    ("value_loss", {"returns": BAD_SHAPE}, "`returns` has shape"),
]

TYPE_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("logprobs_from_logits", {"logits": INTS}, "`logits` has dtype torch.int64, expected a floating dtype"),
    ("logprobs_from_logits", {"logits": [1.0]}, "`logits` is a list, expected a torch.Tensor"),
    ("logprobs_from_logits", {"labels": INTS.int()}, "`labels` has dtype torch.int32, expected torch.int64"),
    ("logprobs_from_logits", {"temperature": "hot"}, "`temperature` is a str, expected a number"),
    ("logprobs_from_logits", {"temperature": INTS}, "`temperature` has dtype torch.int64"),
    ("kl_from_logits", {"ref_logits": None}, "`ref_logits` is a NoneType, expected a torch.Tensor"),
    ("linear_logprobs", {"weight": None}, "`weight` is a NoneType"),
    ("linear_logprobs", {"return_entropy": 1}, "`return_entropy` is a int, expected a bool"),
    ("linear_kl", {"ref_hidden": None}, "`ref_hidden` is a NoneType"),
    ("linear_kl", {"ref_hidden": [0.0]}, "`ref_hidden` is a list, expected a torch.Tensor"),
    ("linear_policy_loss", {"ref_hidden": None}, "`ref_hidden` is a NoneType, .* a torch.Tensor for the KL"),
    ("linear_policy_loss", {"ref_weight": None, "kl_coef": 0.0}, "`ref_weight` is a NoneType"),
    ("policy_loss_from_logits", {"inplace_backward": "yes"}, "`inplace_backward` is a str, expected a bool"),
    ("kl_shaped_rewards", {"scores": 1.0}, "`scores` is a float, expected a torch.Tensor"),
    ("kl_shaped_rewards", {"score_index": torch.zeros(4)}, "`score_index` has dtype torch.float32"),
    ("gae", {"values": INTS}, "`values` has dtype torch.int64"),
    ("gae", {"gamma": True}, "`gamma` is a bool, expected a number"),
    ("gae", {"mask": torch.zeros(4, 5, dtype=torch.complex64)}, "`mask` has dtype torch.complex64"),
    ("gae", {"mask": None}, "`mask` is a NoneType"),
    ("shaped_gae", {"whiten": 1}, "`whiten` is a int, expected a bool"),
    ("masked_var", {"unbiased": 1}, "`unbiased` is a int, expected a bool"),
    ("masked_mean", {"axis": 1.0}, "`axis` is a float, expected an int or None"),
    ("policy_loss", {"clip_low": None}, "`clip_low` is a NoneType, expected a number"),
    ("policy_loss", {"clip_low": torch.tensor(0.2)}, "`clip_low` is a Tensor, expected a number"),
    ("policy_loss", {"normalizer": torch.tensor(True)}, "`normalizer` has dtype torch.bool"),
]


@pytest.mark.parametrize(("name", "change", "message"), VALUE_ERRORS)
def test_wrong_values(calls, name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        calls.examples(dtype=torch.float32)[name](**change)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(("name", "change", "message"), TYPE_ERRORS)
def test_wrong_types(calls, name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message) as caught:
        calls.examples(dtype=torch.float32)[name](**change)
    assert str(caught.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        (
            torch.tensor([0, 3, 2, 4]),
            r"`cu_seqlens` is \[0, 3, 2, 4\], expected values that rise from 0 to 4",
        ),
        (torch.tensor([1, 4]), "rise from 0 to 4"),
        (torch.tensor([0, 3]), "rise from 0 to 4"),
        (torch.tensor([0]), r"`cu_seqlens` has shape \(1,\), expected \[B \+ 1\]"),
        (torch.tensor([[0, 4]]), r"`cu_seqlens` has shape \(1, 2\)"),
    ],
)
def test_bad_cu_seqlens(cu: torch.Tensor, message: str) -> None:
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=message):
        ppo_fast.gae(x, x, x, cu_seqlens=cu)


def test_cu_seqlens_must_be_integers() -> None:
    x = torch.zeros(4)
    with pytest.raises(
        TypeError, match=r"`cu_seqlens` has dtype torch.float32, expected torch.int32 or torch.int64"
    ):
        ppo_fast.policy_loss(x, x, x, x, cu_seqlens=torch.tensor([0.0, 4.0]))


def test_every_tensor_must_be_on_the_device_of_the_first(calls, op: str) -> None:
    call = calls.examples()[op]
    others = list(call.tensors)[1:]
    for name in others:
        with pytest.raises(ValueError, match=f"`{name}` is on meta, expected cpu, where"):
            call(**{name: call.tensors[name].to("meta")})


def test_a_required_tensor_must_be_there(calls, op: str) -> None:
    call = calls.examples()[op]
    parameters = inspect.signature(getattr(ppo_fast, op)).parameters
    required = [name for name in call.tensors if parameters[name].default is inspect.Parameter.empty]
    assert required
    for name in required:
        with pytest.raises(TypeError, match=f"^{op}: `{name}` is a NoneType, expected a torch.Tensor"):
            call(**{name: None})


def test_labels_may_be_anything_where_the_mask_is_false(calls) -> None:
    for name in ("policy_loss_from_logits", "linear_policy_loss"):
        call = calls.examples()[name]
        labels = torch.where(call.tensors["mask"] != 0, call.tensors["labels"], -100)
        assert torch.isfinite(call(labels=labels).loss)
