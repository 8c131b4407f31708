"""What only the native token losses and moments do: threads, instruction sets, far offsets, checks of addresses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast import build
from ppo_fast.ops import native_tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the native kernels run on the CPU")
C = build.extension()
SHAPES = [(70, 1500), (2000, 40), (1, 70_000), (3, 1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def policy(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> list[Tensor]:
    out = ppo_fast.policy_loss(x, x.detach() + y / 4, z, mask, dual_clip=1.5, impl="cpu")
    return [out.loss, out.logprobs, *out.stats.values()]


def value(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> list[Tensor]:
    out = ppo_fast.value_loss(x, y, z, mask, reduction="seq-mean-token-mean", impl="cpu")
    return [out.loss, *out.stats.values()]


def moments(x: Tensor, y: Tensor, z: Tensor, mask: Tensor) -> list[Tensor]:
    means = [ppo_fast.masked_mean(x, mask, axis, impl="cpu") for axis in (None, 0, 1)]
    variances = [ppo_fast.masked_var(x, mask, axis, unbiased=True, impl="cpu") for axis in (None, 0, 1)]
    normal = [f(x, mask, impl="cpu") for f in (ppo_fast.masked_whiten, ppo_fast.masked_rescale)]
    return [*means, *variances, *normal]


OPS: list[Callable[..., list[Tensor]]] = [policy, value, moments]


def draw(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [*torch.randn(3, *shape).to(dtype).unbind(), torch.rand(shape) < 0.9]


def results(op: Callable[..., list[Tensor]], tensors: list[Tensor]) -> list[Tensor]:
    """Every output, and the gradient of all that learn, weighted so that no two cancel."""
    x = tensors[0].clone().requires_grad_()
    out = op(x, *tensors[1:])
    learns = [y for y in out if y.requires_grad]
    down = [torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape) for y in learns]
    return [*(y.detach() for y in out), *torch.autograd.grad(learns, x, down)]


@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_the_number_of_threads_changes_no_bit(
    op: Callable[..., list[Tensor]], shape: tuple[int, int], threads: int
) -> None:
    tensors = draw(shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(op, tensors)
        torch.set_num_threads(threads)
        many = results(op, tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("isa", C.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_instruction_sets_agree(
    op: Callable[..., list[Tensor]], dtype: torch.dtype, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They add in different orders, in double, and differ in what they fuse: a few units in the last place."""
    tensors = draw((7, 1031), dtype)
    best = results(op, tensors)
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    for a, b in zip(results(op, tensors), best, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=4 * eps * b.abs().max().item())


