"""The experience stage: KL-shaped rewards, GAE and whitening in one, and GAE alone; beside a plain copy and peers.

    python -m pytest bench/test_experience.py

One benchmark an op and shape: ours; the source's eager loop (behind `times_eager`), slime's chunks, verl, OpenRLHF and
torchrl where they are installed (`make peers`), and plain copies are timed in turn with it, as many rounds of each.
`seconds` in its `extra_info` has the median and the best of each, `times_<name>` the ratio of the medians: how many
times faster than that ours is, and for copies how many times longer than they it takes.

Least traffic: every input read and every result written once, in bytes a token as BYTES has it. A copy of so many bytes
goes into a buffer that stands (`copy`), or into a new one, as an op's results do (`clone`).

Responses fill between half and all of the columns and are padded on the right, where all mask rules agree.
"""

from functools import partial

import eager
import pytest
import torch
import trainers
from cases import EXPERIENCE, Case
from measure import DEVICE, Run, Turns, copies, extra_bytes, facts, synchronised
from pytest_benchmark.fixture import BenchmarkFixture
from suite import FORWARD, IMPL, Function, Subject, assert_parity, runner
from torch import Tensor

import ppo_fast
from ppo_fast import reference

# Of logprobs, ref_logprobs, values, the mask (bool); rewards, KL, advantages, returns. Then of rewards, values, the
# mask; advantages, returns.
BYTES = {"experience": 3 * 4 + 1 + 4 * 4, "gae": 2 * 4 + 1 + 2 * 4}
OWN = {"experience": ("fused", "source"), "gae": ("fused", "source", "chunked")}
LONG, ROUNDS, LONG_ROUNDS = 10_000, 11, 3  # a loop over so many columns takes seconds a call


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


def checked(op: str, name: str, case: Case) -> Run:
    """A call of `name`, once its numbers are those of the reference."""
    # In float64 that is a loop over tokens too, and a response must end within what parity is checked on.
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
    return runner(function, FORWARD, subject.inputs)


@pytest.mark.parametrize("case", EXPERIENCE, ids=lambda case: case.name)
@pytest.mark.parametrize("op", BYTES)
def test_experience(benchmark: BenchmarkFixture, case: Case, op: str) -> None:
    runs = {name: checked(op, name, case) for name in (*OWN[op], *trainers.installed(op))}
    fused = runs.pop("fused")
    moved = case.rows * case.columns * BYTES[op]
    turns = Turns(runs | copies(moved))
    rounds = LONG_ROUNDS if case.columns > LONG else ROUNDS
    benchmark.pedantic(synchronised(fused), setup=turns.take, rounds=rounds, warmup_rounds=1)
    stats = benchmark.stats.stats
    benchmark.extra_info |= facts(stats.median, turns.median("source"), moved, extra_bytes(fused))
    benchmark.extra_info |= turns.facts(stats, longer_than=("copy", "clone"))
