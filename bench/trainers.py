"""The experience stage of verl and OpenRLHF and the GAE of torchrl, from their packages, imported only when timed.

`make test` installs the first two, `make peers` the third. Their functions are called as their trainers call them, and
on what these hold by then: `held` turns the inputs of the suite into that, outside the clock. What stands in masked
slots of a result is theirs.
"""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import torch
from eager import GAMMA, KL_COEF, LAM, SCORE_CLIP
from measure import peers
from suite import Function
from torch import Tensor

# Versions: verl 0.9.1, openrlhf 0.11.2, torchrl 0.10.1 (the newest beside verl's tensordict; its GAE is 0.14.1's).
OPS = {"experience": ("verl", "openrlhf"), "gae": ("torchrl",)}
# What OpenRLHF's numerics, verl's among them, never reach.
OPENRLHF = ("ray", "deepspeed", "openrlhf.trainer.ray.launcher")
OPENRLHF_HOLLOW = ("openrlhf.models", "openrlhf.utils")
UNBIASED = ("verl",)  # whitens by the variance that divides by n - 1


def installed(op: str) -> list[str]:
    return [name for name in OPS[op] if name in peers()]


def function_of(name: str) -> Function:
    return {"verl": verl_experience, "openrlhf": openrlhf_experience, "torchrl": torchrl_gae}[name]()


def held(name: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *numbers, mask = inputs
    if name in OPS["experience"]:  # both keep the mask in int64
        return *numbers, mask.long()
    if name in OPS["gae"]:
        return *inputs, *following_and_done(*inputs)
    return inputs


def following_and_done(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """V of the next state and the end of an episode, which torchrl reads from its records."""
    at_last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(1, keepdim=True) - 1
    return torch.nn.functional.pad(values[:, 1:], (0, 1)), at_last


@contextmanager
def stand_ins(*absent: str, hollow: tuple[str, ...] = ()) -> Iterator[None]:
    """Modules that stand in sys.modules while a peer is imported, so that its numerics load without its machinery.

    The functions that are timed never reach them: `absent` (Ray, DeepSpeed) are mocks; `hollow` packages keep their
    files and lose their `__init__`, which imports models and engines.
    """
    stubs: dict[str, ModuleType] = {name: MagicMock(name=name) for name in absent}
    for name in hollow:
        root, *parts = name.split(".")
        stubs[name] = ModuleType(name)
        stubs[name].__path__ = [str(Path(importlib.util.find_spec(root).origin).parent.joinpath(*parts))]
    stubs = {name: stub for name, stub in stubs.items() if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


def verl_experience() -> Function:
    with stand_ins("ray"):
        from verl.trainer.ppo import core_algos

    def function(
        logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        last = mask.sum(1, keepdim=True) - 1
        paid = scores.clamp(-SCORE_CLIP, SCORE_CLIP).unsqueeze(1)
        token_level_scores = torch.zeros_like(logprobs).scatter_(1, last, paid)
        kl = core_algos.kl_penalty(logprobs, ref_logprobs, "kl") * mask
        rewards = token_level_scores - KL_COEF * kl
        advantages, returns = core_algos.compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
        return rewards, kl, advantages, returns

    return function


def openrlhf_experience() -> Function:
    with stand_ins(*OPENRLHF, hollow=OPENRLHF_HOLLOW):
        from openrlhf.models.utils import compute_approx_kl, compute_reward
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    def function(
        logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, values: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        kl = compute_approx_kl(logprobs, ref_logprobs, kl_estimator="k1")
        limits = (-SCORE_CLIP, SCORE_CLIP)
        rewards = compute_reward(scores, KL_COEF, kl, action_mask=mask, reward_clip_range=limits)
        advantages, returns = RemoteExperienceMaker.get_advantages_and_returns(
            None, values, rewards, mask, GAMMA, LAM
        )
        return rewards, kl, openrlhf_whiten(advantages, mask), returns

    return function


def openrlhf_whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """In our words: OpenRLHF does it between records of a rollout, in no function of its own."""
    count = mask.sum()
    mean = (advantages * mask).sum() / count
    variance = ((advantages - mean).pow(2) * mask).sum() / count
    return (advantages - mean) * variance.clamp(min=1e-8).rsqrt()


def torchrl_gae() -> Function:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    def function(
        rewards: Tensor, values: Tensor, mask: Tensor, following: Tensor, done: Tensor
    ) -> tuple[Tensor, Tensor]:
        last = (x.unsqueeze(-1) for x in (values, following, rewards, done, done))
        advantages, returns = vec_generalized_advantage_estimate(GAMMA, LAM, *last)
        return advantages.squeeze(-1), returns.squeeze(-1)

    return function
