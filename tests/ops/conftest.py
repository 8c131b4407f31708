"""One call of every op, with the facts that tests of all ops need: what learns, what a mask covers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast

B, T, V, D = 4, 5, 7, 3


@dataclass(frozen=True)
class Call:
    """A call of the public op of this name; `covered` are the tensors whose masked slots must not matter."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    learns: tuple[str, ...]
    covered: tuple[str, ...] = ()

    def __call__(self, **changes: Any) -> Any:
        return getattr(ppo_fast, self.op)(**{**self.tensors, **self.options, **changes})

    def to(self, dtype: torch.dtype) -> "Call":
        moved = {k: x.to(dtype) if x.is_floating_point() else x for k, x in self.tensors.items()}
        return replace(self, tensors=moved)

    def with_gradients(self) -> "Call":
        fresh = {k: x.detach().clone().requires_grad_(k in self.learns) for k, x in self.tensors.items()}
        return replace(self, tensors=fresh)


def results(value: Any) -> list[Tensor]:
    """Every tensor in what an op returned, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return list(value.values())
    return [] if value is None else [x for part in value for x in results(part)]


def differentiable(value: Any) -> list[Tensor]:
    return [x for x in results(value) if x.requires_grad]


class Draws:
    """Random tensors of the common shapes; the mask has a hole, a short row and an empty row."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
        self.labels = torch.randint(0, V, (B, T), generator=self.random)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def tokens(self, *names: str) -> dict[str, Tensor]:
        return {name: self.normal(B, T) for name in names}

    def head(self, prefix: str = "") -> dict[str, Tensor]:
        sizes = {"hidden": (B, T, D), "weight": (V, D), "bias": (V,)}
        return {prefix + name: self.normal(*size) for name, size in sizes.items()}

    def surrogate(self) -> dict[str, Tensor]:
        old_logprobs, advantages = self.normal(B, T) - 2, self.normal(B, T)
        old_logprobs[0, 0], advantages[0, 0] = -9.0, -1.0  # one token for the dual clip
        return {"old_logprobs": old_logprobs, "advantages": advantages, "mask": self.mask}


def vocabulary_calls(draw: Draws) -> list[Call]:
    """The ops that see logits or hidden states."""
    logits, ref_logits = {"logits": draw.normal(B, T, V)}, {"ref_logits": draw.normal(B, T, V)}
    head, ref_head = draw.head(), draw.head("ref_")
    temperature = {"temperature": 0.5 + draw.normal(B, T).abs()}
    rows = {"labels": draw.labels, **temperature}
    terms: dict[str, Any] = {"entropy_coef": 0.3, "kl_coef": 0.2, "dual_clip": 1.5}
    covered = ("labels", "temperature", "old_logprobs", "advantages")
    by_logits, by_head = ("logits",), ("hidden", "weight", "bias")
    return [
        Call("logprobs_from_logits", {**logits, **rows}, {}, by_logits),
        Call("logprobs_and_entropy_from_logits", {**logits, **rows}, {}, by_logits),
        Call("entropy_from_logits", {**logits, **temperature}, {}, by_logits),
        Call("kl_from_logits", {**logits, **ref_logits}, {}, ("logits", "ref_logits")),
        Call(
            "policy_loss_from_logits",
            {**logits, **ref_logits, **rows, **draw.surrogate()},
            terms,
            by_logits,
            ("logits", "ref_logits", *covered),
        ),
        Call("linear_logprobs", {**head, **rows}, {"softcap": 3.0, "return_entropy": True}, by_head),
        Call("linear_kl", {**head, **ref_head}, {"softcap": 3.0}, by_head),
        Call(
            "linear_policy_loss",
            {**head, **ref_head, **rows, **draw.surrogate()},
            {**terms, "softcap": 3.0},
            by_head,
            ("hidden", "ref_hidden", *covered),
        ),
    ]


def token_calls(draw: Draws) -> list[Call]:
    """The ops that see one number a token."""
    pair, mask = ("logprobs", "ref_logprobs"), {"mask": draw.mask}
    shaping = {**draw.tokens(*pair), "scores": draw.normal(B), **mask}
    scan = {**draw.tokens("values"), "bootstrap": draw.normal(B)}
    moments = ("masked_mean", "masked_var", "masked_whiten", "masked_rescale")
    critic = ("values", "old_values", "returns")
    return [
        Call("kl_estimate", draw.tokens(*pair), {"kind": "k3"}, ("logprobs",)),
        Call(
            "kl_shaped_rewards",
            {**shaping, **draw.tokens("token_rewards")},
            {"kind": "k3"},
            ("logprobs", "scores", "token_rewards"),
            (*pair, "token_rewards"),
        ),
        Call(
            "gae",
            {**draw.tokens("rewards"), **mask, **scan},
            {"gamma": 0.9, "lam": 0.8},
            ("rewards", "values", "bootstrap"),
            ("rewards", "values"),
        ),
        Call(
            "shaped_gae",
            {**shaping, **scan},
            {"gamma": 0.9},
            ("logprobs", "scores", "values", "bootstrap"),
            (*pair, "values"),
        ),
        *(Call(name, {**draw.tokens("x"), **mask}, {}, ("x",), ("x",)) for name in moments),
        Call(
            "policy_loss",
            {"logprobs": draw.normal(B, T) - 2, **draw.surrogate()},
            {"dual_clip": 1.5, "reduction": "seq-mean-token-mean"},
            ("logprobs",),
            ("logprobs", "old_logprobs", "advantages"),
        ),
        Call("value_loss", {**draw.tokens(*critic), **mask}, {"clip": 0.5}, ("values",), critic),
    ]


def examples(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Call]:
    """A call of every op, by its name."""
    draw = Draws(seed, dtype)
    return {call.op: call for call in (*vocabulary_calls(draw), *token_calls(draw))}


OPS = tuple(examples())
MASKED_OPS = tuple(name for name, call in examples().items() if call.covered)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", OPS)
    if "masked_op" in metafunc.fixturenames:
        metafunc.parametrize("masked_op", MASKED_OPS)


@dataclass(frozen=True)
class Toolbox:
    """What tests need of this file; importlib mode gives them no other way to it."""

    examples: Callable[..., dict[str, Call]] = examples
    results: Callable[[Any], list[Tensor]] = results
    differentiable: Callable[[Any], list[Tensor]] = differentiable


@pytest.fixture(scope="session")
def calls() -> Toolbox:
    return Toolbox()
