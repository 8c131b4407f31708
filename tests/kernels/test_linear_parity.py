"""The ops from hidden states in C++ and Triton against float64; the yardstick is the whole logits in the same dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import ppo_fast
from ppo_fast import reference

# numpy, under Triton's interpreter, warns of the very NaNs and infinities that are put in on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

IMPLS = ["triton"] if torch.cuda.is_available() else ["cpu", "triton"]
IMPL = "cpu"  # the one under test
OPS = ("linear_logprobs", "linear_kl", "linear_policy_loss")
LEARNS = ("hidden", "weight", "bias")
SURROGATE = ("old_logprobs", "advantages", "mask")
REF = ("ref_hidden", "ref_weight", "ref_bias")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": "per token"},
    {"softcap": 3.0},
    {"softcap": 3.0, "chunk_rows": 5, "temperature": "per token"},
    {"chunk_rows": 1},
    {"chunk_rows": 64},
    {"chunk_rows": 5, "compact": False},
    {"chunk_rows": 5, "compact": True},
]
TERMS: list[dict[str, Any]] = [
    {"entropy_coef": 0.3},
    {"kl_coef": 0.2},
    {"entropy_coef": 0.3, "kl_coef": 0.2, "softcap": 3.0},
    {"dual_clip": 1.1, "clip_low": 0.1, "clip_high": 0.3},
    {"log_ratio_clamp": 0.2, "reduction": "seq-mean-token-sum"},
    {"reduction": "seq-mean-token-mean", "entropy_coef": 0.1},
    {"reduction": "token-sum", "normalizer": 3.5},
    {"normalizer": torch.tensor(7.0), "compact": False},
]


@pytest.fixture(autouse=True, params=IMPLS)
def _impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request.module, "IMPL", request.param)


def batch(
    vocab: int, shape: tuple[int, int] = (3, 6), width: int = 8, spread: float = 1.5
) -> dict[str, Tensor]:
    """Two heads, ratios on both sides of every bound, a zero advantage, a hole and an empty sequence."""
    hidden, weight, bias = torch.randn(*shape, width), torch.randn(vocab, width) * spread, torch.randn(vocab)
    labels = torch.randint(vocab, shape)
    logp = torch.log_softmax(functional.linear(hidden, weight, bias), -1)
    old = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 0.4 * torch.randn(shape)
    mask, advantages = torch.ones(shape, dtype=torch.bool), torch.randn(shape)
    if shape[0] > 1:
        mask[0, 1] = mask[-1, :] = False
        advantages[0, 2] = 0.0
    return {
        **{"hidden": hidden, "weight": weight, "bias": bias, "labels": labels},
        **{"old_logprobs": old, "advantages": advantages, "mask": mask},
        **{
            "ref_hidden": torch.randn(*shape, 5),
            "ref_weight": torch.randn(vocab, 5),
            "ref_bias": torch.randn(vocab),
        },
        **{"per token": torch.rand(shape) + 0.5},
    }


def arguments_of(op: str, tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """What the op takes of a batch; a linear_policy_loss without `kl_coef` gets no reference."""
    wanted = {"linear_logprobs": ("labels",), "linear_kl": REF, "linear_policy_loss": ("labels", *SURROGATE)}[
        op
    ]
    wanted += REF if options.get("kl_coef") else ()
    given = {name: tensors[name] for name in (*LEARNS, *wanted)} | options
    if op == "linear_logprobs":
        given["return_entropy"] = True
    if isinstance(given.get("temperature"), str):
        given["temperature"] = tensors["per token"]
    return given


def eager(op: str, given: dict[str, Any]) -> Any:
    """The same from the whole logits, which the products make in their own dtype."""
    taken = ("hidden", "weight", "bias", *REF, "softcap", "chunk_rows", "compact", "return_entropy")
    rest = {name: x for name, x in given.items() if name not in taken}
    softcap = given.get("softcap")

    def project(prefix: str) -> Tensor:
        z = functional.linear(given[prefix + "hidden"], given[prefix + "weight"], given[prefix + "bias"])
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    logits = project("")
    if op == "linear_logprobs":
        return reference.logprobs_and_entropy_from_logits(logits, **rest)
    if op == "linear_kl":
        return reference.kl_from_logits(logits, project("ref_").detach(), **rest)
    ref_logits = project("ref_").detach() if given.get("kl_coef") else None
    return reference.policy_loss_from_logits(logits, ref_logits=ref_logits, **rest)


def outcome(
    function: Callable[..., Any],
    op: str,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Results by name, and the gradients of what learns under uneven upstream gradients."""
    heads = (*LEARNS, *REF)
    wide = dtype == torch.float64
    cast = {
        k: x.to(dtype) if k in heads or (wide and x.is_floating_point()) else x for k, x in tensors.items()
    }
    leaves = {name: cast[name].detach().clone().requires_grad_() for name in LEARNS}
    out = function(arguments_of(op, cast | leaves, options))
    if op == "linear_policy_loss":
        named = {"loss": out.loss, "logprobs": out.logprobs, "entropy": out.entropy, **out.stats}
        total = -2.5 * out.loss
    else:
        named = {"kl": out} if op == "linear_kl" else dict(zip(("logprobs", "entropy"), out, strict=True))
        total = sum((torch.linspace(-1, 2, x.numel()).view_as(x) * x).sum() for x in named.values())
    total.backward()
    return {**{k: x.detach() for k, x in named.items()}, **{f"d {k}": x.grad for k, x in leaves.items()}}


