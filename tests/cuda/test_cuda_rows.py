"""The cluster kernel, logits to the clipped loss and gradient, against float64, with eager as the yardstick."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops import native_cuda
from ppo_fast.ops.row_grid import row_grid

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_GPU = os.environ.get("PPO_FAST_TEST_DEVICE", "cpu") == "cuda"
CLUSTERS = [("gpu" if ON_GPU else "clusters", cluster) for cluster in (1, 2, 4, 8)]
OWN_CHOICE = [("gpu", 0)] if ON_GPU else [("clusters", 0), ("no clusters", 0)]
VOCABULARIES = [50257, 128256, *([32000, 151936, 262144] if ON_GPU else [])]
TERMS = {"entropy_coef": 0.3, "dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.3}
SEEDS = range(
    4
)  # of the emulated schedule: in order, backwards, shuffled, block after block; copies late for 1, 3
ROWS = 4


def batch(vocab: int, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> dict[str, Tensor]:
    """Ratios on both sides of every bound, advantages of both signs and 0, a masked row of NaN."""
    logits = (torch.randn(ROWS, vocab) * spread).to(dtype)
    labels = torch.randint(vocab, (ROWS,))
    old = torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mask = torch.tensor([True, False, True, True])
    logits[1] = torch.nan
    labels[1] = -100
    advantages = torch.tensor([1.5, torch.nan, -0.7, 0.4])
    return {
        "logits": logits,
        "labels": labels,
        "old_logprobs": old + torch.tensor([0.3, torch.nan, -0.5, 0.02]),
        "advantages": advantages,
        "mask": mask,
    }


def coefficients(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = torch.inf,
    log_ratio_clamp: float = torch.inf,
    entropy_coef: float = 0.0,
) -> Tensor:
    return torch.tensor([1 - clip_low, 1 + clip_high, dual_clip, log_ratio_clamp, entropy_coef, 0.0, 1.0])


def launch(
    tensors: dict[str, Tensor], logits: Tensor, temperature: float | Tensor = 1.0, *, inplace: bool = True,
    cluster: int = 0, **terms: float,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(logprobs, entropy, state) of one launch that adds the rows up; in place the gradient is in `logits`."""
    grid = row_grid(logits)
    assert grid.logits is logits
    weights = torch.where(tensors["mask"], 1.0, -torch.inf)
    logprobs, entropy, kl, state = native_cuda.policy_rows(
        logits,
        tensors["labels"],
        tensors["old_logprobs"],
        tensors["advantages"],
        weights,
        torch.as_tensor(temperature, dtype=torch.float32),
        None,
        coefficients(**terms),
        grid=grid.strides,
        ref_grid=(1, 0, 0),
        inplace=inplace,
        cluster=cluster,
    )
    assert kl is None
    return logprobs, entropy, state


