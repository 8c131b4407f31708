"""`ChunkedLogProbFunction.apply` against that of TRL 1.16, and the patched `add_fused_lm_head` on a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

import ppo_fast
import ppo_fast.integrations.trl as ours
from ppo_fast.integrations import contract
from ppo_fast.integrations.trl import lm_head, row_chunks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
N, D, V, CHUNK = 13, 16, 101, 32
Check = Callable[..., None]
Outcome = tuple[list[Tensor], list[Tensor]]


def head(dtype: torch.dtype, bias: bool, scale: float = 1.0) -> list[Tensor]:
    hidden, weight = scale * torch.randn(N, D), torch.randn(V, D)
    return [x.to(dtype) for x in (hidden, weight, *([torch.randn(V)] if bias else []))]


def called(function: Callable[..., tuple], *options: object, **named: object) -> Callable[..., tuple]:
    """The function of hidden, weight and maybe bias, with the rest filled in."""

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
        return tuple(function(hidden, weight, bias, *options, **named))

    return call


def both(*options: object, **named: object) -> tuple[Callable[..., tuple], Callable[..., tuple]]:
    return (
        called(ours.ChunkedLogProbFunction.apply, *options, **named),
        called(ChunkedLogProbFunction.apply, *options, **named),
    )


def written_out(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple:
    """The formulas on whole logits."""
    z = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(-1)
    picked = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    rest = (2 * logp).logsumexp(-1), z.mean(-1), z.argmax(-1) == targets
    return picked, entropy, *(x.detach() for x in rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale"), list(product([None, 5.0], [1.0, 0.5, 3.0, 0.0, -0.7])))
def test_options(
    no_worse_than_theirs: Check, dtype: torch.dtype, bias: bool, softcap: float | None, scale: float
) -> None:
    targets = torch.randint(V, (N,))
    truth = called(written_out, targets, 0.7, softcap, scale)
    no_worse_than_theirs(*both(targets, 0.7, CHUNK, softcap, scale), truth, head(dtype, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_temperature_in_a_tensor(no_worse_than_theirs: Check, dtype: torch.dtype) -> None:
    targets, temperature = torch.randint(V, (N,)), torch.tensor(0.7)
    truth = called(written_out, targets, temperature, None, 0.5)
    no_worse_than_theirs(*both(targets, temperature, CHUNK, None, 0.5), truth, head(dtype, True))


@pytest.mark.parametrize(
    "outputs", [(), ("entropy",), ("is_top1", "mean_logits"), ("log_probs", *OPTIONAL_OUTPUTS)]
)
def test_outputs(outputs: tuple[str, ...]) -> None:
    targets = torch.randint(V, (N,))
    mine, original = both(targets, 1.0, CHUNK, None, 1.0, outputs)
    for a, b in zip(mine(*head(torch.float32, False)), original(*head(torch.float32, False)), strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype, a.shape) == (b.dtype, b.shape)


def test_which_outputs_learn() -> None:
    results = ours.ChunkedLogProbFunction.apply(
        *(x.requires_grad_() for x in head(torch.float32, True)), torch.randint(V, (N,)), 1.0, CHUNK
    )
    assert [x.requires_grad for x in results] == [True, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_first_of_equal_logits(dtype: torch.dtype) -> None:
    """Every row of the head twice: only the first of two equal logits is the top."""
    hidden, weight, *_ = head(dtype, False)
    weight = torch.cat([weight[: V // 2 + 1], weight[: V // 2]])
    top = (hidden @ weight.T).argmax(-1)
    targets = torch.where(torch.arange(N) % 2 == 0, top, (top + V // 2 + 1) % V)
    mine, original = both(targets, 1.0, CHUNK)
    assert torch.equal(mine(hidden, weight)[4], original(hidden, weight)[4])
    assert 0 < mine(hidden, weight)[4].sum() < N


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_in_several_chunks(
    no_worse_than_theirs: Check, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(row_chunks, "_TILE_BYTES", 3 * V * dtype.itemsize)
    monkeypatch.setattr(lm_head, "is_partitioned", lambda weight: True)  # float32 takes them then
    targets = torch.randint(V, (N,))
    truth = called(written_out, targets, 0.7, None, 0.5)
    no_worse_than_theirs(*both(targets, 0.7, CHUNK, None, 0.5), truth, head(dtype, True))


def test_a_weight_that_is_sharded_between_forward_and_backward() -> None:
    """As under ZeRO-3: whole inside TRL's context, empty outside."""
    hidden, full = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    weight, targets = torch.nn.Parameter(full.clone()), torch.randint(V, (N,))
    weight.ds_id, entered = 0, []

    @contextmanager
    def gather(*parameters: object) -> Iterator[None]:
        entered.append(parameters)
        weight.data = full.clone()
        yield

    logprobs = ours.chunked_logprobs(hidden, weight, None, targets, 1.0, CHUNK)[0]
    weight.data = torch.empty(0)
    with patch("trl.trainer.utils.maybe_gather_lm_head_ctx", gather):
        logprobs.sum().backward()
    assert entered == [(weight, None)]
    leaf, head_leaf = hidden.detach().requires_grad_(), full.requires_grad_()
    ours.chunked_logprobs(leaf, head_leaf, None, targets, 1.0, CHUNK)[0].sum().backward()
    torch.testing.assert_close(hidden.grad, leaf.grad)
    torch.testing.assert_close(weight.grad, head_leaf.grad)


