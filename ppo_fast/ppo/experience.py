"""From sampled responses to what the update reads: the four models' opinions, then shaped rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

import ppo_fast
from ppo_fast.ops.dispatch import Impl
from ppo_fast.ppo.config import ObjectiveConfig, PPOConfig, RolloutConfig
from ppo_fast.ppo.head import HeadForm, head_form, head_of, response_hidden, settled_chunk_rows
from ppo_fast.ppo.interruption import StopSignal
from ppo_fast.ppo.models import response_logits, token_scores
from ppo_fast.ppo.parallel import Rows
from ppo_fast.ppo.rewards import Reward
from ppo_fast.records import Experience, PolicyLoss, Rollout

if TYPE_CHECKING:
    from ppo_fast.ppo.placement import Placed


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the four models' opinions of it; nothing here asks for a gradient."""

    rollout: Rollout
    logprobs: Tensor
    """[B, T] float32, the sampling policy's own: old_logprobs of the update. 0 where masked."""
    entropy: Tensor
    """[B, T] float32, nats. 0 where masked."""
    ref_logprobs: Tensor
    """[B, T] float32. 0 where masked."""
    values: Tensor
    """[B, T] float32, V before each token. 0 where masked."""
    scores: Tensor
    """[B] float32, unclipped."""
    kept_tokens: Tensor | None
    """[B, T, V] bool under top_p or top_k: what the sampling policy could have chosen. None: everything."""