def assert_parity(
    no_worse: Callable[..., None],
    op: str,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    slack: float = 8e-6,  # a product of another shape rounds otherwise
) -> None:
    ours = outcome(lambda given: getattr(ppo_fast, op)(**given, impl=IMPL), op, tensors, dtype, options)
    theirs = outcome(lambda given: eager(op, given), op, tensors, dtype, options)
    truth = outcome(lambda given: eager(op, given), op, tensors, torch.float64, options)
    if dtype not in (torch.float32, torch.float64):
        rounded = {k: x.to(dtype).float() if k in (*LEARNS, *REF) else x for k, x in tensors.items()}
        truth = outcome(lambda given: eager(op, given), op, rounded, torch.float64, options)
    for name in truth:
        no_worse(ours[name], theirs[name], truth[name], f"{op} {name}", slack)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.usefixtures("poisoned_empty")
def test_no_worse_than_the_whole_logits(
    op: str, options: dict[str, Any], no_worse: Callable[..., None]
) -> None:
    assert_parity(no_worse, op, batch(67), options)


@pytest.mark.parametrize("options", TERMS, ids=str)
def test_every_term_of_the_loss(options: dict[str, Any], no_worse: Callable[..., None]) -> None:
    assert_parity(no_worse, "linear_policy_loss", batch(67), {"chunk_rows": 4, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_half_precision(op: str, dtype: torch.dtype, no_worse: Callable[..., None]) -> None:
    """A gradient of the head is rounded once a chunk, and at the end; eager's once."""
    for options in ({}, {"softcap": 3.0, "chunk_rows": 5}):
        assert_parity(no_worse, op, batch(67), options, dtype, slack=torch.finfo(dtype).eps)


@pytest.mark.parametrize("op", OPS)
def test_float64(op: str, no_worse: Callable[..., None]) -> None:
    if IMPL == "triton":
        pytest.skip("the Triton kernels have no float64, and say so")
    for options in ({}, {"softcap": 3.0, "chunk_rows": 5}):
        assert_parity(no_worse, op, batch(67), options, torch.float64, slack=1e-13)


@pytest.mark.parametrize("vocab", [1, 49153, 50257, 151936])
@pytest.mark.parametrize("op", OPS)
def test_real_vocabularies_peaked_and_with_an_offset(
    op: str, vocab: int, no_worse: Callable[..., None]
) -> None:
    """A spread that leaves a few tokens all of the mass, below logits of thousands: nothing past the end may count."""
    tensors = batch(vocab, (2, 3), spread=8.0)
    tensors["bias"] -= 4096.0
    tensors["ref_bias"] += 4096.0
    # An ulp of such logits is 2^-11, and products of another shape differ by one.
    assert_parity(no_worse, op, tensors, {"chunk_rows": 2}, slack=2.0**-10)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (1, 1)])
