"""One minibatch: gradients of the clipped losses, accumulated over micro-batches, and a step of both optimisers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

import ppo_fast
from ppo_fast.ppo.config import ObjectiveConfig, OptimizerConfig
from ppo_fast.ppo.experience import PolicyView, Rows, ScoredRollout, micro_batches, response_values
from ppo_fast.records import Experience, PolicyLoss, ValueLoss


class Learner:
    """A model with the optimiser and the learning-rate schedule that are its own."""

    def __init__(
        self, model: PreTrainedModel, name: str, learning_rate: float, config: OptimizerConfig, steps: int
    ) -> None:
        self.model = model
        self.name = name
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self.scheduler = get_scheduler(config.schedule, self.optimizer, config.warmup_steps, steps)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])

    def clip(self) -> Tensor:
        """Scale the gradients down to the limit; returns their 2-norm before.

        Raises FloatingPointError where the norm is not finite.
        """
        limit = self.max_grad_norm or torch.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the {self.name}'s gradient norm is {float(norm)}: the update was not applied. Lower "
                f"optimizer.{self.name}_lr, or look at objective/kl in metrics.jsonl for a run that had gone astray"
            )
        return norm

    def step(self) -> None:
        """Step the weights, advance the schedule, clear the gradients."""
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class UpdateStats:
    """Means over the counted tokens of one minibatch; 0-d tensors, on the device."""

    tokens: Tensor
    """Counted tokens, the weight of this record in a mean over minibatches."""
    means: dict[str, Tensor]
    ratio_max: Tensor


@dataclass(frozen=True)
class Updater:
    """The two clipped losses of a minibatch and the step that follows them."""

    actor: Learner
    critic: Learner
    view: PolicyView
    objective: ObjectiveConfig

    def minibatch(self, scored: ScoredRollout, experience: Experience, rows: Rows) -> UpdateStats:
        """Step both models on the given rows.

        The losses are normalised by the counts of the whole minibatch, so micro_batch_size changes memory and not
        the gradient.
        """
        mask = scored.rollout.response_mask[rows]
        normalizer = self._normalizer(mask)
        stats = []
        for part in micro_batches(mask.shape[0], self.objective.micro_batch_size):
            chosen = _compose(rows, part)
            policy = self.policy_loss(scored, experience, chosen, normalizer)
            policy.loss.backward()
            value = self.value_loss(scored, experience, chosen, normalizer)
            value.loss.backward()
            stats.append((mask[part].sum(), policy, value))
        means = _pool(stats)
        # Both norms before either step: a gradient that is not finite leaves both models as they were.
        learners = (self.actor, self.critic)
        means |= {f"optim/{learner.name}_grad_norm": learner.clip() for learner in learners}
        for learner in learners:
            learner.step()
        ratio_max = torch.stack([policy.stats["ratio_max"] for _, policy, _ in stats]).max()
        return UpdateStats(mask.sum(), means, ratio_max)

    def policy_loss(
        self, scored: ScoredRollout, experience: Experience, rows: Rows, normalizer: Tensor
    ) -> PolicyLoss:
        """Clipped policy loss of some rows, minus the entropy bonus, over `normalizer`."""
        objective = self.objective
        return self.view.loss(
            self.actor.model,
            scored.rollout,
            rows,
            None if scored.kept_tokens is None else scored.kept_tokens[rows],
            scored.logprobs[rows],
            experience.advantages[rows],
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            dual_clip=objective.dual_clip,
            entropy_coef=objective.entropy_coef,
            reduction=objective.reduction,
            normalizer=normalizer,
            log_ratio_clamp=objective.log_ratio_clamp,
        )

    def value_loss(
        self, scored: ScoredRollout, experience: Experience, rows: Rows, normalizer: Tensor
    ) -> ValueLoss:
        """Clipped value loss of some rows, over `normalizer`."""
        return ppo_fast.value_loss(
            response_values(self.critic.model, scored.rollout, rows, bf16=self.view.bf16),
            scored.values[rows],
            experience.returns[rows],
            scored.rollout.response_mask[rows],
            clip=self.objective.value_clip,
            reduction=self.objective.reduction,
            normalizer=normalizer,
            impl=self.view.impl,
        )

    def _normalizer(self, mask: Tensor) -> Tensor:
        """What the losses of a minibatch are divided by: its counted tokens, or its sequences that have any."""
        counted = mask.sum() if self.objective.reduction == "token-mean" else mask.any(1).sum()
        return counted.float().clamp(min=1.0)


def _compose(rows: Rows, part: slice) -> Rows:
    if isinstance(rows, Tensor):
        return rows[part]
    return slice(rows.start + part.start, rows.start + part.stop)


def _pool(stats: list[tuple[Tensor, PolicyLoss, ValueLoss]]) -> dict[str, Tensor]:
    """Micro-batches' figures of one minibatch: losses add up, statistics average by token."""
    tokens = torch.stack([count for count, _, _ in stats]).float()
    weights = tokens / tokens.sum().clamp(min=1.0)

    def mean(values: list[Tensor]) -> Tensor:
        return (torch.stack(values).float() * weights).sum()

    policies, values = [policy for _, policy, _ in stats], [value for _, _, value in stats]
    return {
        "loss/policy": torch.stack([policy.loss.detach() for policy in policies]).sum(),
        "loss/value": torch.stack([value.loss.detach() for value in values]).sum(),
        "policy/approx_kl": mean([policy.stats["approx_kl"] for policy in policies]),
        "policy/clip_fraction": mean([policy.stats["clip_fraction"] for policy in policies]),
        "policy/ratio_mean": mean([policy.stats["ratio_mean"] for policy in policies]),
        "policy/entropy": mean([policy.stats["entropy"] for policy in policies]),
        "value/clip_fraction": mean([value.stats["clip_fraction"] for value in values]),
    }