@dataclass(frozen=True)
class PolicyView:
    """How a policy becomes logprobs: the same for sampling policy, reference and every later policy.

    From hidden states, whose logits are never whole, wherever `head_form` knows the model's head and the sampler left
    every token to choose from; else from the logits of the response.
    """

    temperature: float
    bf16: bool
    impl: Impl

    def __call__(
        self, model: PreTrainedModel, rollout: Rollout, rows: Rows, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropy of the response tokens, each [rows, T], differentiable in the model."""
        labels = rollout.response_ids[rows]
        form = None if kept is not None else head_form(model)
        if form is None:
            return self.score(self.logits(model, rollout, rows), labels, kept)
        hidden, weight, options = self._from_hidden(model, form, rollout, rows)
        scored = ppo_fast.linear_logprobs(hidden, weight, labels, return_entropy=True, **options)
        return cast(tuple[Tensor, Tensor], scored)

    def loss(
        self,
        model: PreTrainedModel,
        rollout: Rollout,
        rows: Rows,
        kept: Tensor | None,
        old_logprobs: Tensor,
        advantages: Tensor,
        **objective: Any,
    ) -> PolicyLoss:
        """The clipped policy loss of the response tokens, with its entropy bonus, differentiable in the model."""
        labels, mask = rollout.response_ids[rows], rollout.response_mask[rows]
        form = None if kept is not None else head_form(model)
        if form is None:
            return ppo_fast.policy_loss_from_logits(
                self._masked(self.logits(model, rollout, rows), kept),
                labels,
                old_logprobs,
                advantages,
                mask,
                temperature=self.temperature,
                impl=self.impl,
                **objective,
            )
        hidden, weight, options = self._from_hidden(model, form, rollout, rows)
        options |= objective
        return ppo_fast.linear_policy_loss(hidden, weight, labels, old_logprobs, advantages, mask, **options)

    def logits(self, model: PreTrainedModel, rollout: Rollout, rows: Rows) -> Tensor:
        """Logits of the response positions, [rows, T, V]."""
        ids, mask = rollout.sequences
        return response_logits(model, ids[rows], mask[rows], rollout.response_ids.shape[1], bf16=self.bf16)

    def score(self, logits: Tensor, labels: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logprobs of the labels and entropy, over the kept tokens alone where a set is given."""
        return ppo_fast.logprobs_and_entropy_from_logits(
            self._masked(logits, kept), labels, temperature=self.temperature, impl=self.impl
        )

    def _masked(self, logits: Tensor, kept: Tensor | None) -> Tensor:
        return logits if kept is None else logits.masked_fill(~kept, -torch.inf)

    def _from_hidden(
        self, model: PreTrainedModel, form: HeadForm, rollout: Rollout, rows: Rows
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Hidden states of the response positions, the head's weight, and the options of the ops that take them."""
        ids, mask = rollout.sequences
        hidden = response_hidden(model, ids[rows], mask[rows], rollout.response_ids.shape[1], bf16=self.bf16)
        weight, bias = head_of(model, bf16=self.bf16)
        chunk_rows = settled_chunk_rows(hidden.shape[:-1].numel(), *weight.shape, weight.dtype, weight.device)
        options = {
            "bias": bias,
            "softcap": form.softcap,
            "temperature": self.temperature / form.scale,
            "chunk_rows": chunk_rows,
            "impl": self.impl,
        }
        return hidden, weight, options


def micro_batches(count: int, size: int) -> list[slice]:
    """Rows 0..count in consecutive slices of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def first_pass(count: int, minibatch: int, micro: int) -> list[slice]:
    """Rows of each forward pass of the first epoch: minibatches in order, each cut into micro-batches of its own."""
    return [
        slice(outer.start + inner.start, outer.start + inner.stop)
        for outer in micro_batches(count, minibatch)
        for inner in micro_batches(outer.stop - outer.start, micro)
    ]


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    *,
    actor: Placed,
    critic: Placed,
    reference: Placed,
    reward: Reward,
    view: PolicyView,
    config: PPOConfig,
    minibatch: int,
    micro_batch_size: int | None = None,
    stop: StopSignal | None = None,
) -> ScoredRollout:
    """Ask the four models about the rows that this process has, `minibatch` of them to a minibatch.

    They work in the micro-batches in which the first epoch will train.
    A row's logits may differ in the last bits with the rows round it, so scoring in the same company makes the first
    ratio of the update 1 exactly, not nearly.

    A sample that the reward drops (its score is NaN) counts no more: its response mask is all False, its score 0.
    `micro_batch_size` None is the config's. Raises Interrupted, between micro-batches, once a stop was asked for.
    """
    stop, size = stop or StopSignal(), micro_batch_size or config.objective.micro_batch_size
    rollout, scores = _without_dropped(rollout, reward(rollout))
    mask = rollout.response_mask
    parts = []
    for rows in first_pass(mask.shape[0], minibatch, size):
        stop.check()
        labels = rollout.response_ids[rows]
        if truncates(config.rollout):
            logits = actor.run(view.logits, rollout, rows)
            kept = kept_tokens(logits, labels, config.rollout)
            logprobs, entropy = view.score(logits, labels, kept)
        else:
            kept = None
            logprobs, entropy = actor.run(view, rollout, rows, kept)
        ref_logprobs, _ = reference.run(view, rollout, rows, kept)
        values = critic.run(response_values, rollout, rows, bf16=view.bf16)
        parts.append((logprobs, entropy, ref_logprobs, values, kept))
    logprobs, entropy, ref_logprobs, values = (
        torch.cat(column) for column in list(zip(*parts, strict=True))[:4]
    )
    kept_parts = [part[4] for part in parts if part[4] is not None]
    return ScoredRollout(
        rollout=rollout,
        logprobs=logprobs.masked_fill(~mask, 0.0),
        entropy=entropy.masked_fill(~mask, 0.0),
        ref_logprobs=ref_logprobs.masked_fill(~mask, 0.0),
        values=values.masked_fill(~mask, 0.0),
        scores=paid_scores(scores, rollout, config.rollout),
        kept_tokens=torch.cat(kept_parts) if kept_parts else None,
    )


def response_values(critic: PreTrainedModel, rollout: Rollout, rows: Rows, *, bf16: bool) -> Tensor:
    """V before each response token, [rows, T] float32: the critic's head one position to the left of the token."""
    ids, mask = rollout.sequences
    length = rollout.response_ids.shape[1]
    return token_scores(critic, ids[rows], mask[rows], bf16=bf16)[:, -length - 1 : -1]


def truncates(config: RolloutConfig) -> bool:
    """Whether the sampler leaves some tokens without a chance."""
    return config.top_p < 1.0 or config.top_k > 0


def kept_tokens(logits: Tensor, labels: Tensor, config: RolloutConfig) -> Tensor | None:
    """Tokens that top_k and top_p leave to choose from, [.., T, V] bool, or None where both are off.

    The sampler truncates its own distribution, so the policy that PPO trains is the renormalised one. The set of the
    sampling policy is kept for the whole update (ratios then compare like with like, none is 0/0), and is laid on the
    reference too (at equal weights the KL is 0). The sampled token is always in it: cached generation and scoring may
    differ in the last bits at the edge of the nucleus.
    """
    if not truncates(config):
        return None
    warped = logits.float().flatten(0, -2) / config.temperature
    none = torch.empty(0, dtype=torch.long)
    if config.top_k:
        warped = TopKLogitsWarper(config.top_k)(none, warped)
    if config.top_p < 1.0:
        warped = TopPLogitsWarper(config.top_p)(none, warped)
    kept = torch.isfinite(warped).view(logits.shape)
    return kept.scatter(-1, labels.unsqueeze(-1), True)


def _without_dropped(rollout: Rollout, scores: Tensor) -> tuple[Rollout, Tensor]:
    """The rollout with nothing counted in rows whose score is NaN, and the scores with 0 there."""
    dropped = torch.isnan(scores)
    if not dropped.any():
        return rollout, scores
    counted = rollout.response_mask & ~dropped.unsqueeze(1)
    return replace(rollout, response_mask=counted), scores.masked_fill(dropped, 0.0)


def paid_scores(scores: Tensor, rollout: Rollout, config: RolloutConfig) -> Tensor:
    """Scores minus the penalty for a response that never ended. [B]."""
    if config.missing_eos_penalty is None:
        return scores
    return scores - config.missing_eos_penalty * (~rollout.ended).float()


def make_experience(
    scored: ScoredRollout, objective: ObjectiveConfig, kl_coef: float, impl: Impl
) -> Experience:
    """KL-shaped rewards, GAE, whitening: one op."""
    return ppo_fast.shaped_gae(
        scored.logprobs,
        scored.ref_logprobs,
        scored.scores,
        scored.values,
        scored.rollout.response_mask,
        kl_coef=kl_coef,
        clip_score=objective.clip_score,
        gamma=objective.gamma,
        lam=objective.lam,
        kind=objective.kl_kind,
        whiten=objective.whiten_advantages,
        impl=impl,
    )
