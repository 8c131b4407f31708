"""Trainers before and after `ppo_fast.patch`: their experience stage, and their loss step from logits to gradients.

    python -m pytest bench/test_integrations.py

Each stage is the trainer's own functions, called as it calls them, where it is installed. The one with the patch is the
subject; `times_before` is how many times faster it is than the same without, timed in turn, and
`peak_extra_bytes_before` stands beside its `peak_extra_bytes`. Both give the same numbers, which is checked first.
The least traffic: every input read and every result written once; of logits, read once and their gradient written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import trainers
from cases import EXPERIENCE, LOGITS, Case
from measure import DEVICE, Run, Turns, extra_bytes, facts, peers, synchronised
from pytest_benchmark.fixture import BenchmarkFixture
from test_experience import BYTES, inputs_of
from torch import Tensor

import ppo_fast

ROUNDS, LONG, LONG_ROUNDS = 7, 4096, 2
TOKENS = 64  # columns of the loss step's sequences, or all where there are fewer
Step = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class LossInputs:
    """What a trainer holds when it updates: [B, T] each, and the logits [B, T, V]."""

    logits: Tensor
    values: Tensor
    labels: Tensor
    old: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor
    mask: Tensor


def loss_inputs(case: Case) -> LossInputs:
    torch.manual_seed(0)
    columns = min(TOKENS, case.rows)
    shape = (case.rows // columns, columns)
    old, advantages, values, old_values, returns = torch.randn(5, *shape, device=DEVICE)
    lengths = torch.randint(columns // 2, columns + 1, (shape[0], 1), device=DEVICE)
    return LossInputs(
        logits=torch.randn(*shape, case.columns, dtype=case.dtype, device=DEVICE),
        values=values,
        labels=torch.randint(case.columns, shape, device=DEVICE),
        old=old - 11.0,
        advantages=advantages,
        old_values=old_values,
        returns=returns,
        mask=torch.arange(columns, device=DEVICE) < lengths,
    )


def verl_loss() -> Step:
    """Log-probabilities, entropies, and the losses of the actor and the critic, entropy bonus included."""
    with trainers.stand_ins("ray"):
        from verl.trainer.ppo import core_algos
        from verl.utils import torch_functional
    config = SimpleNamespace(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, global_batch_info={})
    config.get = lambda name, default: default

    def step(x: LossInputs) -> tuple[Tensor, ...]:
        logprobs = torch_functional.logprobs_from_logits(x.logits, x.labels)
        entropy = torch_functional.entropy_from_logits(x.logits)
        policy, _ = core_algos.get_policy_loss_fn("vanilla")(
            x.old, logprobs.float(), x.advantages, x.mask, "token-mean", config
        )
        bonus = core_algos.agg_loss(entropy.float(), x.mask, "token-mean")
        critic, _ = core_algos.compute_value_loss(x.values, x.returns, x.old_values, x.mask, 0.5)
        return policy - 0.01 * bonus, critic

    return step


def openrlhf_loss() -> Step:
    """Log-probabilities from logits in float32, as its actor makes them, and the losses of the actor and the critic."""
    with trainers.stand_ins(*trainers.OPENRLHF, hollow=trainers.OPENRLHF_HOLLOW):
        from openrlhf.models.loss import PolicyLoss, ValueLoss
        from openrlhf.models.utils import log_probs_from_logits
    actor, critic = PolicyLoss(dual_clip=3.0), ValueLoss(0.5)

    def step(x: LossInputs) -> tuple[Tensor, ...]:
        logprobs = log_probs_from_logits(x.logits.float(), x.labels) * x.mask
        return actor(logprobs, x.old, x.advantages, x.mask)[0], critic(
            x.values, x.old_values, x.returns, x.mask
        )

    return step


LOSSES = {"verl": verl_loss, "openrlhf": openrlhf_loss}
INSTALLED = [name for name in LOSSES if name in peers()]


def learns(step: Step, inputs: LossInputs) -> tuple[Tensor, ...]:
    """Losses, then the gradients of the logits and of the values."""
    moving = {name: getattr(inputs, name).detach().requires_grad_() for name in ("logits", "values")}
    losses = step(LossInputs(**(vars(inputs) | moving)))
    torch.stack(losses).sum().backward()
    return *losses, *(x.grad for x in moving.values())


def patched(trainer: str) -> None:
    with trainers.stand_ins(*trainers.OPENRLHF, hollow=trainers.OPENRLHF_HOLLOW):
        ppo_fast.patch(trainer)


Made = Callable[[], tuple[Tensor, ...]]


def assert_same(trainer: str, call: Callable[[], Made]) -> None:
    """Each result by the size of the difference."""
    expected = call()()
    patched(trainer)
    got = call()()
    ppo_fast.unpatch()
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).double().norm() <= 1e-4 * theirs.double().norm()


def compare(
    benchmark: BenchmarkFixture, trainer: str, call: Callable[[], Made], moved: int, rounds: int
) -> None:
    """Time what `call` makes without the patch and with it; each is made and run in its own state."""
    before = call()
    before()
    memory_before = extra_bytes(before)
    try:
        patched(trainer)
        after = call()
        after()
        memory = extra_bytes(after)
        turns = Turns({"before": before})
        measure(benchmark, trainer, after, turns, rounds)
    finally:
        ppo_fast.unpatch()
    stats = benchmark.stats.stats
    benchmark.extra_info |= facts(stats.median, turns.median("before"), moved, memory)
    benchmark.extra_info |= turns.facts(stats) | {"peak_extra_bytes_before": memory_before}


def measure(benchmark: BenchmarkFixture, trainer: str, after: Run, turns: Turns, rounds: int) -> None:
    def take_a_turn() -> None:
        ppo_fast.unpatch()
        turns.take()
        patched(trainer)

    benchmark.pedantic(synchronised(after), setup=take_a_turn, rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("case", EXPERIENCE[:3], ids=lambda case: case.name)
@pytest.mark.parametrize("trainer", INSTALLED)
def test_experience_stage(benchmark: BenchmarkFixture, trainer: str, case: Case) -> None:
    inputs = trainers.held(trainer, inputs_of("experience", case))

    def call() -> Made:
        function = trainers.function_of(trainer)
        return lambda: function(*inputs)

    assert_same(trainer, call)
    moved = case.rows * case.columns * BYTES["experience"]
    compare(benchmark, trainer, call, moved, LONG_ROUNDS if case.columns > LONG else ROUNDS)


@pytest.mark.parametrize("case", LOGITS, ids=lambda case: case.name)
@pytest.mark.parametrize("trainer", INSTALLED)
def test_loss_step(benchmark: BenchmarkFixture, trainer: str, case: Case) -> None:
    inputs = loss_inputs(case)

    def call(inputs: LossInputs = inputs) -> Made:
        step = LOSSES[trainer]()
        return lambda: learns(step, inputs)

    # A log-probability that is rounded to half precision may fall on the other side of the clip.
    assert_same(trainer, partial(call, replace(inputs, logits=inputs.logits.float())))
    compare(benchmark, trainer, call, 2 * case.bytes, ROUNDS)
