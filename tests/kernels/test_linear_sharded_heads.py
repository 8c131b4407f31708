"""Heads that ZeRO-3 or FSDP2 holds in shards: gathered for the call, let go of after it, gradients of the whole.

This file is also the program of a rank: `python test_linear_sharded_heads.py RANK STORE`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import ppo_fast

RANKS, V, D = 2, 41, 6
OPS = ("linear_logprobs", "linear_kl", "linear_policy_loss")


def batch(op: str) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(size, generator=random)
        for name, size in (("hidden", (2, 3, D)), ("weight", (V, D)))
    }
    labels = torch.randint(V, (2, 3), generator=random)
    if op == "linear_kl":
        ref = {"ref_hidden": torch.randn(2, 3, 4, generator=random)}
        return {**tensors, **ref, "ref_weight": torch.randn(V, 4, generator=random)}
    if op == "linear_logprobs":
        return {**tensors, "labels": labels}
    rest = {
        "old_logprobs": torch.full((2, 3), -3.7),
        "advantages": torch.ones(2, 3),
        "mask": torch.ones(2, 3),
    }
    return {**tensors, "labels": labels, **rest}


def total(op: str, given: dict[str, Any], impl: str) -> Tensor:
    out = getattr(ppo_fast, op)(**given, impl=impl)
    return out.loss if op == "linear_policy_loss" else out.square().sum()


def plain_gradients(op: str, impl: str) -> tuple[Tensor, ...]:
    given = batch(op)
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight")]
    return torch.autograd.grad(total(op, given, impl), leaves)


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for DeepSpeed that empties parameters as ZeRO-3 does; notes each gather and release."""
    events: list[str] = []
    depth: list[int] = []

    @contextmanager
    def gathered_parameters(params: list[Any]) -> Iterator[None]:
        events.append("gather")
        depth.append(1)
        for one in params:
            one.data = one.ds_whole
        yield
        depth.pop()
        for one in params:
            if not depth:
                one.data = torch.empty(0)
        events.append("release")

    deepspeed, zero = ModuleType("deepspeed"), ModuleType("deepspeed.zero")
    zero.GatheredParameters = gathered_parameters
    deepspeed.zero = zero
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setitem(sys.modules, "deepspeed.zero", zero)
    return events


def partitioned(whole: Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(whole.clone())
    parameter.ds_id, parameter.ds_whole = 0, whole.clone()
    parameter.data = torch.empty(0)
    return parameter


@pytest.mark.parametrize("op", OPS)
def test_a_partitioned_head_is_gathered_and_released(gathers: list[str], op: str) -> None:
    expected = plain_gradients(op, "cpu")
    given = batch(op)
    given["hidden"].requires_grad_()
    given["weight"] = partitioned(given["weight"])
    if op == "linear_kl":
        given["ref_weight"] = partitioned(given["ref_weight"])
    loss = total(op, given, "cpu")
    assert gathers == ["gather", "release"]
    assert given["weight"].numel() == 0
    loss.backward()
    assert gathers.count("gather") == gathers.count("release")
    assert given["weight"].numel() == 0
    for got, truth in zip((given["hidden"].grad, given["weight"].grad), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-4, atol=1e-5)
    gathers.clear()
    with torch.no_grad():
        torch.testing.assert_close(total(op, given, "reference"), loss.detach(), rtol=1e-4, atol=1e-5)
    assert gathers == ["gather", "release"]


def rank_program(rank: int, store: str) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for op in OPS:
        for impl in ("cpu", "reference"):
            expected = plain_gradients(op, impl)
            given = batch(op)
            scale = 1.0 + rank  # each rank has data of its own: here the same, weighed by 1 and 2
            weight = torch.nn.Parameter(distribute_tensor(given["weight"], mesh, [Shard(0)]))
            given["hidden"].requires_grad_()
            (scale * total(op, {**given, "weight": weight}, impl)).backward()
            assert isinstance(weight.grad, DTensor)
            assert weight.grad.placements == (Shard(0),)
            torch.testing.assert_close(weight.grad.full_tensor(), 1.5 * expected[1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(given["hidden"].grad, scale * expected[0], rtol=1e-4, atol=1e-5)
    distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo's that has not ended yet would abort an orderly exit


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks on the CPU")
def test_a_dtensor_is_gathered_and_its_gradient_is_the_mean_over_the_ranks(tmp_path: Path) -> None:
    programs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path / "store")],
            env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    for program in programs:
        _, errors = program.communicate(timeout=240)
        assert program.returncode == 0, errors


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), sys.argv[2])
