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


def examples(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Call]:
    """A call of every op; the mask has a hole, a short row and an empty row."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, V, (B, T), generator=random)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    logits, ref_logits = normal(B, T, V), normal(B, T, V)
    head = {"hidden": normal(B, T, D), "weight": normal(V, D), "bias": normal(V)}
    ref_head = {"ref_hidden": normal(B, T, D), "ref_weight": normal(V, D), "ref_bias": normal(V)}
    temperature = 0.5 + normal(B, T).abs()
    pg = {"old_logprobs": normal(B, T) - 2, "advantages": normal(B, T), "mask": mask}
    shaping = {"logprobs": normal(B, T), "ref_logprobs": normal(B, T), "scores": normal(B), "mask": mask}
    scan = {"values": normal(B, T), "bootstrap": normal(B)}
    bonus: dict[str, Any] = {"entropy_coef": 0.3, "kl_coef": 0.2, "dual_clip": 1.5}
    rows = {"labels": labels, "temperature": temperature}
    pg_covered = ("old_logprobs", "advantages")
    learned_head = ("hidden", "weight", "bias")
    calls = [
        Call("logprobs_from_logits", {"logits": logits, **rows}, {}, ("logits",)),
        Call("logprobs_and_entropy_from_logits", {"logits": logits, **rows}, {}, ("logits",)),
        Call("entropy_from_logits", {"logits": logits, "temperature": temperature}, {}, ("logits",)),
        Call("kl_from_logits", {"logits": logits, "ref_logits": ref_logits}, {}, ("logits",)),
        Call(
            "policy_loss_from_logits",
            {"logits": logits, "ref_logits": ref_logits, **rows, **pg},
            bonus,
            ("logits",),
            ("logits", "ref_logits", "labels", "temperature", *pg_covered),
        ),
        Call("linear_logprobs", {**head, **rows}, {"softcap": 3.0, "return_entropy": True}, learned_head),
        Call("linear_kl", {**head, **ref_head}, {"softcap": 3.0}, learned_head),
        Call(
            "linear_policy_loss",
            {**head, **ref_head, **rows, **pg},
            {**bonus, "softcap": 3.0},
            learned_head,
            ("hidden", "ref_hidden", "labels", "temperature", *pg_covered),
        ),
        Call(
            "kl_estimate",
            {k: shaping[k] for k in ("logprobs", "ref_logprobs")},
            {"kind": "k3"},
            ("logprobs",),
        ),
        Call(
            "kl_shaped_rewards",
            {**shaping, "token_rewards": normal(B, T)},
            {"kind": "k3"},
            ("logprobs", "scores", "token_rewards"),
            ("logprobs", "ref_logprobs", "token_rewards"),
        ),
        Call(
            "gae",
            {"rewards": normal(B, T), "mask": mask, **scan},
            {"gamma": 0.9, "lam": 0.8},
            ("rewards", "values", "bootstrap"),
            ("rewards", "values"),
        ),
        Call(
            "shaped_gae",
            {**shaping, **scan},
            {"gamma": 0.9},
            ("logprobs", "scores", "values", "bootstrap"),
            ("logprobs", "ref_logprobs", "values"),
        ),
        *(
            Call(name, {"x": normal(B, T), "mask": mask}, {}, ("x",), ("x",))
            for name in ("masked_mean", "masked_var", "masked_whiten", "masked_rescale")
        ),
        Call(
            "policy_loss",
            {"logprobs": normal(B, T) - 2, **pg},
            {"dual_clip": 1.5, "reduction": "seq-mean-token-mean"},
            ("logprobs",),
            ("logprobs", *pg_covered),
        ),
        Call(
            "value_loss",
            {k: normal(B, T) for k in ("values", "old_values", "returns")} | {"mask": mask},
            {"clip": 0.5},
            ("values",),
            ("values", "old_values", "returns"),
        ),
    ]
    return {call.op: call for call in calls}


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
