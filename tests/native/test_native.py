"""What only the native CPU backend does: threads, instruction sets, its exp, its checks."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops import fused_logprob

C = build.extension()
ISAS = C.supported_isas()
HALVES = [torch.bfloat16, torch.float16]


def outputs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    logprobs, entropy = fused_logprob.logprobs_and_entropy(logits, labels, 0.8, "cpu")
    grads = torch.linspace(-1, 1, labels.numel(), dtype=logprobs.dtype).reshape(labels.shape)
    (gradient,) = torch.autograd.grad([logprobs, entropy], logits, [grads, grads.flip(0)])
    return logprobs.detach(), entropy.detach(), gradient


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_thread_count_changes_nothing(threads: int) -> None:
    logits, labels = torch.randn(37, 5003), torch.randint(5003, (37,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outputs(logits, labels)
        torch.set_num_threads(threads)
        many = outputs(logits, labels)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


AFTER_A_FORK = """
import os, torch, ppo_fast
torch.set_num_threads(2)
logits, labels = torch.randn(64, 4099), torch.randint(4099, (64,))
expected = ppo_fast.logprobs_from_logits(logits, labels, impl="cpu")
child = os.fork()
if child == 0:
    same = torch.equal(ppo_fast.logprobs_from_logits(logits, labels, impl="cpu"), expected)
    os._exit(0 if same else 1)
