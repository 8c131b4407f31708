"""Held-out evaluation: the same prompts and the same random numbers each time, so that two evaluations compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ppo.rewards import RewardFunction, call_reward_function
from ppo_fast.ppo.rollout import Prompt
from ppo_fast.records import Rollout


@dataclass(frozen=True)
class Evaluation:
    """One evaluation's means over prompts, and every sample."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluator:
    """Samples held-out prompts and judges the responses."""

    prompts: list[Prompt]
    judges: dict[str, RewardFunction]
    respond: Callable[[list[Prompt]], tuple[Rollout, Tensor, Tensor]]
    """Responses with the same random numbers each time, their scores [B] (NaN where the reward
    dropped the sample), and their divergence from the reference in
    nats a sequence [B]."""

    def __call__(self, step: int) -> Evaluation:
        """Evaluate; the training run's random numbers are left where they were."""
        rollout, scores, kl = self.respond(self.prompts)
        judged = {
            name: call_reward_function(judge, f"judge {name}", rollout.prompts, rollout.responses)
            for name, judge in self.judges.items()
        }
        lengths = rollout.response_mask.sum(1)
        kept = torch.isfinite(scores)
        metrics = {
            "eval/score": float(scores[kept].mean()),
            "eval/score_std": float(scores[kept].std(correction=0)),
            "eval/kl": float(kl[kept].mean()),
            "eval/length_mean": float(lengths.float().mean()),
            "eval/eos_fraction": float(rollout.ended.float().mean()),
        }
        metrics |= {f"eval/{name}": sum(values) / len(values) for name, values in judged.items()}
        samples = [
            {
                "step": step,
                "prompt": rollout.prompts[row],
                "response": rollout.responses[row],
                "score": float(scores[row]) if kept[row] else None,
                "judges": {name: values[row] for name, values in judged.items()},
                "kl": float(kl[row]),
                "length": int(lengths[row]),
                "eos": bool(rollout.ended[row]),
            }
            for row in range(len(rollout.prompts))
        ]
        return Evaluation(metrics, samples)
