"""Who computes: an implementation asked for by name runs or says why not; auto takes the fastest there is."""

import subprocess
import sys

import pytest
import torch

import ppo_fast
from ppo_fast.ops import dispatch

ROW_OPS = ("entropy_from_logits", "logprobs_and_entropy_from_logits", "logprobs_from_logits")


def test_an_implementation_that_is_not_there_is_an_error_with_the_reason(calls, op: str) -> None:
    call = calls.examples()[op]
    for impl in ("cpu", "triton", "cuda"):
        if impl in ppo_fast.available_impls(op):
            continue
        with pytest.raises(ValueError, match=f"^impl='{impl}' is not available for {op}: .+"):
            call(impl=impl)


def test_every_available_implementation_agrees_with_the_reference(calls, op: str) -> None:
    call = calls.examples(dtype=torch.float32)[op]
    impls = ppo_fast.available_impls(op)
    assert "reference" in impls
    truth = call.to(torch.float64).with_gradients()
    expected = calls.results(truth(impl="reference"))
    sum((x * (i + 1)).sum() for i, x in enumerate(expected) if x.requires_grad).backward()
    for impl in (*impls, "auto"):
        fast = call.with_gradients()
        got = calls.results(fast(impl=impl))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.double(), b.detach(), rtol=1e-5, atol=1e-5)
        sum((x * (i + 1)).sum() for i, x in enumerate(got) if x.requires_grad).backward()
        for name in call.learns:
            a, b = fast.tensors[name].grad, truth.tensors[name].grad
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_a_temperature_that_wants_a_gradient_is_a_constant_for_every_implementation(calls) -> None:
    for op in ROW_OPS:
        call = calls.examples(dtype=torch.float32)[op]
        tau = call.tensors["temperature"].clone().requires_grad_()
        expected = calls.results(call(impl="reference"))
        for impl in ppo_fast.available_impls(op):
            for a, b in zip(calls.results(call(temperature=tau, impl=impl)), expected, strict=True):
                assert not a.requires_grad
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def probe(answer: str | None) -> dispatch.Probe:
    return lambda tensor: answer


@pytest.mark.parametrize(
    ("table", "chosen"),
    [
        ({"cpu": probe(None), "triton": probe(None)}, "cpu"),
        ({"cpu": probe("no compiler"), "triton": probe(None)}, "reference"),
        ({}, "reference"),
    ],
)
def test_auto_on_a_cpu_takes_native_code_or_the_reference(monkeypatch, table: dict, chosen: str) -> None:
    monkeypatch.setitem(dispatch._TABLE, "gae", table)
    assert dispatch.resolve("gae", "auto", torch.zeros(1)) == chosen
    assert ppo_fast.available_impls("gae")[0] == chosen


def test_a_name_that_cannot_run_never_falls_back(monkeypatch) -> None:
    monkeypatch.setitem(dispatch._TABLE, "gae", {"cpu": probe("no compiler was there")})
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="impl='cpu' is not available for gae: no compiler was there"):
        ppo_fast.gae(x, x, x, impl="cpu")


def test_available_impls_knows_the_ops() -> None:
    with pytest.raises(ValueError, match="`op` is 'gea', expected one of"):
        ppo_fast.available_impls("gea")


def test_importing_and_running_the_reference_needs_torch_alone() -> None:
    code = (
        "import sys, torch, ppo_fast\n"
        "before = set(sys.modules)\n"
        "x = torch.zeros(1, 2)\n"
        "ppo_fast.logprobs_from_logits(x, torch.tensor([0]), impl='reference')\n"
        "ppo_fast.gae(x, x, x, impl='reference')\n"
        "heavy = {'triton', 'transformers', 'deepspeed', 'jsonargparse', 'ppo_fast.ppo'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
