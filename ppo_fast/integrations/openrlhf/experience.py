"""The scans over tokens of OpenRLHF's RemoteExperienceMaker, on our GAE; they run on the CPU, in its controller."""

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import contract


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """GAE where a masked slot is a step with reward 0 and value 0; no gradient.

    Args:
        self: the experience maker; not used.
        values, rewards: [B, T].
        action_mask: [B, T], bool or numeric, which multiplies both; or None.
        gamma, lambd: numbers in [0, 1].

    Returns:
        (advantages, returns), [B, T]; masked slots hold what the recurrence gives there.
    """
    if action_mask is not None:
        values, rewards = action_mask * values, action_mask * rewards
    every_slot = torch.ones(rewards.shape, dtype=torch.bool, device=rewards.device)
    advantages, _ = ppo_fast.gae(rewards, values, every_slot, gamma=gamma, lam=lambd)
    advantages = advantages.to(contract.promoted(values, rewards))
    return advantages, advantages + values


@torch.no_grad()
def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """returns_t = reward_t + gamma returns_{t+1}, [B, T] in the dtype of `rewards`: GAE of a critic that says 0.

    Args:
        self: the experience maker; not used.
        rewards: [B, T].
        action_mask: [B, T], bool or numeric, which multiplies the rewards; or None.
        gamma: in [0, 1].
    """
    dtype = rewards.dtype
    if action_mask is not None:
        rewards = action_mask * rewards
    every_slot = torch.ones(rewards.shape, dtype=torch.bool, device=rewards.device)
    returns, _ = ppo_fast.gae(rewards, torch.zeros_like(rewards), every_slot, gamma=gamma, lam=1.0)
    return returns.to(dtype)