print("the child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_child_of_a_fork_has_threads_too() -> None:
    """It inherits none of those that the parent's calls ran on, and must not wait for them."""
    run = subprocess.run(
        [sys.executable, "-c", AFTER_A_FORK], capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout.strip() == "the child ended with 0"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_instruction_sets_agree(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They add in different orders, no more: a few roundings in float32, half-ulp ties in a half's gradient."""
    logits, labels = (torch.randn(5, 1031) * 3).to(dtype), torch.randint(1031, (5,))
    truth = outputs(logits.double(), labels)
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    assert build.build_info()["isa"] == isa
    got = outputs(logits, labels)
    for name, a, b in zip(("logprobs", "entropy", "gradient"), got, truth, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(
            a.double(), b, rtol=8 * eps, atol=4 * eps, msg=lambda m, n=name: f"{n}: {m}"
        )


def exp_of(x: Tensor, isa: str, temperature: float = 1.0, halves: bool = False) -> Tensor:
    y = torch.full_like(x, torch.nan)
    C.exp_float32(
        x=x.data_ptr(), y=y.data_ptr(), n=x.numel(), temperature=temperature, halves=halves, isa=isa
    )
    return y


EXP_ERROR = {"avx512": 1.8e-7, "avx2": 1e-7, "portable": 1e-7}  # as lanes.h states, relative


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("halves", [False, True], ids=["floats", "halves"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.1, 1e-4])
def test_exp_error(isa: str, halves: bool, temperature: float) -> None:
    """Down to the least normal float. But for AVX-512 and float, d / T carries its rounding and that of 1 / T."""
    d = torch.cat(
        [torch.linspace(-87.3365, 0, 1_000_001), -torch.rand(1000) * 1e-6, torch.tensor([0.0, -0.0])]
    )
    x = d * temperature
    z = x.double() / temperature
    inside = z >= -87.3365
    y, truth = exp_of(x, isa, temperature, halves).double(), z.exp()
    exact = temperature == 1.0 if isa != "avx512" else not halves
    allowed = EXP_ERROR[isa] + (0.0 if exact else 2.0**-23) * z.abs()
    error = (y - truth).abs() / truth
    assert bool((error < allowed)[inside].all()), (error / allowed)[inside].max()
    assert y[-1].item() == 1.0


# A sum of n numbers in lanes of floats that are added in double every 2 KiB: 16 to 128 of them in a chain, and so a few
# roundings whatever n is.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0], ids=["flat", "wide", "peaked"])
def test_error_of_the_sums(
    isa: str, dtype: torch.dtype, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the largest vocabulary: log sum and mean, by logprob and entropy, to 4 units in the last place of float."""
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    logits, labels = (torch.randn(2, 262144) * spread - 30).to(dtype), torch.tensor([0, 262143])
    truth = outputs(logits.double(), labels)
    for name, a, b in zip(("logprobs", "entropy"), outputs(logits, labels)[:2], truth[:2], strict=True):
        eps = torch.finfo(a.dtype).eps
        allowed = 4 * eps * b.abs().clamp(min=1.0)
        assert bool(((a.double() - b).abs() <= allowed).all()), f"{name}: {a} is not {b}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_every_width(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tail of a register, a step and a block of them, and blocks whose successor is whole or not."""
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    edges = [block + beside for block in (256, 512, 1024, 2048, 3072) for beside in (-1, 0, 1, 33)]
    for vocab in [*range(1, 70), *edges]:
        logits, labels = (torch.randn(2, vocab) * 3).to(dtype), torch.randint(vocab, (2,))
        got = outputs(logits, labels)
        for a, b in zip(got, outputs(logits.double(), labels), strict=True):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(
                a.double(), b, rtol=8 * eps, atol=4 * eps, msg=lambda m, v=vocab: f"V={v}: {m}"
            )
        alone = fused_logprob.logprobs(logits, labels, 0.8, "cpu")
        assert torch.equal(alone, got[0]), f"V={vocab}: the logprob without its entropy differs"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES)
def test_the_maximum_of_halves_by_their_bits(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All negative, with zeros of both signs, infinities and NaNs of both signs: a wrong top overflows or is lost."""
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    negative = -torch.rand(4, 1500) * 1000 - 300
    negative[1, 77] = -0.0
    negative[2, 1400:] = -torch.inf
    negative[3, :1100] = -torch.inf
    labels = torch.tensor([3, 77, 5, 1200])
    got = outputs(negative.to(dtype), labels)
    for a, b in zip(got, outputs(negative.to(dtype).double(), labels), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6 if a.dtype == torch.float32 else 1e-2, atol=1e-6)
    for nan in (math.nan, -math.nan):
        broken = negative.clone()
        broken[:, 1300] = torch.tensor(nan).copysign(torch.tensor(nan))
        assert bool(outputs(broken.to(dtype), labels)[0].isnan().all())


@pytest.mark.parametrize("isa", ISAS)
def test_exp_at_the_edge(isa: str) -> None:
    payload = torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor([-87.34, -104.0, -1e30, -math.inf]), payload])
    y = exp_of(x, isa)
    assert 0.0 <= y[0].item() < torch.finfo(torch.float32).tiny
    assert y[1:4].tolist() == [0.0] * 3
    assert bool(y[4:].isnan().all())  # a NaN's payload must not leak into the exponent


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_round_to_nearest_even(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of V = 2 rows at p = 1/2 is g / 2 and -g / 2: any float can be sent through the store."""
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    g = torch.cat(
        [torch.randn(4000) * 10.0 ** torch.randint(-9, 5, (4000,)), torch.tensor([2 * 65519.9, 2 * 65520.0])]
    )
    g = torch.cat(
        [g, 2 + torch.arange(64) * 2.0**-11, torch.arange(64) * 2.0**-25]
    )  # ties; subnormals of float16
    logits = torch.zeros(len(g), 2, dtype=dtype, requires_grad=True)
    logprobs, _ = fused_logprob.logprobs_and_entropy(
        logits, torch.zeros(len(g), dtype=torch.int64), 1.0, "cpu"
    )
    (gradient,) = torch.autograd.grad(logprobs, logits, g)
    assert torch.equal(gradient, torch.stack([g / 2, -g / 2], 1).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0**-24], ids=["normal", "subnormal"])
def test_every_float16_is_read_right(isa: str, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a partner of 0 the logprob is -log(1 + e^(-x/T)), which tells apart all x within some 80 T of 0."""
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    x = torch.arange(65536).to(torch.int16).view(torch.float16)
    x = x[x.isfinite()]
    logits = torch.stack([x, torch.zeros_like(x)], 1)
    labels = torch.zeros(len(x), dtype=torch.int64)
    logprobs, _ = fused_logprob.logprobs_and_entropy(logits, labels, temperature, "cpu")
    z = x.double() / temperature
    truth = z.clamp(max=0) - torch.log1p(torch.exp(-z.abs()))
    # The logprob of a likely token is -e^z, whose exponent carries the rounding of 1 / T: 6e-8 |z|.
    torch.testing.assert_close(logprobs.double(), truth, rtol=2e-6, atol=1e-15)


def test_gradients_in_float64() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (3,))
    temperature = torch.rand(3) + 0.5
    assert torch.autograd.gradcheck(
        lambda x: fused_logprob.logprobs_and_entropy(x, labels, temperature, "cpu"), (logits,)
    )


@pytest.mark.parametrize("label", [-1, 33, -100])
def test_label_out_of_range_raises(label: int) -> None:
    labels = torch.tensor([[0, 1], [2, label]])
    with pytest.raises(ValueError, match=rf"labels holds {label} at flat position 3, .*\[0, 33\)"):
        fused_logprob.logprobs_and_entropy(torch.randn(2, 2, 33), labels, 1.0, "cpu")


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperature_raises(bad: float) -> None:
    logits, labels = torch.randn(2, 33), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"temperature holds .* at flat position 1, expected a positive number"
    ):
        fused_logprob.logprobs_and_entropy(logits, labels, torch.tensor([1.0, bad]), "cpu")
    with pytest.raises(ValueError, match=r"temperature holds .* at flat position 0"):
        fused_logprob.logprobs_and_entropy(logits, labels, bad, "cpu")


def test_gradient_for_the_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="`temperature` requires a gradient"):
        fused_logprob.logprobs_and_entropy(
            torch.randn(1, 3), torch.tensor([0]), torch.ones(1, requires_grad=True), "cpu"
        )


def test_empty_vocabulary_raises() -> None:
    with pytest.raises(ValueError, match=r"`logits` has shape \(2, 0\)"):
        fused_logprob.logprobs_and_entropy(torch.randn(2, 0), torch.zeros(2, dtype=torch.int64), 1.0, "cpu")


GRID = {
    "logits": 8, "dtype": 0, "rows": 0, "vocab": 4, "inner_rows": 1, "outer_stride": 0, "inner_stride": 4,
    "labels": 8, "temperature": 8, "temperature_stride": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 4}, "dtype is code 4"),
        ({"rows": -1}, "rows is -1"),
        ({"vocab": 0}, "vocab is 0"),
        ({"inner_rows": 0}, "inner_rows is 0"),
        ({"temperature_stride": 2}, "temperature_stride is 2"),
        ({"rows": 1, "logits": 0}, "logits or temperature is a null address"),
    ],
)
def test_native_checks(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.RowGrid(**{**GRID, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"isa": "sse9"}, "isa is 'sse9', expected one of avx512, avx2, portable"),
    ],
)
def test_native_run_checks(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.logprob_forward(
            C.RowGrid(**GRID),
            **{"logprobs": 8, "entropy": 8, "stats": 8, "threads": 1, "isa": "portable", **change},
        )


def test_an_op_that_reads_labels_needs_them() -> None:
    temperature = torch.ones(1, dtype=torch.float64)
    grid = C.RowGrid(**{**GRID, "rows": 1, "labels": 0, "temperature": temperature.data_ptr()})
    with pytest.raises(ValueError, match="labels is a null address"):
        C.logprob_forward(grid, logprobs=8, entropy=8, stats=8, threads=1, isa="portable")


def test_build_info() -> None:
    info = build.build_info()
    assert info["native"]
    assert info["reason"] is None
    assert info["compiler"]
    assert info["isa"] == info["isas_supported"][0]
    assert set(info["isas_supported"]) <= set(info["isas_compiled"])
    assert info["isas_compiled"][-1] == "portable"


def test_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPO_FAST_ISA", "sse9")
    with pytest.raises(ValueError, match=r"PPO_FAST_ISA is 'sse9', expected one of .*portable"):
        fused_logprob.logprobs_and_entropy(torch.randn(1, 3), torch.tensor([0]), 1.0, "cpu")


def test_without_the_extension_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_EXTENSION", None)
    monkeypatch.setattr(build, "MISSING_REASON", "the native extension is not built (No module named 'x')")
    with pytest.raises(ValueError, match="impl='cpu' is not available: the native extension is not built"):
        fused_logprob.logprobs_and_entropy(torch.randn(1, 3), torch.tensor([0]), 1.0, "cpu")
    assert build.build_info()["native"] is False