@pytest.mark.parametrize("op", OPS)
def test_no_row_and_one_row(op: str, shape: tuple[int, int], no_worse: Callable[..., None]) -> None:
    for options in ({}, {"chunk_rows": 3}):
        assert_parity(no_worse, op, batch(9, shape), options)


@pytest.mark.parametrize("op", OPS)
def test_an_empty_mask_and_gradients_of_zero(op: str) -> None:
    tensors = batch(9)
    tensors["mask"] = torch.zeros_like(tensors["mask"])
    leaves = {name: tensors[name].clone().requires_grad_() for name in LEARNS}
    out = getattr(ppo_fast, op)(**arguments_of(op, tensors | leaves, {}), impl=IMPL)
    total = out.loss if op == "linear_policy_loss" else 0.0 * (out if op == "linear_kl" else out[0]).sum()
    for gradient in torch.autograd.grad(total, list(leaves.values())):
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_under_a_false_mask_reaches_nothing(garbage: float, compact: bool) -> None:
    tensors = batch(67)
    dirty = {k: x.clone() for k, x in tensors.items()}
    for name in ("hidden", "ref_hidden", "old_logprobs", "advantages", "per token"):
        dirty[name][~tensors["mask"]] = garbage
    dirty["labels"][~tensors["mask"]] = -100
    options = {"temperature": "per token", "kl_coef": 0.1, "compact": compact, "chunk_rows": 4}
    for wanted in ({}, {"entropy_coef": 0.2}):
        clean, got = (
            outcome(
                lambda given: ppo_fast.linear_policy_loss(**given, impl=IMPL),
                "linear_policy_loss",
                x,
                torch.float32,
                options | wanted,
            )
            for x in (tensors, dirty)
        )
        for name in clean:
            assert torch.equal(clean[name], got[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5000, 5001])
def test_a_row_has_the_same_bits_in_any_batch(vocab: int, dtype: torch.dtype) -> None:
    """For one chunk size: alone, among others, anywhere, with other rows masked, and in the loss as in the logprobs."""
    tensors = batch(vocab, (7, 11), width=96)
    heads = {name: tensors[name].to(dtype) for name in LEARNS}
    options: dict[str, Any] = {"chunk_rows": 32, "bias": heads["bias"], "temperature": 0.7, "impl": IMPL}
    hidden, weight, labels = heads["hidden"].flatten(0, 1), heads["weight"], tensors["labels"].flatten()
    whole = torch.stack(ppo_fast.linear_logprobs(hidden, weight, labels, return_entropy=True, **options))
    for rows in (torch.tensor([5]), torch.arange(1, 34), torch.arange(76, -1, -1), torch.arange(60, 77)):
        part = ppo_fast.linear_logprobs(hidden[rows], weight, labels[rows], return_entropy=True, **options)
        assert torch.equal(torch.stack(part), whole[:, rows])
    mask = torch.rand(7, 11) > 0.4
    rest = [tensors[name] for name in ("labels", "old_logprobs", "advantages")]
    for terms in ({}, {"entropy_coef": 0.1}):
        out = ppo_fast.linear_policy_loss(heads["hidden"], weight, *rest, mask, **terms, **options)
        assert torch.equal(out.logprobs, whole[0].view(7, 11) * mask)


def test_a_label_out_of_range_is_nan_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where no check reads the labels."""
    if IMPL == "cpu":
        pytest.skip("native code reads the labels, and refuses: tests/ops/test_bad_input.py")
    monkeypatch.setattr("ppo_fast.ops.checks._readable", lambda tensor: False)
    tensors = batch(9)
    tensors["labels"][0, 0] = 9
    given = arguments_of("linear_logprobs", tensors, {"chunk_rows": 4})
    given["hidden"] = given["hidden"].clone().requires_grad_()
    logprobs, entropy = ppo_fast.linear_logprobs(**given, impl=IMPL)
    assert logprobs.isnan().sum() == 1
    assert not entropy.isnan().any()
    (gradient,) = torch.autograd.grad(logprobs.sum(), given["hidden"])
    assert gradient.isnan().any(-1).sum() == 1
    loss = ppo_fast.linear_policy_loss(**arguments_of("linear_policy_loss", tensors, {}), impl=IMPL).loss
    assert loss.isnan()
