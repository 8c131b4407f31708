"""The scalar rules round the losses: the variants' formulas that are neither an op nor the loop.

Each is a plain function of numbers, so that a run's controller state is one float and its test is arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ppo_fast.records import Reduction
from ppo_fast.reference.losses import aggregate


@dataclass
class AdaptiveKLController:
    """KL coefficient that follows a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    ``coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon`` with kl in nats per sequence and n the episodes
    since the last update. Without a target the coefficient is fixed.
    """

    coef: float
    target: float | None
    horizon: int

    def update(self, kl: float, episodes: int) -> None:
        """Move the coefficient after a batch of `episodes` sequences with mean divergence `kl` (nats).

        A divergence that is not finite moves nothing: one bad batch must not end the coefficient.
        """
        if self.target is None or not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * episodes / self.horizon


def update_penalty_coef(beta: float, kl: float, target: float) -> float:
    """PPO-Penalty's rule (Schulman et al. 2017, arXiv:1707.06347, section 4).

    After an update of measured divergence kl: above 1.5 times the target beta doubles, below target / 1.5 it halves,
    between them it stays.
    """
    if kl > 1.5 * target:
        return beta * 2.0
    if kl < target / 1.5:
        return beta / 2.0
    return beta


def policy_gradient_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Vanilla policy gradient, the loss that PPO's first step coincides with in gradient.

    ``loss = sum(-A logprob mask) / sum(mask)``; logprobs, advantages, mask [B, T]; returns a 0-d tensor.
    """
    counted = mask != 0
    terms = -advantages.masked_fill(~counted, 0.0) * logprobs.masked_fill(~counted, 0.0)
    return aggregate(terms, counted, reduction, normalizer)
