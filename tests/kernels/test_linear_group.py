"""A head sharded by vocabulary: two and three gloo ranks, each with its rows of it, get what one with all of it gets.

This file is also the program of a rank: `python test_linear_group.py RANK RANKS STORE RESULT`.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

import ppo_fast

SIZES = {2: (23, 18), 3: (5, 30, 6)}  # rows of each rank: V = 41, uneven
V, D, SHAPE = 41, 6, (2, 5)
OPS = ("linear_logprobs", "linear_kl", "linear_policy_loss")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"softcap": 3.0, "chunk_rows": 3},
    "kept": {"compact": False, "chunk_rows": 4},
}
TERMS = {
    "plain": {},
    "all": {"entropy_coef": 0.1, "kl_coef": 0.2, "dual_clip": 1.5},
    "kept": {"kl_coef": 0.2},
}
IMPLS = ("reference", "cpu", "triton")
LEARNS = ("hidden", "weight", "bias")


def batch(op: str, option: str, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One call; peaked, so that a slice may hold next to nothing of a row, and with masked rows of NaN."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    tensors = {"hidden": normal(*SHAPE, D), "weight": 3 * normal(V, D), "bias": normal(V)}
    labels = torch.randint(V, SHAPE, generator=random)
    labels[0, :3] = torch.tensor([0, 22, 40])
    ref = {"ref_hidden": normal(*SHAPE, 4), "ref_weight": normal(V, 4), "ref_bias": normal(V)}
    tau = normal(*SHAPE).abs() + 0.5
    if op == "linear_policy_loss":
        logp = torch.log_softmax(tensors["hidden"] @ tensors["weight"].T + tensors["bias"], -1)
        old = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1) + 0.3 * normal(*SHAPE)
        tensors |= {"labels": labels, "old_logprobs": old, "advantages": normal(*SHAPE)}
        tensors["mask"] = torch.arange(5) != torch.tensor([[1], [3]])
        tensors["hidden"][~tensors["mask"]] = torch.nan
        labels[~tensors["mask"]] = -100
    if op == "linear_logprobs":
        tensors |= {"labels": labels}
    if op == "linear_kl" or (TERMS[option].get("kl_coef") and op == "linear_policy_loss"):
        tensors |= ref
    cast = {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors.items()}
    options = OPTIONS[option] | (TERMS[option] if op == "linear_policy_loss" else {})
    options |= {"return_entropy": True} if op == "linear_logprobs" else {}
    return {**cast, **options, "temperature": tau.to(dtype)} if option == "all" else {**cast, **options}


def outcome(op: str, given: dict[str, Any], impl: str, group: Any = None) -> dict[str, Tensor]:
    leaves = {name: given[name].clone().requires_grad_() for name in LEARNS}
    out = getattr(ppo_fast, op)(**{**given, **leaves}, impl=impl, group=group)
    if op == "linear_policy_loss":
        named, total = {"loss": out.loss, "logprobs": out.logprobs, **out.stats}, 2.5 * out.loss
    else:
        parts = out if isinstance(out, tuple) else (out,)
        named = {str(i): x for i, x in enumerate(parts)}
        upstream = torch.linspace(-1, 2, 10, dtype=parts[0].dtype).view(SHAPE)
        upstream[0, 1] = 0.0
        total = sum((upstream * x).sum() for x in parts)
    total.backward()
    return {**{k: x.detach() for k, x in named.items()}, **{f"d {k}": x.grad for k, x in leaves.items()}}


def slice_of(given: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    first = sum(SIZES[ranks][:rank])
    rows = slice(first, first + SIZES[ranks][rank])
    sharded = ("weight", "bias", "ref_weight", "ref_bias")
    return {name: x[rows] if name in sharded else x for name, x in given.items()}


def rank_program(rank: int, ranks: int, store: str, result: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = distributed.group.WORLD
    out = {
        repr((op, option, impl)): outcome(op, slice_of(batch(op, option), rank, ranks), impl, group)
        for op in OPS
        for option in OPTIONS
        for impl in IMPLS
    }
    for name in ("linear_logprobs", "linear_policy_loss"):
        given = slice_of(batch(name, "plain"), rank, ranks)
        given["labels"] = given["labels"].clone()
        given["labels"][0, 0] = V
        with pytest.raises(ValueError, match=r"expected in \[0, 41\)"):
            getattr(ppo_fast, name)(**given, group=group)
    gather, calls = distributed.all_gather_into_tensor, []
    distributed.all_gather_into_tensor = lambda *args, **kwargs: (calls.append(1), gather(*args, **kwargs))
    ppo_fast.linear_logprobs(**slice_of(batch("linear_logprobs", "plain"), rank, ranks), group=group)
    assert len(calls) == 2, "one gather of the sizes, one of every number of every row"
    torch.save(out, result)
    distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo's that has not ended yet would abort an orderly exit


@pytest.fixture(scope="module", params=SIZES)
def of_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder, ranks = tmp_path_factory.mktemp("ranks"), request.param
    results = [folder / f"{rank}.pt" for rank in range(ranks)]
    programs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(ranks), str(folder / "store"), str(result)],
            env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    for program in programs:
        _, errors = program.communicate(timeout=240)
        assert program.returncode == 0, errors
    return [torch.load(result, weights_only=True) for result in results]


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks on the CPU, with Triton's interpreter")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("op", OPS)
def test_ranks_with_slices_get_what_the_whole_head_gives(
    of_ranks: list[dict[str, Any]], op: str, option: str, impl: str
) -> None:
    expected = outcome(op, batch(op, option, dtype=torch.float64), "reference")
    results = [result[repr((op, option, impl))] for result in of_ranks]
    for name, truth in expected.items():
        parts = [result[name] for result in results]
        if name in ("d weight", "d bias"):
            torch.testing.assert_close(torch.cat(parts).double(), truth, rtol=1e-4, atol=1e-5)
            continue
        for part in parts:
            torch.testing.assert_close(part.double(), truth, rtol=1e-4, atol=1e-5)
        if impl != "reference":
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between ranks"


def test_a_group_that_is_none_of_torch_is_refused() -> None:
    for op in OPS:
        with pytest.raises(
            TypeError, match=f"{op}: `group` is a str, expected a torch.distributed.ProcessGroup"
        ):
            getattr(ppo_fast, op)(**batch(op, "plain"), group="world")


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
