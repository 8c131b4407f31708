"""Every option of every op reaches the formula: set to something unusual it changes the result, as the oracle's."""

import inspect
from typing import Any

import pytest
import torch

import ppo_fast
from ppo_fast import reference

HALF = torch.full((4, 5), 0.5, dtype=torch.float64)
RANDOM = torch.Generator().manual_seed(3)
DENSE = torch.randn(4, 5, generator=RANDOM, dtype=torch.float64)
PER_ROW = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
CHANGES_NO_NUMBER = {"inplace_backward", "chunk_rows", "compact"}

TEMPERATURE = {"temperature": HALF}
SURROGATE = {
    "clip_low": 0.01,
    "clip_high": 0.01,
    "dual_clip": 1.01,
    "reduction": "seq-mean-token-sum",
    "normalizer": 3.5,
    "log_ratio_clamp": 0.1,
}
SHAPING = {
    "kl_coef": 0.7,
    "clip_score": 0.01,
    "kind": "k2",
    "score_index": torch.tensor([0, 0, 1, 0]),
    "token_rewards": DENSE,
}
SCAN = {"gamma": 0.5, "lam": 0.4, "mask_rule": "multiply", "bootstrap": PER_ROW}
HEAD = {"bias": torch.arange(7).double(), "softcap": 0.5, "chunk_rows": 2, "compact": False}
REF_HEAD = {"ref_bias": -torch.arange(7).double()}
REF_LOGITS = torch.zeros(4, 5, 7, dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "logprobs_from_logits": TEMPERATURE,
    "logprobs_and_entropy_from_logits": TEMPERATURE,
    "entropy_from_logits": TEMPERATURE,
    "kl_from_logits": TEMPERATURE,
    "policy_loss_from_logits": {
        **SURROGATE,
        **TEMPERATURE,
        "entropy_coef": 0.9,
        "kl_coef": 0.8,
        "ref_logits": REF_LOGITS,
        "inplace_backward": True,
    },
    "linear_logprobs": {**HEAD, **TEMPERATURE, "return_entropy": False},
    "linear_kl": {**HEAD, **REF_HEAD, **TEMPERATURE},
    "linear_policy_loss": {
        **HEAD,
        **REF_HEAD,
        **SURROGATE,
        **TEMPERATURE,
        "entropy_coef": 0.9,
        "kl_coef": 0.8,
        "ref_hidden": torch.ones(4, 5, 3, dtype=torch.float64),
        "ref_weight": torch.arange(21).double().view(7, 3) / 7,
    },
    "kl_estimate": {"kind": "k2", "input_clamp": 0.1, "output_clamp": 0.01},
    "kl_shaped_rewards": SHAPING,
    "gae": SCAN,
    "shaped_gae": {**SHAPING, **SCAN, "whiten": False, "unbiased": True},
    "masked_mean": {"axis": 0},
    "masked_var": {"axis": 1, "unbiased": True},
    "masked_whiten": {"unbiased": True},
    "masked_rescale": {"unbiased": True},
    "policy_loss": {**SURROGATE, "reduction": "token-sum"},
    "value_loss": {"clip": 0.01, "reduction": "token-sum", "normalizer": 3.5},
}
TESTED_ELSEWHERE = {"cu_seqlens", "group"}


def test_the_table_holds_every_option(op: str) -> None:
    parameters = inspect.signature(getattr(ppo_fast, op)).parameters.values()
    options = {p.name for p in parameters if p.default is not inspect.Parameter.empty}
    assert set(OPTIONS[op]) == options - {"impl"} - TESTED_ELSEWHERE


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in OPTIONS.items() for option in options]
)
def test_an_option_changes_the_result_as_it_changes_the_oracles(calls, name: str, option: str) -> None:
    call = calls.examples()[name]
    change = {option: OPTIONS[name][option]}
    plain, changed = (calls.results(call(**x, impl="reference")) for x in ({}, change))
    arguments = {**call.tensors, **call.options, **change}
    for a, b in zip(changed, calls.results(getattr(reference, name)(**arguments)), strict=True):
        assert torch.equal(a, b)
    same = len(plain) == len(changed) and all(map(torch.equal, plain, changed))
    assert same == (option in CHANGES_NO_NUMBER)
