"""Whitening over a process group: two gloo ranks with a part of the batch each get what one with all of it gets.

This file is also the program of a rank: `python test_experience_group.py RANK STORE RESULT`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

import ppo_fast

RANKS = 2
IMPLS = ("reference", "cpu", "triton")
# Of each rank's responses: ragged and uneven; a rank without a single token; one token in all.
LENGTHS = {
    "uneven": [[9, 4, 0], [1, 7, 2]],
    "empty rank": [[5, 3, 8], [0, 0, 0]],
    "one token": [[1, 0, 0], [0, 0, 0]],
    "no sequence": [[5, 3, 8], []],
}


def batch_of(case: str, rank: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rank)
    mask = torch.arange(9) < torch.tensor(LENGTHS[case][rank]).unsqueeze(1)
    names = ("logprobs", "ref_logprobs", "values")
    tensors = {name: 10 + 3 * torch.randn(mask.shape, generator=random) for name in names}
    return {**tensors, "mask": mask, "scores": torch.randn(len(mask), generator=random)}


def rank_program(rank: int, store: str, result: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    group = distributed.group.WORLD
    reduce, calls = distributed.all_reduce, []
    distributed.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))
    ppo_fast.shaped_gae(**batch_of("uneven", rank), group=group, impl="cpu")
    ppo_fast.shaped_gae(**batch_of("uneven", rank), group=group, impl="triton")
    assert len(calls) == 2, "one all-reduce for a call"
    distributed.all_reduce = reduce
    learns = {**batch_of("uneven", rank), "values": torch.zeros(3, 9, requires_grad=True)}
    with pytest.raises(ValueError, match="has no gradient; detach the inputs"):
        ppo_fast.shaped_gae(**learns, group=group)
    out = {
        (case, impl, unbiased): ppo_fast.shaped_gae(
            **batch_of(case, rank), group=group, impl=impl, unbiased=unbiased
        ).advantages
        for case in LENGTHS
        for impl in IMPLS
        for unbiased in (False, True)
    }
    torch.save({repr(key): value for key, value in out.items()}, result)
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    results = [folder / f"{rank}.pt" for rank in range(RANKS)]
    programs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder / "store"), str(result)],
            env=os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    for program in programs:
        _, errors = program.communicate(timeout=120)
        assert program.returncode == 0, errors
    return [torch.load(result, weights_only=True) for result in results]


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo ranks on the CPU, with Triton's interpreter")
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", LENGTHS)
def test_ranks_whiten_as_one(of_ranks: list[dict[str, Tensor]], case: str, impl: str, unbiased: bool) -> None:
    parts = [batch_of(case, rank) for rank in range(RANKS)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    wide = {name: x.double() if x.is_floating_point() else x for name, x in whole.items()}
    truth = ppo_fast.shaped_gae(**wide, impl="reference", unbiased=unbiased).advantages
    got = torch.cat([results[repr((case, impl, unbiased))] for results in of_ranks])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5)
    alone = ppo_fast.shaped_gae(**parts[0], impl="reference", unbiased=unbiased).advantages
    if case == "uneven":
        assert not torch.allclose(got[: len(alone)], alone, atol=1e-2), "the group changes nothing"


def test_a_group_that_is_none_of_torch_is_refused() -> None:
    with pytest.raises(
        TypeError, match="shaped_gae: `group` is a str, expected a torch.distributed.ProcessGroup"
    ):
        ppo_fast.shaped_gae(**batch_of("uneven", 0), group="world")


if __name__ == "__main__":
    rank_program(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
