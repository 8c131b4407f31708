"""What stands in a masked slot reaches nothing: results, statistics and gradients stay the same bit for bit."""

import math
import warnings

import pytest
import torch

FLOAT_GARBAGE = [math.nan, math.inf, -math.inf, 1e30]
LABEL_GARBAGE = [-100, 2**40, -1, 7]


@pytest.mark.parametrize("which", range(4), ids=["nan", "inf", "-inf", "huge"])
def test_garbage_in_masked_slots_changes_no_bit(calls, masked_op: str, which: int) -> None:
    clean = calls.examples(dtype=torch.float32)[masked_op].with_gradients()
    dirty = clean.with_gradients()
    masked = clean.tensors["mask"] == 0
    with torch.no_grad():
        for name in clean.covered:
            x = dirty.tensors[name]
            garbage = FLOAT_GARBAGE if x.is_floating_point() else LABEL_GARBAGE
            x[masked] = garbage[which]
    outs = [calls.results(call()) for call in (clean, dirty)]
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the detector warns that it is slow
        with torch.autograd.detect_anomaly():  # not even a NaN that is masked out later
            for call in (clean, dirty):
                sum(x.sum() for x in calls.differentiable(call())).backward()
    for name in clean.learns:
        a, b = clean.tensors[name].grad, dirty.tensors[name].grad
        assert torch.equal(a, b), name
        if name in clean.covered:
            assert torch.equal(a[masked], torch.zeros_like(a[masked]))


def test_masked_slots_of_results_are_zero(calls, masked_op: str) -> None:
    call = calls.examples()[masked_op]
    masked = call.tensors["mask"] == 0
    for x in calls.results(call()):
        if x.shape == masked.shape:
            assert torch.equal(x[masked], torch.zeros_like(x[masked]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.int32])
def test_any_nonzero_mask_value_counts_once(calls, masked_op: str, dtype: torch.dtype) -> None:
    call = calls.examples()[masked_op]
    weighted = call.tensors["mask"] if dtype == torch.bool else 3 * call.tensors["mask"]
    for a, b in zip(calls.results(call()), calls.results(call(mask=weighted.to(dtype))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["carry", "multiply", "none"])
@pytest.mark.parametrize("op_name", ["gae", "shaped_gae"])
def test_no_gae_rule_reads_a_masked_slot(calls, op_name: str, rule: str) -> None:
    call = calls.examples()[op_name]
    masked = call.tensors["mask"] == 0
    dirty = {name: call.tensors[name].masked_fill(masked, math.nan) for name in call.covered}
    clean, got = call(mask_rule=rule), call(mask_rule=rule, **dirty)
    for a, b in zip(calls.results(clean), calls.results(got), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["carry", "multiply", "none"])
def test_the_score_and_bootstrap_of_a_row_without_tokens_are_never_read(calls, rule: str) -> None:
    clean = calls.examples()["shaped_gae"].with_gradients()
    dirty = clean.with_gradients()
    empty = ~clean.tensors["mask"].bool().any(dim=1)
    assert empty.sum() == 1
    with torch.no_grad():
        for name in ("scores", "bootstrap"):
            dirty.tensors[name][empty] = math.nan
    for a, b in zip(calls.results(clean(mask_rule=rule)), calls.results(dirty(mask_rule=rule)), strict=True):
        assert torch.equal(a, b)
    sum(x.sum() for x in calls.differentiable(dirty(mask_rule=rule, whiten=False))).backward()
    for name in ("scores", "bootstrap"):
        grad = dirty.tensors[name].grad
        assert torch.isfinite(grad).all()
        assert grad[empty].item() == 0.0
