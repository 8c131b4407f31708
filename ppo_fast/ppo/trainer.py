"""The loop. `PPOTrainer.step` reads as the numbered steps of the algorithm."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import ppo_fast
from ppo_fast.ppo.checkpoint import Checkpoints, Position
from ppo_fast.ppo.config import PPOConfig
from ppo_fast.ppo.engine_config import uses_deepspeed
from ppo_fast.ppo.evaluate import Evaluation, Evaluator
from ppo_fast.ppo.experience import (
    PolicyView,
    Rows,
    ScoredRollout,
    make_experience,
    micro_batches,
    score_rollout,
)
from ppo_fast.ppo.head import head_form
from ppo_fast.ppo.interruption import Interrupted, StopSignal
from ppo_fast.ppo.models import check_reads_vocabulary, check_same_vocabulary, freeze
from ppo_fast.ppo.objectives import AdaptiveKLController
from ppo_fast.ppo.parallel import Shard, padded_to_multiple
from ppo_fast.ppo.placement import place_frozen, place_learner, place_reward
from ppo_fast.ppo.progress import StepInProgress
from ppo_fast.ppo.rewards import Reward, RewardError, RewardFunction, token_models
from ppo_fast.ppo.rollout import (
    Prompt,
    PromptSampler,
    check_prompts,
    decode,
    first_rows,
    generate,
    pad_token_id,
    widen_responses,
)
from ppo_fast.ppo.sampling import Stream, stream_seeds
from ppo_fast.ppo.shortage import MicroBatches, explaining_shortage
from ppo_fast.ppo.state import Part, Saved, State, load_random_state, random_state
from ppo_fast.ppo.update import Updater, UpdateStats
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
        stop: says when to stop, between tokens and micro-batches. None: one that nobody hears.

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
        stop: StopSignal | None = None,
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
        self.stop = stop or StopSignal()
        self.shard = Shard.of(self.stop.ranks)
        self.shard.check(config.rollout.batch_size, config.objective.minibatches)
        self.config = config
        self.tokenizer = tokenizer
        self.reference = freeze(reference)
        self.sampler = PromptSampler(prompts, config.seed)
        self.view = PolicyView(config.rollout.temperature, config.models.autocast, config.impl)
        for model in (actor, reference):
            head_form(model)  # found out once, while the parameters are whole
        self.actor = place_learner(actor, "actor", config)
        self.critic = place_learner(critic, "critic", config)
        self._reference = place_frozen(self.reference, config)
        self.reward = place_reward(reward, config)
        # One rank alone cannot take other micro-batches than the rest, nor can an engine within a minibatch.
        alone = self.shard.count == 1 and not uses_deepspeed(config)
        self.micro = MicroBatches(
            config.objective.micro_batch_size, may_halve=config.objective.halve_on_oom and alone
        )
        self.updater = Updater(
            self.actor,
            self.critic,
            self.view,
            config.objective,
            max_skipped=config.optimizer.max_skipped_updates,
            stop=self.stop,
            micro=self.micro,
            shard=self.shard,
        )
        objective = config.objective
        self.kl = AdaptiveKLController(objective.kl_coef, objective.kl_target, objective.kl_horizon)
        self.evaluator = Evaluator(
            list(eval_prompts[: config.evaluation.max_prompts]),
            # The first process alone keeps what they say, and their time may cost money.
            (judges or {}) if self.stop.ranks.first else {},
            respond=self._judge,
        )
        self.steps_done = 0
        self.evaluated = -1
        """The step after which the last evaluation was, -1 for none."""
        self.progress: StepInProgress | None = None
        self._checkpoints: Checkpoints | None = None
        torch.manual_seed(config.seed)

    def step(self) -> dict[str, float]:
        """One PPO step, or the rest of one begun; returns its metrics, named as in the glossary.

        All are finite floats, but for figures of the updates (NaN) where every update of the step was skipped.

        Raises Interrupted where the run was asked to stop. `save_checkpoint` then stores the state before this step
        or, once the weights have moved, before the present update, and the next `step` goes on from there.
        """
        begun = (self.sampler.drawn, random_state())
        try:
            self.progress = progress = self.progress or self._begin()
            # 4. Several passes over the batch: clipped policy loss, clipped value loss, one optimiser step a minibatch.
            self._update(progress)
        except Interrupted:
            if self.progress is None or not self.progress.updates:
                # No weight has moved: back to where the step began, as if it had not.
                self.progress, self.sampler.drawn = None, begun[0]
                load_random_state(begun[1])
            raise
        # 5. Report, then move the KL coefficient towards its target.
        metrics = self._metrics(progress)
        episodes = self.config.rollout.batch_size - int(metrics["objective/dropped"])
        self.kl.update(metrics["objective/kl"], episodes)
        self.steps_done += 1
        self.progress = None
        return metrics

    def _begin(self) -> StepInProgress:
        """The half of a step that moves no weight, and the rows of every update to come."""
        seconds: dict[str, float] = {}
        minibatches = self.config.objective.minibatches
        # 1. Draw prompts and let the actor respond to this process's share of them.
        with self._timed("rollout", seconds):
            first, prompts = self.sampler.drawn, self.sampler.draw(self.config.rollout.batch_size)
            rollout = self._respond(prompts, minibatches, "training", first)
        # 2. The four models: old logprobs, reference logprobs, values, scores; then every process has all of them.
        with self._timed("scoring", seconds):
            scored = self._gather(self.score(rollout), prompts, minibatches)
        # 3. Shape the rewards by the KL, run GAE backwards, whiten the advantages.
        with self._timed("experience", seconds):
            experience = self.experience(scored)
        epochs = range(self.config.objective.epochs)
        plan = [rows for epoch in epochs for rows in self.minibatches(epoch)]
        return StepInProgress(scored, experience, plan, seconds=seconds)

    def _update(self, progress: StepInProgress) -> None:
        """The updates that the step has yet to make."""
        with self._timed("update", progress.seconds):
            for rows in progress.remaining:
                progress.updates.append(self.updater.minibatch(progress.scored, progress.experience, rows))

    def sample(
        self, prompts: list[Prompt], seeds: Sequence[int] | None = None, prompt_width: int = 0
    ) -> Rollout:
        """Responses of the present actor; `seeds` and `prompt_width` as in `rollout.generate`.

        Raises FloatingPointError where its logits are no numbers to sample from.
        """
        size = self.config.rollout.generation_batch_size or len(prompts)
        settings = f"rollout.generation_batch_size (now {size}) or rollout.max_new_tokens"
        with explaining_shortage("while sampling", settings), self.actor.gathered() as actor:
            return generate(
                actor,
                self.tokenizer,
                prompts,
                self.config.rollout,
                bf16=self.config.models.autocast,
                seeds=seeds,
                prompt_width=prompt_width,
                stop=self.stop,
            )

    def score(self, rollout: Rollout) -> ScoredRollout:
        """What the four models think of a rollout."""
        return self.micro.run(
            "a micro-batch of scoring",
            lambda size: score_rollout(
                rollout,
                actor=self.actor,
                critic=self.critic,
                reference=self._reference,
                reward=self.reward,
                view=self.view,
                config=self.config,
                minibatch=self.config.minibatch_size // self.shard.count,
                micro_batch_size=size,
                stop=self.stop,
            ),
        )

    def _respond(self, prompts: list[Prompt], minibatches: int, stream: Stream, first: int) -> Rollout:
        """This process's share of the responses to a batch of prompts, padded like all of them together."""
        seeds = stream_seeds(self.config.seed, stream, first, len(prompts))
        rows = self.shard.rows(len(prompts), minibatches)
        width = max(len(prompt.ids) for prompt in prompts)
        rollout = self.sample([prompts[row] for row in rows], [seeds[row] for row in rows], width)
        longest = torch.tensor(rollout.response_ids.shape[1], device=rollout.response_ids.device)
        return widen_responses(rollout, int(self.shard.largest(longest)), pad_token_id(self.tokenizer))

    def _gather(self, scored: ScoredRollout, prompts: list[Prompt], minibatches: int) -> ScoredRollout:
        """The whole batch, from what each process has scored of it; RewardError where every sample was dropped."""
        counted = self.shard.sum(scored.rollout.response_mask.sum())
        if not counted:
            raise RewardError(
                f"every one of the {len(prompts)} samples was dropped for its reward: none is left to learn from"
            )
        if self.shard.count == 1:
            return scored
        rollout = self.shard.gather_fields(scored.rollout, minibatches)
        rollout = dataclasses.replace(
            rollout,
            prompts=[prompt.text for prompt in prompts],
            responses=decode(self.tokenizer, rollout.response_ids, rollout.response_mask),
        )
        return dataclasses.replace(self.shard.gather_fields(scored, minibatches), rollout=rollout)

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
        passes = self.steps_done * self.config.objective.epochs + epoch
        generator = torch.Generator().manual_seed(stream_seeds(self.config.seed, "order", passes, 1)[0])
        order = torch.randperm(self.config.rollout.batch_size, generator=generator)
        for rows in slices:
            yield order[rows]

    def evaluate(self) -> Evaluation:
        """Sample and judge the held-out prompts."""
        evaluation = self.evaluator(self.steps_done)
        self.evaluated = self.steps_done
        return evaluation

    def save_checkpoint(self, root: Path) -> Path:
        """Write everything that `restore` needs under `root`; every rank calls it. Returns the checkpoint's folder."""
        update = len(self.progress.updates) if self.progress else 0
        return self._at(root).save(Position(self.steps_done, update), self._parts)

    def restore(self, root: Path, resume: str = "auto") -> bool:
        """Go back to the checkpoint under `root` that `resume` asks for; False where there is none.

        Warns where the checkpoint was written by other versions or on other threads: the run then goes on, but its
        last bits may be others. Raises CheckpointError for a checkpoint that is torn or of other settings.
        """
        folder = self._at(root).find(resume)
        if folder is None:
            return False
        for note in self._at(root).load(folder, self._parts):
            warnings.warn(note, stacklevel=2)
        return True

    def shared_state(self) -> dict[str, State]:
        """Nothing: what the loop remembers is each rank's own."""
        return {}

    def own_state(self) -> dict[str, State]:
        """Where this rank stands: counters, generators, and the step it is in."""
        numbers = {
            "steps_done": self.steps_done,
            "drawn": self.sampler.drawn,
            "kl_coef": self.kl.coef,
            "evaluated": self.evaluated,
            "skipped_in_a_row": self.updater.skipped_in_a_row,
            "micro_batch_size": self.micro.size,
            "within_a_step": self.progress is not None,
        }
        states = {"trainer": State(numbers=numbers), "rng": random_state()}
        return states | ({"progress": self.progress.state()} if self.progress else {})

    def load_state(self, saved: Saved) -> None:
        """Restore `own_state`."""
        numbers = saved.own("trainer").numbers
        self.steps_done, self.sampler.drawn = numbers["steps_done"], numbers["drawn"]
        self.kl.coef, self.evaluated = numbers["kl_coef"], numbers["evaluated"]
        self.updater.skipped_in_a_row = numbers["skipped_in_a_row"]
        self.micro.size = numbers["micro_batch_size"]
        self.progress = None
        if numbers["within_a_step"]:
            self.progress = StepInProgress.of(saved.own("progress"), self.actor.model.device)
        load_random_state(saved.own("rng"))

    @property
    def _parts(self) -> list[Part]:
        return [self.actor, self.critic, self]

    def _at(self, root: Path) -> Checkpoints:
        if self._checkpoints is None or self._checkpoints.root != root:
            self._checkpoints = Checkpoints(
                root, config=self.config.to_dict(), keep=self.config.checkpoint.keep, ranks=self.stop.ranks
            )
        return self._checkpoints

    @torch.no_grad()
    def _judge(self, prompts: list[Prompt]) -> tuple[Rollout, Tensor, Tensor]:
        """Responses, scores (NaN: dropped) and sampled KL of an evaluation, without values or shaping."""
        padded, count = padded_to_multiple(prompts, self.shard.count), len(prompts)
        rollout = self._respond(padded, 1, "evaluation", 0)
        scored = self._gather(self.score(rollout), padded, 1)
        dropped = ~scored.rollout.response_mask.any(1)
        scores = scored.scores.masked_fill(dropped, math.nan)
        kl = (scored.logprobs - scored.ref_logprobs).sum(1)
        return first_rows(scored.rollout, count), scores[:count], kl[:count]

    def _metrics(self, progress: StepInProgress) -> dict[str, float]:
        scored, experience = progress.scored, progress.experience
        mask = scored.rollout.response_mask
        kept = mask.any(1)
        lengths = mask.sum(1)[kept].float()
        kl = experience.kl.sum(1)[kept].mean()
        advantages = experience.returns - scored.values
        metrics: dict[str, Tensor | float] = {
            "objective/scores": scored.scores[kept].mean(),
            "objective/dropped": (~kept).sum(),
            "objective/kl": kl,
            "objective/kl_coef": self.kl.coef,
            "objective/rlhf_reward": experience.rewards.sum(1)[kept].mean(),
            "objective/non_score_reward": -self.kl.coef * kl,
            "objective/entropy": ppo_fast.masked_mean(scored.entropy, mask),
            **_mean_over_updates(progress.updates),
            "optim/skipped_updates": sum(update.skipped for update in progress.updates),
            "value/mean": ppo_fast.masked_mean(scored.values, mask),
            "value/explained_variance": _explained_variance(scored.values, experience.returns, mask),
            "returns/mean": ppo_fast.masked_mean(experience.returns, mask),
            "advantages/mean": ppo_fast.masked_mean(advantages, mask),
            "advantages/std": ppo_fast.masked_var(advantages, mask).sqrt(),
            "response/length_mean": lengths.mean(),
            "response/length_max": lengths.max(),
            "response/eos_fraction": scored.rollout.ended[kept].float().mean(),
            "optim/micro_batch_size": self.micro.size,
            "optim/actor_lr": self.actor.learning_rate,
            "optim/critic_lr": self.critic.learning_rate,
        }
        seconds = sum(progress.seconds.values())
        times: dict[str, float] = {f"time/{name}": value for name, value in progress.seconds.items()}
        rate = {"throughput/tokens_per_second": float(lengths.sum()) / seconds}
        numbers = {name: float(value) for name, value in metrics.items()}
        return {**numbers, **times, "time/step": seconds, **rate}

    @contextmanager
    def _timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Add the time of the block to `seconds`, also where the block is left by an interruption."""
        start = time.perf_counter()
        try:
            yield
            if self.actor.model.device.type == "cuda":
                torch.cuda.synchronize()
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _mean_over_updates(updates: list[UpdateStats]) -> dict[str, Any]:
    """Means over the minibatches of all passes that were stepped, weighted by counted tokens; the largest ratio of any.

    All NaN where every one was skipped.
    """
    taken = [update for update in updates if not update.skipped]
    if not taken:
        return dict.fromkeys([*updates[0].means, "policy/ratio_max"], math.nan)
    tokens = torch.stack([update.tokens for update in taken]).float()
    weights = tokens / tokens.sum()
    means = {
        name: (torch.stack([update.means[name] for update in taken]) * weights).sum()
        for name in taken[0].means
    }
    return {**means, "policy/ratio_max": torch.stack([update.ratio_max for update in taken]).max()}


def _explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over counted tokens; 0 where the returns do not vary."""
    total = ppo_fast.masked_var(returns, mask)
    rest = ppo_fast.masked_var(returns - values, mask)
    return torch.where(total > 0, 1.0 - rest / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
