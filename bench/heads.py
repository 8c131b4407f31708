"""Ways from hidden states to a policy loss, log-probabilities or a KL: ours, whole logits, and what trainers have.

Each takes hidden states and a head, which both learn. Other libraries are imported only when one of theirs is timed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import eager
import torch
from cases import HeadCase
from measure import DEVICE, peers
from suite import IMPL, wide
from torch import Tensor
from torch.nn import functional
from trainers import stand_ins

import ppo_fast
from ppo_fast import reference

SEQUENCES = 8
TEMPERATURE = 0.7
TRL_TILE = 32768  # columns, as TRL's trainers have it
Function = Callable[..., tuple[Tensor, ...]]

# Versions: trl 1.16, liger-kernel 0.8, verl 0.9, openrlhf 0.11. Liger's loss takes one advantage a sequence, so
# the inputs have no more; verl's log-probabilities come with an entropy, OpenRLHF's from whole logits.
PEERS = {"loss": ("liger",), "logprobs": ("trl", "verl", "openrlhf"), "kl": ()}


def names_of(work: str) -> list[str]:
    return ["fused", "eager", *(name for name in PEERS[work] if name in peers())]


def inputs_of(work: str, case: HeadCase, *, active: float = 1.0) -> tuple[Tensor, ...]:
    """Hidden states, weight, labels; for a loss old log-probabilities, advantages and mask; for a KL another head.

    `active` is the share of tokens whose advantage is not 0.
    """
    torch.manual_seed(0)
    shape = (SEQUENCES, case.rows // SEQUENCES)
    hidden = torch.randn(*shape, case.width, device=DEVICE).to(case.dtype)
    weight = (torch.randn(case.columns, case.width, device=DEVICE) * 3 * case.width**-0.5).to(case.dtype)
    if work == "kl":
        other = [
            (x.float() + 0.1 * torch.randn(x.shape, device=DEVICE)).to(case.dtype) for x in (hidden, weight)
        ]
        return hidden, weight, *other
    labels = torch.randint(case.columns, shape, device=DEVICE)
    if work == "logprobs":
        return hidden, weight, labels
    with torch.no_grad():
        old = ppo_fast.linear_logprobs(hidden, weight, labels, temperature=TEMPERATURE, impl=IMPL)
    old += 0.1 * torch.randn_like(old)
    advantages = (torch.randn(SEQUENCES, 1, device=DEVICE) + 0.01).expand(shape).clone()
    advantages[torch.rand(shape, device=DEVICE) >= active] = 0.0
    return hidden, weight, labels, old, advantages, torch.ones(shape, device=DEVICE)


def implementation(work: str, name: str) -> Function:
    if name in ("fused", "eager"):
        return {"fused": fused, "eager": whole_logits}[name](work)
    return {"trl": trl_logprobs, "verl": verl_logprobs, "openrlhf": openrlhf_logprobs, "liger": liger_loss}[
        name
    ]()


def truth(work: str) -> Function:
    return partial(by_ops, reference, work)


def fused(work: str) -> Function:
    return partial(by_ops, ppo_fast, work, impl=IMPL)


def by_ops(
    module: Any, work: str, hidden: Tensor, weight: Tensor, *rest: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """By `ppo_fast` or its reference."""
    options |= {"temperature": TEMPERATURE}
    if work == "loss":
        return (module.linear_policy_loss(hidden, weight, *rest, **options).loss,)
    if work == "kl":
        return (module.linear_kl(hidden, weight, *rest, **options),)
    return (module.linear_logprobs(hidden, weight, *rest, **options),)


def whole_logits(work: str) -> Function:
    def function(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        logits = functional.linear(hidden, weight)
        if work == "kl":
            with torch.no_grad():
                ref_logits = functional.linear(*rest)
            return (eager.kl(logits, ref_logits, TEMPERATURE),)
        labels, *numbers = rest
        logprobs = eager.pick(eager.log_softmax(logits, TEMPERATURE), labels)
        return (logprobs,) if work == "logprobs" else (eager.policy_loss(logprobs, *numbers),)

    return function


def trl_logprobs() -> Function:
    with stand_ins("datasets"):
        import trl.trainer.utils  # noqa: F401  which the function imports when it runs
        from trl.kernels import ChunkedLogProbFunction

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        flat = hidden.flatten(0, 1)
        out = ChunkedLogProbFunction.apply(
            flat, weight, None, labels.flatten(), TEMPERATURE, TRL_TILE, None, 1.0, ()
        )
        return (out[0].view(labels.shape),)

    return function


def verl_logprobs() -> Function:
    with stand_ins("ray", hollow=("verl", "verl.utils", "verl.utils.experimental")):
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

    op = FusedLinearForPPO()

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (op(hidden, weight, labels, TEMPERATURE)[0],)

    return function


def openrlhf_logprobs() -> Function:
    with stand_ins(
        "ray", "deepspeed", "openrlhf.trainer.ray.launcher", hollow=("openrlhf.models", "openrlhf.utils")
    ):
        from openrlhf.models.utils import log_probs_from_logits

    def function(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = functional.linear(hidden, weight).float()  # its actor widens them
        return (log_probs_from_logits(logits, labels, TEMPERATURE),)

    return function


def liger_loss() -> Function:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    op = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", temperature=TEMPERATURE
    )

    def function(
        hidden: Tensor, weight: Tensor, labels: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        return (op(hidden, weight, labels, mask, advantages[:, 0], old_per_token_logps=old)[0],)

    return function


def run_of(function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], list[Tensor]]:
    """One forward and backward; returns results and both gradients. An upstream gradient varies from row to row."""
    hidden, weight, *rest = inputs

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        results = function(*leaves, *rest)
        one = results[0]
        total = (
            one
            if one.dim() == 0
            else (one * torch.linspace(0.5, 1.5, one.numel(), device=one.device).view_as(one)).sum()
        )
        total.backward()
        return [*(x.detach() for x in results), *(x.grad for x in leaves)]

    return run


def truth_of(work: str, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return run_of(truth(work), tuple(map(wide, inputs)))()