def test_not_strict_half_precision_is_the_fused_op_and_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, calls = ppo_fast.linear_logprobs, []
    monkeypatch.setattr(ppo_fast, "linear_logprobs", lambda *a, **k: calls.append(a) or fused(*a, **k))
    tensors, targets = head(torch.bfloat16, False), torch.randint(V, (N,))
    truth = written_out(*(x.double() for x in tensors), None, targets, 1.0, None, 1.0)[0]
    errors = []
    for strict in (True, False):
        contract.set_strict(strict)
        try:
            logprobs = ours.chunked_logprobs(*tensors, None, targets, 1.0, CHUNK)[0]
        finally:
            contract.set_strict(True)
        errors.append((logprobs.double() - truth).abs().max())
        assert len(calls) == (0 if strict else 1)
    assert errors[1] <= 1.01 * errors[0]


def test_tiles_join(same: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "_TILE_ROWS", 4)
    monkeypatch.setattr(lm_head, "_TILE_COLUMNS", 7)
    same(*both(torch.randint(V, (N,)), 0.7, CHUNK), head(torch.float32, True))


@pytest.mark.parametrize("learns", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_inputs(learns: tuple[bool, ...]) -> None:
    targets = torch.randint(V, (N,))
    gradients = []
    tensors = head(torch.float32, True)
    for function in both(targets, 1.0, CHUNK):
        leaves = [x.clone().requires_grad_(needs) for x, needs in zip(tensors, learns, strict=True)]
        function(*leaves)[0].sum().backward()
        gradients.append([x.grad for x in leaves])
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "autocast"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
    ],
    ids=str,
)
def test_mixed_dtypes(
    outcome_of: Callable[..., Outcome], hidden_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: bool
) -> None:
    hidden, weight = torch.randn(N, D).to(hidden_dtype), torch.randn(V, D).to(weight_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        mine, original = both(torch.randint(V, (N,)), 1.0, CHUNK)
        got, want = outcome_of(mine, [hidden, weight]), outcome_of(original, [hidden, weight])
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert a.dtype == b.dtype
        close = torch.isclose(a.float(), b.float(), rtol=0.08, atol=0.08)
        assert close.float().mean() > 0.98


def test_autocast_drops_the_same_bits() -> None:
    """Two hidden states that are one in bfloat16 give one result and one gradient of the weight."""
    weight = torch.randn(V, D)
    hidden = torch.linspace(1, 2, N * D).reshape(N, D).bfloat16().float()
    targets, gradients = torch.randint(V, (N,)), []
    for shift in (0.0, 1e-4):
        leaf = weight.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs = ours.chunked_logprobs(hidden + shift, leaf, None, targets, 1.0, CHUNK)[0]
        logprobs.sum().backward()
        gradients.append((logprobs, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_no_token(same: Check) -> None:
    """An all-masked micro-batch still reaches the model, with a gradient of 0."""
    none = torch.zeros(0, dtype=torch.int64)
    same(*both(none, 1.0, CHUNK), [torch.randn(0, D), torch.randn(V, D)])


def test_a_bias_that_forbids_a_token(same: Check) -> None:
    hidden, weight, bias = head(torch.float32, True)
    bias[7] = -torch.inf
    same(*both(torch.randint(7, (N,)), 1.0, CHUNK), [hidden, weight, bias], gradients=False)


def test_targets_of_int32(same: Check) -> None:
    mine = called(ours.chunked_logprobs, torch.arange(N, dtype=torch.int32), 1.0, CHUNK)
    original = called(ChunkedLogProbFunction.apply, torch.arange(N), 1.0, CHUNK)
    same(mine, original, head(torch.float32, False))


@pytest.mark.parametrize("fp32_head", [False, True])
def test_the_patched_head_of_a_model(fp32_head: bool) -> None:
    """`add_fused_lm_head` finds ours at the call, on models that had it before the patch too."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model = AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model, 0.7, fp32_head, ("log_probs", *OPTIONAL_OUTPUTS))
    ids = torch.randint(60, (2, 9))
    labels = torch.where(torch.arange(9) < 4, -100, ids)

    def run() -> tuple[object, Tensor]:
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (output.loss + 0.1 * output.entropy.sum()).backward()
        return output, model.get_output_embeddings().weight.grad.clone()

    before, gradient = run()
    record = ppo_fast.patch("trl")
    try:
        after, ours_gradient = run()
    finally:
        ppo_fast.unpatch("trl")
    assert record.calls["trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply"] == 1
    torch.testing.assert_close(ours_gradient, gradient, rtol=1e-5, atol=1e-6)
    for name in ("loss", "log_probs", *OPTIONAL_OUTPUTS):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-5, atol=1e-5)
