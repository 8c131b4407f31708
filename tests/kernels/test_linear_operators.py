"""The ops from hidden states as part of a graph: what work is done for whom, weights of every kind, compile, memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_fast
from ppo_fast.ops import fused_linear_kl, fused_linear_logprobs, fused_linear_policy, linear_chunks
from ppo_fast.ops.fused_estimate import coefficient_dtype

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

IMPLS = ["triton"] if torch.cuda.is_available() else ["cpu", "triton"]
IMPL = "cpu"  # the one under test
V, D, SHAPE = 41, 6, (2, 8)


@pytest.fixture(autouse=True, params=IMPLS)
def _impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request.module, "IMPL", request.param)


def numbers() -> dict[str, Tensor]:
    """Tokens of which some are masked, some have no advantage, and some are clipped."""
    old = torch.full(SHAPE, -3.7)  # near log(1 / 41), so that no ratio is clipped
    mask, advantages = torch.ones(SHAPE, dtype=torch.bool), torch.linspace(0.5, 2.0, 16).view(SHAPE)
    mask[0, :3] = False
    advantages[0, 3:5] = 0.0
    old[1, :2] = -9.0  # ratio far above 1.2 under a positive advantage: clipped
    return {"labels": torch.randint(V, SHAPE), "old_logprobs": old, "advantages": advantages, "mask": mask}


ACTIVE = 9  # of the 16 tokens of `numbers`


def head(spread: float = 0.02) -> dict[str, Tensor]:
    tensors = {"hidden": torch.randn(*SHAPE, D), "weight": spread * torch.randn(V, D), "bias": torch.zeros(V)}
    return {name: x.requires_grad_() for name, x in tensors.items()}


def loss_of(given: dict[str, Tensor], **options: Any) -> Tensor:
    return ppo_fast.linear_policy_loss(**given, impl=IMPL, **options).loss


@pytest.fixture
def rows_added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each chunk took to the last two products."""
    counts: list[int] = []
    add = linear_chunks.HeadGradients.add

    def recorded(self: linear_chunks.HeadGradients, grad: Tensor, x: Tensor, where: Any) -> None:
        assert grad.shape == (len(x), V)
        counts.append(len(x))
        add(self, grad, x, where)

    monkeypatch.setattr(linear_chunks.HeadGradients, "add", recorded)
    return counts


