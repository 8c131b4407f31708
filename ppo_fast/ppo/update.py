"""One minibatch: gradients of the clipped losses, accumulated over micro-batches, and a step of both optimisers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

import ppo_fast
from ppo_fast.ppo.config import ObjectiveConfig, OptimizerConfig
from ppo_fast.ppo.experience import PolicyView, Rows, ScoredRollout, micro_batches, response_values
from ppo_fast.ppo.interruption import StopSignal
from ppo_fast.ppo.parallel import ALL_ROWS, Shard, sum_gradients
from ppo_fast.ppo.ranks import Ranks
from ppo_fast.ppo.shortage import MicroBatches
from ppo_fast.ppo.state import (
    Saved,
    State,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from ppo_fast.records import Experience, PolicyLoss, ValueLoss

if TYPE_CHECKING:
    from ppo_fast.ppo.engines import EngineLearner

DECISIVE = ("loss/policy", "loss/value", "optim/actor_grad_norm", "optim/critic_grad_norm")
"""Figures of an update that must be finite for it to take place."""


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

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """`function(model, *args, **options)`, differentiable."""
        return function(self.model, *args, **options)

    @contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        """The model, for many forward passes without gradient."""
        yield self.model

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers, by name."""
        return self.model.state_dict()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this process's share of the loss; `last` says that the minibatch ends with it."""
        loss.backward()
        if last and Ranks().count > 1:
            sum_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])

    def clip(self) -> Tensor:
        """Scale the gradients down to the limit; returns their 2-norm before, which need not be finite."""
        limit = self.max_grad_norm or torch.inf
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def step(self) -> None:
        """Step the weights and advance the schedule."""
        self.optimizer.step()
        self.scheduler.step()

    def discard(self) -> None:
        """Clear the gradients; weights and schedule stay."""
        self.optimizer.zero_grad(set_to_none=True)

    def shared_state(self) -> dict[str, State]:
        """Weights, optimiser and schedule: one for all ranks."""
        return {
            self.name: model_state(self.model),
            f"{self.name}_optimizer": optimizer_state(self.optimizer, self.scheduler),
        }

    def own_state(self) -> dict[str, State]:
        """Nothing: every rank holds the same."""
        return {}

    def load_state(self, saved: Saved) -> None:
        """Restore weights, optimiser and schedule in place."""
        load_model_state(self.model, saved.shared(self.name), self.name)
        load_optimizer_state(self.optimizer, self.scheduler, saved.shared(f"{self.name}_optimizer"))


@dataclass(frozen=True)
class UpdateStats:
    """Means over the counted tokens of one minibatch; 0-d tensors, on the device."""

    tokens: Tensor
    """Counted tokens, the weight of this record in a mean over minibatches."""
    means: dict[str, Tensor]
    ratio_max: Tensor
    skipped: bool = False
    """The loss or a gradient was not finite, and neither model was stepped."""