@pytest.mark.parametrize("isa", C.supported_isas())
def test_the_ratio_over_the_range_of_float32(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token a sequence: its term is its ratio, relative error below 3e-7, or 0 or infinite where float32 is."""
    monkeypatch.setenv("PPO_FAST_ISA", isa)
    x = torch.cat([torch.linspace(-87.3, 88.7, 30_001), torch.tensor([0.0, -104.0, -1e30, 88.8, 1e30])])
    leaf = x.unsqueeze(1).requires_grad_()
    ones, old = torch.ones_like(leaf), torch.zeros_like(leaf)
    clips = {"clip_low": 1.0, "clip_high": 1e38}
    out = ppo_fast.policy_loss(leaf, old, -ones, ones, reduction="token-sum", impl="cpu", **clips)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    ratio = gradient.squeeze(1).double()
    truth = x.double().exp()
    assert ((ratio - truth)[:30_002] / truth[:30_002]).abs().max().item() < 3e-7
    assert ratio[30_001].item() == 1.0
    assert ratio[-4:].tolist() == [0.0, 0.0, torch.inf, torch.inf]


@pytest.mark.parametrize("op", [policy, value])
def test_a_sequence_has_the_same_bits_in_any_padding(op: Callable[..., list[Tensor]]) -> None:
    """Rows cut off where they end, and padded to twice their width: their own sums, which one row alone shows."""
    for length in (1, 15, 16, 17, 511, 512, 513, 1100):
        x, y, z, mask = draw((1, length))
        wide = [torch.nn.functional.pad(t, (0, 1200), value=torch.nan) for t in (x, y, z)]
        a = results(op, [x, y, z, mask])
        b = results(op, [*wide, torch.nn.functional.pad(mask, (0, 1200))])
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one, other[:, :length] if other.dim() else other)


@pytest.mark.parametrize("op", [policy, value])
def test_rows_past_2_31_elements(op: Callable[..., list[Tensor]]) -> None:
    """Three rows 2^30 + 64 elements apart: an offset in 32 bits would wrap at the third."""
    far = 2**30 + 64
    view = torch.empty(2 * far + 8, dtype=torch.bfloat16).as_strided((3, 4), (far, 1))
    x, y, z, mask = draw((3, 4), torch.bfloat16)
    expected = op(x, y, z, mask)
    for at in range(1, 3):  # the first is copied by its gradient
        view.copy_((y, z)[at - 1])
        tensors = [x, y, z, mask]
        tensors[at] = view
        assert all(torch.equal(a, b) for a, b in zip(op(*tensors), expected, strict=True))


TENSOR = (8, 0, 4)
NUMBERS = torch.zeros(7, dtype=torch.float64)
BATCH = {"sequences": 0, "tokens": 4, "cu_seqlens": 0, "compute": 0, "reduction": 0} | dict.fromkeys(
    ("mask", "now", "old", "target"), TENSOR
)
COLUMNS = {"x": 8, "dtype": 0, "mask": 8, "outer": 1, "length": 0, "inner": 1, "unbiased": False}
RUN = {"threads": 1, "isa": "portable"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": -1}, "sequences is -1"),
        ({"tokens": -1}, "tokens is -1"),
        ({"compute": 2}, "compute is code 2, expected 0 or 1"),
        ({"reduction": 4}, "reduction is code 4, expected 0 to 3"),
        ({"old": (8, 4, 4)}, "old has dtype code 4"),
        ({"target": (8, 0)}, "target has 2 parts"),
        ({"sequences": 1, "mask": (0, 0, 4)}, "mask is a null address"),
    ],
)
def test_checks_of_a_batch(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.TokenBatch(**{**BATCH, **change})


def test_starts_that_do_not_rise() -> None:
    starts = torch.tensor([0, 3, 2, 4])
    with pytest.raises(ValueError, match="cu_seqlens does not rise from 0 to 4 at sequence 1"):
        C.TokenBatch(**{**BATCH, "sequences": 3, "cu_seqlens": starts.data_ptr()})
    packed = C.TokenBatch(**{**BATCH, "sequences": 1, "cu_seqlens": starts[-2:].data_ptr()})
    with pytest.raises(ValueError, match="cu_seqlens is given, expected a padded batch"):
        C.token_weights(packed, normalizer=0, weights=8, **RUN)


LOSS = {"loss": 8, "stats": 8, "lengths": 8, "divisor": 8, "normalizer": 0} | RUN
POLICY = {**LOSS, "entropy": (0, 0, 0), "kl": (0, 0, 0), "coefficients": NUMBERS.data_ptr(), "kept": 8}


@pytest.mark.parametrize(
    ("batch", "change", "message"),
    [
        ({}, {"threads": 0}, "threads is 0"),
        ({}, {"isa": "sse9"}, "isa is 'sse9'"),
        ({}, {"loss": 0}, "an output is a null address"),
        ({}, {"coefficients": 0}, "coefficients is a null address"),
        ({}, {"kl": (0, 9, 0)}, "kl has dtype code 9"),
        ({"sequences": 1}, {"kept": 0}, "kept is a null address"),
        ({"sequences": 1, "now": (0, 0, 0)}, {}, "now, old or target is a null address"),
    ],
)
def test_checks_of_a_policy_loss(batch: dict[str, object], change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.clipped_policy_forward(C.TokenBatch(**{**BATCH, **batch}), **{**POLICY, **change})


def test_checks_of_a_value_loss_and_of_gradients() -> None:
    batch, full = C.TokenBatch(**BATCH), C.TokenBatch(**{**BATCH, "sequences": 1})
    with pytest.raises(ValueError, match="clip is a null address"):
        C.clipped_value_forward(batch, clip=0, **LOSS)
    gradient = {"grad_loss": 8, "lengths": 8, "divisor": 8, "grad_now": 8, **RUN}
    for backward, own in (
        (C.clipped_policy_backward, {"coefficients": NUMBERS.data_ptr()}),
        (C.clipped_value_backward, {"clip": 8}),
    ):
        with pytest.raises(ValueError, match="grad_loss or divisor is a null address"):
            backward(batch, **own, **{**gradient, "grad_loss": 0})
        with pytest.raises(ValueError, match="lengths or grad_now is a null address"):
            backward(full, **own, **{**gradient, "grad_now": 0})
        with pytest.raises(ValueError, match="is a null address"):
            backward(batch, **{name: 0 for name in own}, **gradient)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 4}, "dtype is code 4"),
        ({"outer": -1}, "outer, length or inner is below 0"),
        ({"length": 1, "x": 0}, "x or mask is a null address"),
    ],
)
def test_checks_of_columns(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.MaskedColumns(**{**COLUMNS, **change})


def test_checks_of_moments() -> None:
    one, two = C.MaskedColumns(**COLUMNS), C.MaskedColumns(**{**COLUMNS, "outer": 2})
    with pytest.raises(ValueError, match="order is 3, expected 1 or 2"):
        C.masked_moment(one, order=3, result=8, whole=8, **RUN)
    with pytest.raises(ValueError, match="result or whole is a null address"):
        C.masked_moment(one, order=1, result=0, whole=8, **RUN)
    full = C.MaskedColumns(**{**COLUMNS, "length": 1})
    with pytest.raises(ValueError, match="whole, grad or grad_x is a null address"):
        C.masked_moment_backward(full, order=1, whole=8, grad=0, grad_x=8, **RUN)
    with pytest.raises(ValueError, match="outer is 2 and inner 1, expected one column"):
        C.masked_normalize(two, keep_mean=True, out=8, whole=8, **RUN)
    with pytest.raises(ValueError, match="out or whole is a null address"):
        C.masked_normalize(full, keep_mean=True, out=0, whole=8, **RUN)
    with pytest.raises(ValueError, match="whole, grad or grad_x is a null address"):
        C.masked_normalize_backward(full, keep_mean=True, whole=8, grad=8, grad_x=0, **RUN)


def test_the_reductions_are_named_in_the_order_of_their_codes() -> None:
    from ppo_fast.kernels import sequences

    assert {name: i for i, name in enumerate(native_tokens.REDUCTIONS)} == sequences.REDUCTIONS