@pytest.mark.parametrize("chunk_rows", [3, 16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_rows_without_a_contribution_are_in_no_product_of_the_backward(
    rows_added: list[int], softcap: float | None, chunk_rows: int
) -> None:
    given, options = {**head(), **numbers()}, {"softcap": softcap, "chunk_rows": chunk_rows}
    gradients = {
        compact: torch.autograd.grad(
            loss_of(given, compact=compact, **options), [given[name] for name in ("hidden", "weight", "bias")]
        )
        for compact in (True, False)
    }
    assert sum(rows_added) == ACTIVE + 16
    for kept, whole in zip(gradients[True], gradients[False], strict=True):
        torch.testing.assert_close(kept, whole, rtol=1e-5, atol=1e-8)
    rows_added.clear()
    loss_of(given, compact=True, entropy_coef=0.1, **options)
    assert sum(rows_added) == 13, "every counted row has an entropy"


def test_masked_rows_are_in_no_product_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    of = linear_chunks.Chunks.of

    def recorded(self: linear_chunks.Chunks, which: slice) -> Tensor:
        rows.append(which.stop - which.start)
        return of(self, which)

    monkeypatch.setattr(linear_chunks.Chunks, "of", recorded)
    loss_of({**head(), **numbers()}, compact=True, chunk_rows=4)
    assert sum(rows) == 13


@pytest.mark.parametrize("op", ["linear_logprobs", "linear_kl"])
def test_rows_that_get_no_gradient_are_not_made_again(rows_added: list[int], op: str) -> None:
    given = head()
    extra = {"labels": numbers()["labels"]}
    if op == "linear_kl":
        extra = {"ref_hidden": torch.randn(*SHAPE, 3), "ref_weight": torch.randn(V, 3)}
    upstream = torch.zeros(SHAPE)
    upstream[0, 2] = upstream[1, 5:] = 1.5
    results = []
    for compact in (True, False):
        out = getattr(ppo_fast, op)(**given, **extra, compact=compact, chunk_rows=3, impl=IMPL)
        results.append(torch.autograd.grad(out, list(given.values()), upstream))
    assert sum(rows_added) == 4 + 16
    for kept, whole in zip(*results, strict=True):
        torch.testing.assert_close(kept, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_a_frozen_input_costs_no_product(frozen: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[linear_chunks.HeadGradients] = []
    init = linear_chunks.HeadGradients.__init__

    def recorded(self: linear_chunks.HeadGradients, *args: Any, **kwargs: Any) -> None:
        kept.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(linear_chunks.HeadGradients, "__init__", recorded)
    given = {**head(), **numbers()}
    learnt = [name for name in ("hidden", "weight", "bias") if name not in frozen]
    expected = torch.autograd.grad(loss_of(given), [given[name] for name in learnt])
    logprobs = ppo_fast.linear_logprobs(*(given[k] for k in ("hidden", "weight", "labels")), impl=IMPL)
    of_logprobs = torch.autograd.grad(logprobs.sum(), given["hidden"])
    for name in frozen:
        given[name] = given[name].detach()
    kept.clear()
    got = torch.autograd.grad(loss_of(given), [given[name] for name in learnt])
    assert [name for name in ("hidden", "weight", "bias") if getattr(kept[0], name) is None] == list(frozen)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    frozen_head = given["weight"].detach()
    logprobs = ppo_fast.linear_logprobs(given["hidden"], frozen_head, given["labels"], impl=IMPL)
    if "hidden" not in frozen:
        assert torch.equal(torch.autograd.grad(logprobs.sum(), given["hidden"])[0], of_logprobs[0])


def test_without_a_gradient_to_make_no_gradient_is_made(rows_added: list[int]) -> None:
    given = {**head(), **numbers()}
    with torch.no_grad():
        quiet = loss_of(given)
    assert not quiet.requires_grad
    frozen = loss_of({name: x.detach() for name, x in given.items()})
    assert rows_added == []
    assert torch.equal(loss_of(given).detach(), quiet)
    assert torch.equal(frozen, quiet)


def test_the_gradient_of_the_loss_scales_and_the_graph_may_be_kept() -> None:
    given = {**head(), **numbers()}
    loss = loss_of(given, entropy_coef=0.1)
    learns = [given[name] for name in ("hidden", "weight", "bias")]
    plain = torch.autograd.grad(loss, learns, retain_graph=True)
    for factor in (0.0, 1.0, -2.5):
        scaled = torch.autograd.grad(loss, learns, torch.tensor(factor), retain_graph=True)
        for a, b in zip(scaled, plain, strict=True):
            torch.testing.assert_close(a, factor * b)
    before = [x.clone() for x in plain]
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, once, still in zip(learns, before, plain, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * once)
        assert torch.equal(once, still)


def test_a_gradient_of_the_gradient_is_an_error() -> None:
    given = {**head(), **numbers()}
    with pytest.raises(
        RuntimeError, match="linear_policy_loss: the gradient has none of its own, so create_graph"
    ):
        torch.autograd.grad(loss_of(given), given["hidden"], create_graph=True)
    logprobs = ppo_fast.linear_logprobs(*(given[k] for k in ("hidden", "weight", "labels")), impl=IMPL)
    (gradient,) = torch.autograd.grad(logprobs.sum(), given["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="ppo_fast"):
        gradient.sum().backward()


def every_op(given: dict[str, Tensor], impl: str) -> Tensor:
    """One number of all three ops."""
    rows = {name: given[name] for name in ("hidden", "weight")}
    out = ppo_fast.linear_policy_loss(**{**numbers_of(given), **rows}, impl=impl).loss
    out = out + ppo_fast.linear_logprobs(**rows, labels=given["labels"], impl=impl).square().sum()
    other = torch.linspace(-1, 1, V * D).view(V, D)
    return out + ppo_fast.linear_kl(**rows, ref_hidden=given["hidden"], ref_weight=other, impl=impl).sum()


def numbers_of(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name] for name in ("labels", "old_logprobs", "advantages", "mask")}


def test_a_head_tied_to_the_embedding_or_wrapped_in_adapters() -> None:
    fixed = numbers()
    words, table = torch.randint(V, SHAPE), torch.randn(V, D)
    a, b = torch.randn(2, D), torch.randn(V, 2)

    def tied(impl: str) -> list[Tensor]:
        embedding = torch.nn.Parameter(table.clone())
        every_op({**fixed, "hidden": embedding[words].tanh(), "weight": embedding}, impl).backward()
        return [embedding.grad]

    def adapted(impl: str) -> list[Tensor]:
        down, up = a.clone().requires_grad_(), b.clone().requires_grad_()
        every_op({**fixed, "hidden": table[words], "weight": table + up @ down}, impl).backward()
        return [down.grad, up.grad]

    for make in (tied, adapted):
        for got, expected in zip(make(IMPL), make("reference"), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "view",
    [
        lambda h, w: (h.transpose(0, 1).contiguous().transpose(0, 1), w),
        lambda h, w: (h, w.t().contiguous().t()),
    ],
    ids=["hidden", "weight"],
)
def test_any_strides(view: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    fixed, plain = numbers(), head()
    values = []
    for hidden, weight in ((plain["hidden"], plain["weight"]), view(plain["hidden"], plain["weight"])):
        total = every_op({**fixed, "hidden": hidden, "weight": weight}, IMPL)
        values.append((total, *torch.autograd.grad(total, (plain["hidden"], plain["weight"]))))
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most bytes that a tensor ever had."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in (*args, *(kwargs or {}).values(), *(out if isinstance(out, tuple) else (out,))):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.itemsize)
        return out


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_logits_are_never_whole(softcap: float | None) -> None:
    given = {**head(), **numbers()}
    given["ref_hidden"], given["ref_weight"] = torch.randn(*SHAPE, 3), torch.randn(V, 3)
    with Largest() as largest:
        loss_of(given, entropy_coef=0.1, kl_coef=0.1, chunk_rows=4, softcap=softcap).backward()
    assert largest.bytes == given["weight"].numel() * 4, (
        "nothing is larger than the head, not 4 rows of logits"
    )


def test_chunks_are_sized_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 8 * 2**30
    monkeypatch.setattr(linear_chunks, "free_bytes", lambda device: free)

    def rows(count: int, chunk_rows: int = 0, head_bytes: int = 0) -> int:
        return linear_chunks.rows_of_a_chunk(count, head_bytes, 200_000, torch.device("cpu"), chunk_rows)

    assert rows(10_000, 77) == 77
    assert rows(100_000) == 656  # the most that 128 MiB hold, in sixteens: 656, and 153 chunks of it
    assert rows(700) == 352  # two nearly equal ones
    assert rows(100_000, head_bytes=2**30) == 1328  # of a head so large a quarter: 1342 rows
    assert rows(3) == 16
    assert rows(0) == 16
    free = 200_000 * 8 * 40  # an eighth of it is 40 rows
    assert rows(700) == 32


def test_the_operators_are_well_formed() -> None:
    given, fixed = head(), numbers()
    # The last of torch's checks traces a backward: once is enough, and native code is quicker than an interpreter.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    some = {"test_utils": checks[: 4 if IMPL == "cpu" else 3]}
    tau = torch.tensor(0.7, dtype=coefficient_dtype(IMPL))
    ref = (torch.randn(*SHAPE, 3), torch.randn(V, 3), None)
    coefficients = torch.tensor(
        [0.8, 1.2, torch.inf, torch.inf, 0.1, 0.2, 1.0], dtype=coefficient_dtype(IMPL)
    )
    policy = (*given.values(), *fixed.values(), tau, *ref, coefficients, None, 0.0, "token-mean", 5, True)
    for learns in ([True, True, True], [True, False, False]):
        torch.library.opcheck(fused_linear_policy.linear_policy_rows, (*policy, learns, IMPL), **some)
    rows = (*given.values(), fixed["labels"], tau, 3.0, 5, True, IMPL)
    torch.library.opcheck(fused_linear_logprobs.linear_rows, rows, **some)
    rows = (*given.values(), *ref, tau, 0.0, 5, False, IMPL)
    torch.library.opcheck(fused_linear_kl.linear_kl_rows, rows, **some)


def test_it_compiles_without_a_graph_break() -> None:
    given = {**head(), **numbers()}
    gradients = []
    for function in (every_op, torch.compile(every_op, fullgraph=True, backend="aot_eager")):
        total = function(given, IMPL)
        gradients.append((total, *torch.autograd.grad(total, (given["hidden"], given["weight"]))))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