@dataclass
class Updater:
    """The two clipped losses of a minibatch and the step that follows them."""

    actor: Learner | EngineLearner
    critic: Learner | EngineLearner
    view: PolicyView
    objective: ObjectiveConfig
    max_skipped: int = 0
    """Updates in a row that may be skipped."""
    stop: StopSignal = field(default_factory=StopSignal)
    micro: MicroBatches | None = None
    """Size of a micro-batch, and whether it may be halved. None: as `objective` says."""
    shard: Shard = ALL_ROWS
    """Which of a minibatch's rows this process takes."""
    skipped_in_a_row: int = 0

    def __post_init__(self) -> None:
        if self.micro is None:
            self.micro = MicroBatches(self.objective.micro_batch_size, self.objective.halve_on_oom)

    def minibatch(self, scored: ScoredRollout, experience: Experience, rows: Rows) -> UpdateStats:
        """Step both models on the given rows, or neither where a loss or gradient is not finite.

        The losses are normalised by the counts of the whole minibatch, so neither micro_batch_size nor the number of
        processes changes the gradient. Whatever is raised leaves weights, schedules and gradients as before the call.

        Raises:
            FloatingPointError: one update more than `max_skipped` in a row was not finite.
            Interrupted: the run was asked to stop.
            OutOfMemory: a micro-batch does not fit, and may not be halved.
        """
        assert self.micro is not None  # made by __post_init__
        try:
            stats = self.micro.run(
                "a micro-batch of the update",
                lambda size: self._accumulate(scored, experience, rows, size),
                # A try may break off with half of a gradient added: the whole minibatch is done anew.
                clean=self._discard,
            )
            tokens = scored.rollout.response_mask[rows].sum()
            means = _pool(stats, tokens, self.shard)
            means |= {f"optim/{learner.name}_grad_norm": learner.clip() for learner in self.learners}
            taken = self._step_if_finite(means)
        finally:
            self._discard()
        ratios = torch.stack([policy.stats["ratio_max"] for _, policy, _ in stats])
        return UpdateStats(tokens, means, self.shard.largest(ratios.max()), skipped=not taken)

    @property
    def learners(self) -> tuple[Learner | EngineLearner, Learner | EngineLearner]:
        """Actor and critic."""
        return self.actor, self.critic

    def _accumulate(
        self, scored: ScoredRollout, experience: Experience, rows: Rows, size: int
    ) -> list[tuple[Tensor, PolicyLoss, ValueLoss]]:
        """Gradients of this process's part of a minibatch, by micro-batches, with each one's tokens and losses."""
        normalizer = self._normalizer(scored.rollout.response_mask[rows])
        own = self.shard.part(rows)
        mask = scored.rollout.response_mask[own]
        stats = []
        for part in micro_batches(mask.shape[0], size):
            self.stop.check()
            chosen, last = _compose(own, part), part.stop == mask.shape[0]
            policy = self.policy_loss(scored, experience, chosen, normalizer)
            self.actor.backward(policy.loss, last=last)
            value = self.value_loss(scored, experience, chosen, normalizer)
            self.critic.backward(value.loss, last=last)
            stats.append((mask[part].sum(), policy, value))
        return stats

    def _step_if_finite(self, means: dict[str, Tensor]) -> bool:
        """Step both models where every loss and norm is finite on every rank; whether it was so.

        Both norms are taken before either step, so that one gradient that is not finite leaves both models alone.
        """
        decisive = [means[name] for name in DECISIVE]
        finite = bool(torch.isfinite(torch.stack([value.float() for value in decisive])).all())
        if self.stop.ranks.all(finite):
            for learner in self.learners:
                learner.step()
            self.skipped_in_a_row = 0
            return True
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped:
            shown = ", ".join(f"{name} = {float(means[name]):g}" for name in DECISIVE)
            raise FloatingPointError(
                f"{self.skipped_in_a_row} update(s) in a row were skipped for a loss or gradient that is not finite, "
                f"more than optimizer.max_skipped_updates={self.max_skipped} ({shown}): no weight was changed by "
                "them. Lower optimizer.actor_lr or optimizer.critic_lr, or look at objective/kl in metrics.jsonl "
                "for a run that had gone astray"
            )
        return False

    def _discard(self) -> None:
        for learner in self.learners:
            learner.discard()

    def policy_loss(
        self, scored: ScoredRollout, experience: Experience, rows: Rows, normalizer: Tensor
    ) -> PolicyLoss:
        """Clipped policy loss of some rows, minus the entropy bonus, over `normalizer`."""
        objective = self.objective
        return self.actor.run(
            self.view.loss,
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
            self.critic.run(response_values, scored.rollout, rows, bf16=self.view.bf16),
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


def _pool(
    stats: list[tuple[Tensor, PolicyLoss, ValueLoss]], tokens: Tensor, shard: Shard
) -> dict[str, Tensor]:
    """Figures of one minibatch of `tokens`, of all micro-batches and processes: losses add up, the rest is by token."""
    weights = torch.stack([count for count, _, _ in stats]).float() / tokens.float().clamp(min=1.0)

    def mean(values: list[Tensor]) -> Tensor:
        return (torch.stack(values).float() * weights).sum()

    policies, values = [policy for _, policy, _ in stats], [value for _, _, value in stats]
    means = {
        "loss/policy": torch.stack([policy.loss.detach() for policy in policies]).sum(),
        "loss/value": torch.stack([value.loss.detach() for value in values]).sum(),
        "policy/approx_kl": mean([policy.stats["approx_kl"] for policy in policies]),
        "policy/clip_fraction": mean([policy.stats["clip_fraction"] for policy in policies]),
        "policy/ratio_mean": mean([policy.stats["ratio_mean"] for policy in policies]),
        "policy/entropy": mean([policy.stats["entropy"] for policy in policies]),
        "value/clip_fraction": mean([value.stats["clip_fraction"] for value in values]),
    }
    return dict(zip(means, shard.sum(torch.stack(list(means.values()))).unbind(), strict=True))