def eager(tensors: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropy, gradient) by the reference; every floating tensor in float64 for the truth."""
    moved = {
        k: x.to(dtype) if dtype == torch.float64 and x.is_floating_point() else x for k, x in tensors.items()
    }
    moved = {k: x.unsqueeze(0) for k, x in moved.items()}
    if isinstance(options.get("temperature"), Tensor):
        options["temperature"] = options["temperature"].to(dtype).unsqueeze(0)
    leaf = moved["logits"].detach().clone().requires_grad_()
    out = ppo_fast.policy_loss_from_logits(
        **{**moved, "logits": leaf}, reduction="token-sum", impl="reference", **options
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out.logprobs[0], out.entropy[0], gradient[0]


def assert_parity(
    no_worse: Callable[..., None], tensors: dict[str, Tensor], cluster: int = 0, **options: Any
) -> Tensor:
    dtype = tensors["logits"].dtype
    logits = tensors["logits"].clone()
    logprobs, entropy, _ = launch(tensors, logits, cluster=cluster, **options)
    yardstick, truth = (eager(tensors, d, **options) for d in (dtype, torch.float64))
    # exp2 in hardware is good to two units in the last place, and so are the sums of thousands of them.
    for name, *three in zip(
        ("logprobs", "entropy", "gradient"), (logprobs, entropy, logits), yardstick, truth, strict=True
    ):
        no_worse(*three, name, 1e-6)
    return logits


@pytest.mark.parametrize(("device", "cluster"), [*OWN_CHOICE, *CLUSTERS], indirect=["device"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 9, 127, 4097])
@pytest.mark.usefixtures("device", "poisoned_empty")
def test_no_worse_than_eager(
    vocab: int, dtype: torch.dtype, cluster: int, no_worse: Callable[..., None]
) -> None:
    assert_parity(no_worse, batch(vocab, dtype), cluster, temperature=0.7, **TERMS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.usefixtures("device")
def test_real_vocabularies(vocab: int, dtype: torch.dtype, no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, batch(vocab, dtype), temperature=1.3, **TERMS)


@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"entropy_coef": -0.5},
        {"dual_clip": 1.1},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"clip_low": 1.0, "clip_high": 5.0},
        {"log_ratio_clamp": 0.2},
    ],
    ids=str,
)
@pytest.mark.usefixtures("device")
def test_each_term(terms: dict[str, float], no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, batch(67), **terms)


@pytest.mark.usefixtures("device")
def test_a_temperature_of_each_row(no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, batch(300), temperature=torch.tensor([0.5, torch.nan, 1.0, 2.0]), **TERMS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 33, 2049])
@pytest.mark.parametrize(("device", "cluster"), [*OWN_CHOICE, CLUSTERS[1]], indirect=["device"])
@pytest.mark.usefixtures("device")
def test_a_row_has_the_same_bits_wherever_it_lies(vocab: int, dtype: torch.dtype, cluster: int) -> None:
    """At every distance from a multiple of 16 bytes, with neighbours that must not be touched."""
    tensors = batch(vocab, dtype)
    results = []
    for offset in range(16 // dtype.itemsize):
        stride = vocab + 32 + offset  # so that the rows of one launch are aligned in different ways, too
        storage = torch.full((64 + ROWS * stride,), 7.0, dtype=dtype)
        rows = storage[16 + offset : 16 + offset + ROWS * stride].view(ROWS, stride)[:, :vocab]
        rows.copy_(tensors["logits"])
        logprobs, entropy, _ = launch(tensors, rows, 0.7, cluster=cluster, **TERMS)
        results.append((logprobs, entropy, rows.clone()))
        rows.fill_(7.0)
        assert bool((storage == 7.0).all())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("device", "cluster"), [*OWN_CHOICE, *CLUSTERS], indirect=["device"])
@pytest.mark.parametrize("vocab", [67, 20001])
def test_every_schedule_gives_the_same_bits(
    vocab: int, cluster: int, schedules: Callable[[int], None]
) -> None:
    """Threads in any order, copies done early or late: what a missing barrier would change."""
    tensors = batch(vocab, torch.bfloat16)
    results = []
    for seed in SEEDS:
        schedules(seed)
        logits = tensors["logits"].clone()
        results.append((*launch(tensors, logits, cluster=cluster, **TERMS)[:2], logits))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("device")
def test_the_state_leads_to_the_gradient_that_is_made_in_place() -> None:
    """What the backward of its own starts from: (p_j (a + b d_j) + c [j = label]) / T."""
    tensors = batch(500)
    logits = tensors["logits"].clone()
    logprobs, entropy, state = launch(tensors, logits, 0.7, inplace=False, **TERMS)
    assert torch.equal(logits.nan_to_num(), tensors["logits"].nan_to_num()), "the logits are left alone"
    top, inverse_total, ref_top, a, b, c, k = (x.unsqueeze(1) for x in state.double().unbind(1))
    assert state[1].tolist() == [0.0, 1.0, -torch.inf, 0.0, 0.0, 0.0, 0.0]
    assert bool((ref_top == -torch.inf).all())
    assert bool((k == 0).all())
    d = (logits.double() - top) / 0.7
    is_label = torch.arange(500) == tensors["labels"].unsqueeze(1)
    expected = (d.exp() * inverse_total * (a + b * d) + torch.where(is_label, c, 0.0)) / 0.7
    expected[1] = 0.0
    inplace = launch(tensors, logits, 0.7, **TERMS)
    assert torch.equal(inplace[0], logprobs)
    assert torch.equal(inplace[1], entropy)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("device")
def test_the_numbers_are_those_of_triton(dtype: torch.dtype) -> None:
    """To a few units in the last place: the sums are the same, in another order."""
    from ppo_fast.kernels import policy_loss

    tensors = batch(4097, dtype)
    logprobs, entropy, state = launch(tensors, tensors["logits"], 0.7, inplace=False, **TERMS)
    rows = row_grid(tensors["logits"])
    expected = policy_loss.policy_rows(
        rows.logits, tensors["labels"], tensors["old_logprobs"], tensors["advantages"],
        torch.where(tensors["mask"], 1.0, -torch.inf), torch.tensor(0.7), None, coefficients(**TERMS),
        grid=rows.strides, ref_grid=(1, 0, 0), inplace=False,
    )  # fmt: skip
    for got, other in zip((logprobs, entropy, state), (expected[0], expected[1], expected[3]), strict=True):
        torch.testing.assert_close(got, other, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("device")
def test_rows_without_a_contribution_get_zeros() -> None:
    """Clipped, zero advantage, masked: their probabilities are not looked at again, and no NaN comes from them."""
    tensors = batch(40)
    tensors["old_logprobs"] = torch.tensor([-1000.0, 0.0, -1000.0, 0.0])
    tensors["advantages"] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    logits = tensors["logits"].clone()
    launch(tensors, logits)
    assert bool((logits == 0).all())


@pytest.mark.parametrize("offset", [2.0**14, -(2.0**14), 2.0**20])
@pytest.mark.usefixtures("device")
def test_a_common_offset_cancels(offset: float) -> None:
    tensors = batch(200)
    exact = (tensors["logits"] * 8).round() / 8
    first, second = exact.clone(), exact + offset
    for a, b in zip(launch(tensors, first, **TERMS)[:2], launch(tensors, second, **TERMS)[:2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first, second)


@pytest.mark.parametrize(("device", "cluster"), [*OWN_CHOICE, CLUSTERS[3]], indirect=["device"])
@pytest.mark.usefixtures("device")
def test_impossible_tokens(cluster: int, no_worse: Callable[..., None]) -> None:
    """Whole blocks, warps and vectors of -inf before the first token that is possible."""
    tensors = batch(9000)
    tensors["logits"][:, :8501] = -torch.inf
    tensors["labels"][[0, 2, 3]] = 8999
    tensors["old_logprobs"] = torch.log_softmax(tensors["logits"], -1)[:, 8999] + 0.1
    gradient = assert_parity(no_worse, tensors, cluster, **TERMS)
    assert bool((gradient[:, :8501] == 0).all())


@pytest.mark.usefixtures("device")
def test_what_cannot_be_is_nan_in_its_row_alone() -> None:
    """A label out of range, a NaN, an infinity, and a row of nothing but -inf."""
    tensors = batch(33)
    tensors["mask"][1] = True
    tensors["labels"] = torch.tensor([33, 0, 1, -1])
    tensors["old_logprobs"], tensors["advantages"] = torch.zeros(ROWS), torch.ones(ROWS)
    tensors["logits"] = torch.randn(ROWS, 33)
    tensors["logits"][1] = -torch.inf
    logits = tensors["logits"].clone()
    logprobs, _, _ = launch(tensors, logits)
    assert logprobs.isnan().tolist() == [True, True, False, True]
    assert logits.isnan().all(1).tolist() == [True, True, False, True]
    for bad in (torch.nan, torch.inf):
        logits = tensors["logits"].clone()
        logits[2, 20] = bad
        assert bool(launch(tensors, logits)[0][2].isnan())


@pytest.mark.usefixtures("device")
def test_two_levels_of_row_stride(no_worse: Callable[..., None]) -> None:
    """The rows of `logits[:, :-1]`, in place, the last position left alone."""
    tensors = batch(33)
    storage = torch.full((2, 3, 33), 7.0)
    storage[:, :-1] = tensors["logits"].view(2, 2, 33)
    shaped = {k: x.view(2, 2, *x.shape[1:]) for k, x in tensors.items()}
    launch(shaped, storage[:, :-1], **TERMS)
    whole = tensors["logits"].clone()
    launch(tensors, whole, **TERMS)
    assert torch.equal(storage[:, :-1].reshape(ROWS, 33), whole)
    assert bool((storage[:, -1] == 7.0).all())


@pytest.mark.usefixtures("device")
def test_no_rows() -> None:
    tensors = {k: x[:0] for k, x in batch(9).items()}
    logprobs, _, state = launch(tensors, tensors["logits"], inplace=False)
    assert logprobs.shape == (0,)
    assert state.shape == (0, 7)


@pytest.mark.parametrize("device", [CLUSTERS[0][0]], indirect=True)
@pytest.mark.usefixtures("device")
def test_what_does_not_fit_says_so() -> None:
    tensors = batch(2)
    tensors["logits"] = torch.zeros(ROWS, 60000)
    with pytest.raises(ValueError, match="a row of 60000 logits does not fit the shared memory of 1 block"):
        launch(tensors, tensors["logits"], cluster=1)
    with pytest.raises(ValueError, match="cluster is 3, expected 0, 1, 2, 4 or 8"):
        launch(tensors, tensors["logits"], cluster=3)


@pytest.mark.usefixtures("device")
def test_a_reference_is_refused() -> None:
    tensors = batch(9)
    with pytest.raises(ValueError, match="impl='cuda' takes no ref_logits"):
        native_cuda.policy_rows(
            tensors["logits"], tensors["labels"], tensors["old_logprobs"], tensors["advantages"],
            torch.ones(ROWS), torch.ones(()), tensors["logits"], coefficients(),
            grid=(ROWS, 0, 9), ref_grid=(ROWS, 0, 9), inplace=False,
        )  # fmt: skip


needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: PPO_FAST_TEST_DEVICE=cuda")


@needs_gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.usefixtures("device")
def test_offsets_beyond_32_bits() -> None:
    vocab, rows = 128256, 16800
    logits = torch.randn(1, vocab, dtype=torch.bfloat16).expand(rows, vocab).contiguous()
    tensors = {k: x[:1].expand(rows, *x.shape[1:]).contiguous() for k, x in batch(vocab).items()}
    assert logits.numel() > 2**31
    launch(tensors, logits, **TERMS)
    assert torch.equal(logits[-1], logits[0])
    assert bool((logits[0] != 0).any())


@needs_gpu
@pytest.mark.parametrize("device", ["gpu"], indirect=True)
@pytest.mark.usefixtures("device")
def test_the_current_stream_and_a_graph() -> None:
    """The launch waits for what the stream has before it, and goes into a captured graph."""
    tensors = batch(32000, torch.bfloat16)
    expected = tensors["logits"].clone()
    launch(tensors, expected, **TERMS)
    rows = row_grid(tensors["logits"])
    weights, temperature, numbers = (
        torch.where(tensors["mask"], 1.0, -torch.inf),
        torch.ones(()),
        coefficients(**TERMS),
    )
    logits = torch.zeros_like(expected)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        logits.copy_(tensors["logits"])
        native_cuda.policy_rows(
            logits, tensors["labels"], tensors["old_logprobs"], tensors["advantages"], weights, temperature,
            None, numbers, grid=rows.strides, ref_grid=(1, 0, 0), inplace=True,
        )  # fmt: skip
    for _ in range(2):
        logits.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(logits, expected)
