"""The trainer against a plain transcription of the DeepSpeed-Chat loop, on the same rollouts.

The transcription below is eager and token by token: shaping, GAE and the two losses in their textbook form, over the
whole sequence with the shift by one done by hand, models called directly. It shares no code with the package.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast.ppo.config import OptimizerConfig

GAMMA, LAM, KL_COEF, CLIP, VALUE_CLIP, SCORE_CLIP = 1.0, 0.95, 0.1, 0.2, 0.2, 5.0
RATE = 1e-4  # small enough that the third update is not clipped away altogether


def label_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def shaped_rewards(logprobs: Tensor, ref: Tensor, scores: Tensor, mask: Tensor, start: int) -> Tensor:
    rewards = -KL_COEF * (logprobs - ref)
    for row in range(rewards.shape[0]):
        end = start + int(mask[row, start:].sum())
        rewards[row, end - 1] += scores[row].clamp(-SCORE_CLIP, SCORE_CLIP)
        rewards[row, end:] = 0
    return rewards


def advantages_and_returns(values: Tensor, rewards: Tensor, start: int) -> tuple[Tensor, Tensor]:
    columns, running = [], torch.zeros(values.shape[0], dtype=values.dtype)
    for t in range(rewards.shape[1] - 1, start - 1, -1):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        running = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        columns.insert(0, running)
    advantages = torch.stack(columns, 1)
    return advantages, advantages + values[:, start:]


def actor_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = torch.exp((logprobs - old) * mask)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    return (torch.max(plain, clipped) * mask).sum() / mask.sum()


def critic_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    clipped = torch.clamp(values, old - VALUE_CLIP, old + VALUE_CLIP)
    worst = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (worst * mask).sum() / mask.sum()


@dataclass
class PlainLoop:
    """Old quantities are taken once, then any number of updates on the same rollout."""

    actor: Any
    critic: Any
    reference: Any
    rollout: Any
    scores: Tensor

    def __post_init__(self) -> None:
        prompt, response = self.rollout.prompt_mask.long(), self.rollout.response_mask.long()
        self.ids = torch.cat([self.rollout.prompt_ids, self.rollout.response_ids], 1)
        self.attention = torch.cat([prompt, response], 1)
        self.start = prompt.shape[1] - 1
        self.mask = self.attention[:, 1:]
        with torch.no_grad():
            self.old, ref = self.logprobs(self.actor), self.logprobs(self.reference)
            self.old_values = self.values()
            for row in range(self.ids.shape[0]):
                self.old_values[row, self.start + int(response[row].sum()) :] = 0
            rewards = shaped_rewards(self.old, ref, self.scores.double(), self.mask, self.start)
            self.advantages, self.returns = advantages_and_returns(self.old_values, rewards, self.start)

    def forward(self, model: Any, **options: Any) -> Any:
        positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        return model(self.ids, attention_mask=self.attention, position_ids=positions, **options)

    def logprobs(self, model: Any) -> Tensor:
        return label_logprobs(self.forward(model).logits[:, :-1], self.ids[:, 1:])

    def values(self) -> Tensor:
        hidden = self.forward(self.critic.model).last_hidden_state
        return self.critic.score(hidden).squeeze(-1)[:, :-1].double()

    def losses(self) -> tuple[Tensor, Tensor]:
        start, mask = self.start, self.mask[:, self.start :]
        policy = actor_loss(self.logprobs(self.actor)[:, start:], self.old[:, start:], self.advantages, mask)
        value = critic_loss(self.values()[:, start:], self.old_values[:, start:], self.returns, mask)
        return policy, value


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    assert largest > 1e-4  # a zero gradient would agree with anything
    for name, gradient in plain.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("seed", [0, 3])
def test_losses_and_gradients_agree_with_the_plain_loop_for_three_updates(world: Any, seed: int) -> None:
    objective = {
        "epochs": 3,
        "minibatches": 1,
        "micro_batch_size": 3,  # uneven: 3 + 3 + 2 rows must add up to the whole batch's gradient
        "kl_coef": KL_COEF,
        "clip_score": SCORE_CLIP,
        "whiten_advantages": False,
        "value_clip": VALUE_CLIP,
    }
    actor, critic = world.actor(seed), world.classifier(seed + 1)
    # A reference that has moved away, so that the KL term is not 0.
    trainer = world.trainer(
        world.config(objective=objective, optimizer=OptimizerConfig(RATE, RATE, schedule="constant")),
        actor=actor,
        critic=critic,
        reference=world.actor(seed + 7).requires_grad_(False),
        reward=lambda rollout: (
            9.0 * torch.linspace(-1, 1, rollout.batch_size)
        ),  # beyond the clip of 5 at both ends
    )
    rollout = trainer.sample(world.prompts)
    assert len(set(rollout.response_mask.sum(1).tolist())) > 1  # ragged responses, or the mask is not tested
    plain = PlainLoop(
        copy.deepcopy(actor).double(),
        copy.deepcopy(critic).double(),
        copy.deepcopy(trainer.reference).double(),
        rollout,
        9.0 * torch.linspace(-1, 1, rollout.batch_size),
    )
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
        for model in (plain.actor, plain.critic)
    ]
    scored = trainer.score(rollout)
    experience = trainer.experience(scored)
    torch.testing.assert_close(
        experience.advantages.double(), plain.advantages * rollout.response_mask, rtol=1e-4, atol=1e-5
    )

    seen: dict[str, dict[str, Tensor]] = {}
    for learner in (trainer.actor, trainer.critic):
        keep_gradients(learner, seen)
    for _ in range(3):
        stats = trainer.updater.minibatch(scored, experience, slice(0, rollout.batch_size))
        policy, value = plain.losses()
        torch.testing.assert_close(stats.means["loss/policy"].double(), policy, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.means["loss/value"].double(), value, rtol=1e-4, atol=1e-5)
        for optimizer, loss in zip(optimizers, (policy, value), strict=True):
            optimizer.zero_grad()
            loss.backward()
        for name, model in (("actor", plain.actor), ("critic", plain.critic)):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            expected = {key: gradient.float() for key, gradient in gradients(model).items()}
            assert_same_gradients(seen[name], expected)
        for optimizer in optimizers:
            optimizer.step()


def keep_gradients(learner: Any, seen: dict[str, dict[str, Tensor]]) -> None:
    """Note the clipped gradients that an optimiser is about to use."""

    def note(*_: Any) -> None:
        seen[learner.name] = gradients(learner.model)

    learner.optimizer.register_step_pre_hook(note)
