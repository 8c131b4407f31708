"""The loop. `PPOTrainer.step` reads as the numbered steps of the algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import ppo_fast
from ppo_fast.ppo.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from ppo_fast.ppo.config import PPOConfig
from ppo_fast.ppo.evaluate import Evaluation, Evaluator
from ppo_fast.ppo.experience import (
    PolicyView,
    Rows,
    ScoredRollout,
    make_experience,
    micro_batches,
    score_rollout,
)
from ppo_fast.ppo.models import check_reads_vocabulary, check_same_vocabulary, freeze
from ppo_fast.ppo.objectives import AdaptiveKLController
from ppo_fast.ppo.rewards import Reward, RewardFunction, token_models
from ppo_fast.ppo.rollout import Prompt, PromptSampler, check_prompts, generate
from ppo_fast.ppo.update import Learner, Updater, UpdateStats
from ppo_fast.records import Experience, Rollout


class PPOTrainer:
    """PPO for a causal LM with four models: actor and critic learn, reward and reference are frozen.

    Args:
        config: every setting; only `models`, `rewards` and `data` are not read here, since what they name is given.
        actor: causal LM to tune, modified in place.
        critic: one-label sequence classifier whose head is read at every token, modified in place
            (`models.critic_from_classifier`, `models.critic_from_actor`).
        reference: frozen causal LM of the actor's vocabulary.
        reward: a callable from `Rollout` to scores [B] (`rewards.load_reward`, `rewards.FunctionReward`, ...).
        tokenizer: the actor's.
        prompts: training prompts, encoded (`rollout.encode_prompts`).
        eval_prompts: held-out prompts; empty for no evaluation.
        judges: outside judges of held-out responses, by name.

    Raises:
        ValueError: vocabularies of actor and reference differ, a model that reads tokens lacks some or has too short a
            context, or there is no prompt.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        actor: PreTrainedModel,
        critic: PreTrainedModel,
        reference: PreTrainedModel,
        reward: Reward,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        eval_prompts: Sequence[Prompt] = (),
        judges: dict[str, RewardFunction] | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("prompts is empty, expected at least one prompt")
        check_same_vocabulary(actor, reference)
        readers = {"models.actor": actor, "models.reference": reference, "models.critic": critic}
        readers |= {f"rewards.model {index}": model for index, model in enumerate(token_models(reward))}
        for field, model in readers.items():
            check_reads_vocabulary(model, field, actor)
            for where, group in (("data.prompts", prompts), ("data.eval_prompts", eval_prompts)):
                check_prompts(group, model, field, config.rollout.max_new_tokens, where)
        self.config = config
        self.tokenizer = tokenizer
        self.reference = freeze(reference)
        self.reward = reward
        self.sampler = PromptSampler(prompts, config.seed)
        self.view = PolicyView(config.rollout.temperature, config.models.autocast, config.impl)
        optimizer, total = config.optimizer, config.optimizer_steps
        self.actor = Learner(actor.eval(), "actor", optimizer.actor_lr, optimizer, total)
        self.critic = Learner(critic.eval(), "critic", optimizer.critic_lr, optimizer, total)
        self.updater = Updater(self.actor, self.critic, self.view, config.objective)
        objective = config.objective
        self.kl = AdaptiveKLController(objective.kl_coef, objective.kl_target, objective.kl_horizon)
        self.evaluator = Evaluator(
            list(eval_prompts[: config.evaluation.max_prompts]),
            judges or {},
            config.seed,
            generate=self.sample,
            score=self._judge,
        )
        self.steps_done = 0
        self._seconds: dict[str, float] = {}
        torch.manual_seed(config.seed)

    def step(self) -> dict[str, float]:
        """One PPO step; returns its metrics, all finite floats, named as in the glossary."""
        self._seconds = {}
        # 1. Draw prompts and let the actor respond.
        with self._timed("rollout"):
            rollout = self.sample(self.sampler.draw(self.config.rollout.batch_size))
        # 2. The four models: old logprobs, reference logprobs, values, scores.
        with self._timed("scoring"):
            scored = self.score(rollout)
        # 3. Shape the rewards by the KL, run GAE backwards, whiten the advantages.
        with self._timed("experience"):
            experience = self.experience(scored)
        # 4. Several passes over the batch: clipped policy loss, clipped value loss, one optimiser step a minibatch.
        with self._timed("update"):
            updates = [
                self.updater.minibatch(scored, experience, rows)
                for epoch in range(self.config.objective.epochs)
                for rows in self.minibatches(epoch)
            ]
        # 5. Report, then move the KL coefficient towards its target.
        metrics = self._metrics(scored, experience, updates)
        self.kl.update(metrics["objective/kl"], self.config.rollout.batch_size)
        self.steps_done += 1
        return metrics

    def sample(self, prompts: list[Prompt]) -> Rollout:
        """Responses of the present actor."""
        return generate(
            self.actor.model, self.tokenizer, prompts, self.config.rollout, bf16=self.config.models.autocast
        )

    def score(self, rollout: Rollout) -> ScoredRollout:
        """What the four models think of a rollout."""
        return score_rollout(
            rollout,
            actor=self.actor.model,
            critic=self.critic.model,
            reference=self.reference,
            reward=self.reward,
            view=self.view,
            config=self.config,
        )

    def experience(self, scored: ScoredRollout) -> Experience:
        """Shaped rewards, advantages and returns of a scored rollout."""
        return make_experience(scored, self.config.objective, self.kl.coef, self.config.impl)

    def minibatches(self, epoch: int) -> Iterator[Rows]:
        """Rows of each minibatch of a pass.

        The first pass takes the rows as they were scored (prompts come shuffled already), so that the first ratio is
        exactly 1; later passes shuffle.
        """
        slices = micro_batches(self.config.rollout.batch_size, self.config.minibatch_size)
        if epoch == 0:
            yield from slices
            return
        order = torch.randperm(self.config.rollout.batch_size)
        for rows in slices:
            yield order[rows]

    def evaluate(self) -> Evaluation:
        """Sample and judge the held-out prompts."""
        return self.evaluator(self.steps_done)

    def save_checkpoint(self, root: Path) -> Path:
        """Write everything that `restore` needs under `root`."""
        state = {
            "drawn": self.sampler.drawn,
            "kl_coef": self.kl.coef,
            "schedulers": {learner.name: learner.scheduler.state_dict() for learner in self._learners},
        }
        return save_checkpoint(
            root,
            self.steps_done,
            models={learner.name: learner.model for learner in self._learners},
            optimizers={learner.name: learner.optimizer for learner in self._learners},
            state=state,
            keep=self.config.checkpoint.keep,
        )

    def restore(self, root: Path) -> bool:
        """Go back to the newest checkpoint under `root`; False where there is none."""
        folder = newest_checkpoint(root)
        if folder is None:
            return False
        state = load_checkpoint(
            folder,
            models={learner.name: learner.model for learner in self._learners},
            optimizers={learner.name: learner.optimizer for learner in self._learners},
        )
        for learner in self._learners:
            learner.scheduler.load_state_dict(state["schedulers"][learner.name])
        self.sampler.drawn = state["drawn"]
        self.kl.coef = state["kl_coef"]
        self.steps_done = state["step"]
        return True

    @property
    def _learners(self) -> tuple[Learner, Learner]:
        return self.actor, self.critic

    @torch.no_grad()
    def _judge(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Scores and sampled KL of an evaluation, without values or shaping."""
        scored = self.score(rollout)
        return scored.scores, (scored.logprobs - scored.ref_logprobs).sum(1)

    def _metrics(
        self, scored: ScoredRollout, experience: Experience, updates: list[UpdateStats]
    ) -> dict[str, float]:
        mask = scored.rollout.response_mask
        lengths = mask.sum(1).float()
        advantages = experience.returns - scored.values
        metrics: dict[str, Tensor | float] = {
            "objective/scores": scored.scores.mean(),
            "objective/kl": experience.kl.sum(1).mean(),
            "objective/kl_coef": self.kl.coef,
            "objective/rlhf_reward": experience.rewards.sum(1).mean(),
            "objective/non_score_reward": -self.kl.coef * experience.kl.sum(1).mean(),
            "objective/entropy": ppo_fast.masked_mean(scored.entropy, mask),
            **_mean_over_updates(updates),
            "value/mean": ppo_fast.masked_mean(scored.values, mask),
            "value/explained_variance": _explained_variance(scored.values, experience.returns, mask),
            "returns/mean": ppo_fast.masked_mean(experience.returns, mask),
            "advantages/mean": ppo_fast.masked_mean(advantages, mask),
            "advantages/std": ppo_fast.masked_var(advantages, mask).sqrt(),
            "response/length_mean": lengths.mean(),
            "response/length_max": lengths.max(),
            "response/eos_fraction": scored.rollout.ended.float().mean(),
            "optim/actor_lr": self.actor.learning_rate,
            "optim/critic_lr": self.critic.learning_rate,
        }
        seconds = sum(self._seconds.values())
        times: dict[str, float] = {f"time/{name}": value for name, value in self._seconds.items()}
        rate = {"throughput/tokens_per_second": float(lengths.sum()) / seconds}
        numbers = {name: float(value) for name, value in metrics.items()}
        return {**numbers, **times, "time/step": seconds, **rate}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.actor.model.device.type == "cuda":
            torch.cuda.synchronize()
        self._seconds[name] = time.perf_counter() - start


def _mean_over_updates(updates: list[UpdateStats]) -> dict[str, Any]:
    """Means over all minibatches of all passes, weighted by counted tokens; the largest ratio of any."""
    tokens = torch.stack([update.tokens for update in updates]).float()
    weights = tokens / tokens.sum()
    means = {
        name: (torch.stack([update.means[name] for update in updates]) * weights).sum()
        for name in updates[0].means
    }
    return {**means, "policy/ratio_max": torch.stack([update.ratio_max for update in updates]).max()}


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over counted tokens; 0 where the returns do not vary."""
    total = ppo_fast.masked_var(returns, mask)
    rest = ppo_fast.masked_var(returns - values, mask)
    return torch.where(total > 0, 1.0 - rest / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
