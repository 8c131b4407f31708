"""The experience stage: KL-shaped rewards, GAE and whitening in one, and GAE alone; beside a plain copy and peers.

    python -m pytest bench/test_experience.py --benchmark-group-by=param:case,param:op

Least traffic: every input read and every result written once, in bytes a token as BYTES has it. `times_copy` and
`times_clone` are the time as a multiple of that of a plain copy of so many bytes, taken in turn with it: into a buffer
that stands, and into a new one, as an op's results are. `source` is the source's eager loop, behind `times_eager`;
`chunked` is slime's; verl, OpenRLHF and torchrl take part where they are installed (`make peers`).

Responses fill between half and all of the columns and are padded on the right, where all mask rules agree.
"""

from functools import lru_cache, partial

import eager
import pytest
import torch
import trainers
from cases import EXPERIENCE, Case
from measure import DEVICE, Copies, Run, best_of, extra_bytes, facts, synchronised
from pytest_benchmark.fixture import BenchmarkFixture
from suite import FORWARD, IMPL, Function, Subject, assert_parity, runner
from torch import Tensor

import ppo_fast
from ppo_fast import reference

# Of logprobs, ref_logprobs, values, the mask (bool); rewards, KL, advantages, returns. Then of rewards, values, the
# mask; advantages, returns.
BYTES = {"experience": 3 * 4 + 1 + 4 * 4, "gae": 2 * 4 + 1 + 2 * 4}
OWN = {"experience": ("fused", "source"), "gae": ("fused", "source", "chunked")}
COMBINATIONS = [(op, name) for op in OWN for name in (*OWN[op], *trainers.installed(op))]
SLOW = ("source", "verl", "openrlhf", "torchrl")  # seconds a call where responses are long
ROUNDS, SLOW_ROUNDS = 20, 2


def experience_of(module: object, *inputs: Tensor, **options: object) -> tuple[Tensor, ...]:
    """By `ppo_fast` or its reference, as `gae_of`."""
    options |= {"kl_coef": eager.KL_COEF, "clip_score": eager.SCORE_CLIP}
    result = module.shaped_gae(*inputs, gamma=eager.GAMMA, lam=eager.LAM, **options)
    return result.rewards, result.kl, result.advantages, result.returns


def gae_of(
    module: object, rewards: Tensor, values: Tensor, mask: Tensor, *_: Tensor, **options: str
) -> tuple[Tensor, Tensor]:
    return module.gae(rewards, values, mask, gamma=eager.GAMMA, lam=eager.LAM, **options)


def source_experience(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, values: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    """The source does not whiten; the whitening is ours, so that the work is the same."""
    rewards, kl = eager.shaped_rewards(logprobs, ref_logprobs, scores, mask)
    advantages, returns = eager.gae(rewards, values, mask)
    return rewards, kl, eager.whiten(advantages, mask), returns


SOURCE = {"experience": source_experience, "gae": eager.gae}


def implementation(op: str, name: str) -> Function:
    if name == "fused":
        return partial(experience_of if op == "experience" else gae_of, ppo_fast, impl=IMPL)
    if name == "chunked":
        return eager.chunked_gae
    return SOURCE[op] if name == "source" else trainers.function_of(name)


def truth(op: str, name: str) -> Function:
    if op == "gae":
        return partial(gae_of, reference)
    return partial(experience_of, reference, unbiased=name in trainers.UNBIASED)


def inputs_of(op: str, case: Case) -> tuple[Tensor, ...]:
    """The arguments of `shaped_gae`, or of `gae`; the mask is the last."""
    torch.manual_seed(0)
    shape = (case.rows, case.columns)
    lengths = torch.randint(case.columns // 2, case.columns + 1, (case.rows, 1), device=DEVICE)
    mask = torch.arange(case.columns, device=DEVICE) < lengths
    first, values = torch.randn(2, *shape, dtype=case.dtype, device=DEVICE)
    if op == "gae":
        return first, values, mask
    logprobs = -first.abs()
    scores = 4 * torch.randn(case.rows, dtype=case.dtype, device=DEVICE)  # some are clipped
    return logprobs, logprobs + 0.1 * torch.randn_like(logprobs), scores, values, mask


def counted(function: Function, mask: Tensor) -> Function:
    """`function` with zeros in masked slots of its results, where the others leave what they like."""
    return lambda *inputs: tuple(torch.where(mask, x, 0.0) for x in function(*inputs))


@lru_cache
def source_seconds(op: str, case: Case) -> float:
    return best_of(runner(SOURCE[op], FORWARD, inputs_of(op, case)), times=SLOW_ROUNDS)


def record(benchmark: BenchmarkFixture, run: Run, op: str, case: Case, rounds: int) -> None:
    moved = case.rows * case.columns * BYTES[op]
    copies = Copies(moved)
    benchmark.pedantic(synchronised(run), setup=copies.take, rounds=rounds, warmup_rounds=1)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info |= facts(seconds, source_seconds(op, case), moved, extra_bytes(run))
    benchmark.extra_info |= copies.facts(seconds)


@pytest.mark.parametrize("case", EXPERIENCE, ids=lambda case: case.name)
@pytest.mark.parametrize(("op", "name"), COMBINATIONS)
def test_experience(benchmark: BenchmarkFixture, case: Case, op: str, name: str) -> None:
    # A reference in float64 is a loop over tokens too, and a response must end within what parity is checked on.
    few = inputs_of(op, Case(min(case.rows, 8), min(case.columns, 512), case.dtype))
    subject = Subject(
        name=op,
        case=case,
        work=FORWARD,
        inputs=trainers.held(name, inputs_of(op, case)),
        few=trainers.held(name, few),
        truth=truth(op, name),
        moved=case.rows * case.columns * BYTES[op],
    )
    function = implementation(op, name)
    assert_parity(function if name == "fused" else counted(function, few[-1]), subject)
    rounds = SLOW_ROUNDS if name in SLOW else ROUNDS
    record(benchmark, runner(function, FORWARD, subject.inputs), op, case, rounds)


@pytest.mark.parametrize("case", EXPERIENCE, ids=lambda case: case.name)
@pytest.mark.parametrize("op", BYTES)
@pytest.mark.parametrize("name", ["copy", "clone"])
def test_copy(benchmark: BenchmarkFixture, case: Case, op: str, name: str) -> None:
    copies = Copies(case.rows * case.columns * BYTES[op])
    record(benchmark, copies.copy if name == "copy" else copies.clone, op, case, ROUNDS)
