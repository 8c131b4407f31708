"""`PPOTrainer.train` of TRL 1.12 with fused ops: the same steps, random numbers, metrics and callbacks.

The scores of the generation are turned into log-probabilities a few sequences at a time, so that [B, R, V] never exists
for the whole batch; the experience and the losses are those of `ppo.py` in this folder.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_fast.integrations.trl import ppo

# TRL's name of each metric and ours of its loss step.
_LOSS_METRICS = {
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "policy_clip_fraction",
    "loss/policy_avg": "policy",
    "loss/value_avg": "value",
    "val/clipfrac_avg": "value_clip_fraction",
    "policy/entropy_avg": "entropy",
    "val/ratio": "ratio",
}


@dataclass(frozen=True)
class _Batch:
    """What a rollout leaves for the updates. B sequences of P prompt and R response tokens."""

    query_responses: Tensor  # [B, P + R]
    responses: Tensor  # [B, R]
    prompt_length: int  # P
    rollout: ppo.Rollout
    estimates: ppo.Estimates


def _theirs() -> ModuleType:
    """TRL's module, with whatever its user has put into it."""
    from trl.experimental.ppo import ppo_trainer

    return ppo_trainer


def train(self: Any) -> None:
    """Replaces `trl.experimental.ppo.PPOTrainer.train` of TRL 1.12; `self` is such a trainer.

    Its metrics are TRL's to rounding, with what is peculiar to them: averages over slots of minibatches that were
    never written (with `num_mini_batches` above 1), ratio, entropy and KL of the updates over padding too.
    """
    args, accelerator = self.args, self.accelerator
    batches = _forever(self.dataloader)
    accelerator.print("===training policy===")
    start = time.time()
    shape = (args.num_ppo_epochs, args.num_mini_batches, args.gradient_accumulation_steps)
    stats = {name: torch.zeros(shape, device=accelerator.device) for name in _LOSS_METRICS.values()}
    self.model.train()
    _begin(self)
    for update in range(1, args.num_total_batches + 1):
        self.state.episode += args.batch_size
        batch = _experience(self, next(batches)["input_ids"].to(accelerator.device))
        for epoch in range(args.num_ppo_epochs):
            _epoch(self, batch, {name: values[epoch] for name, values in stats.items()})
        _log(self, batch, stats, start)
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        _save_if_due(self)
        if args.num_sample_generations > 0 and (update - 1) % self.sample_generations_freq == 0:
            self.generate_completions(sampling=True)
        del batch
        _theirs().empty_cache()
    self.control = self.callback_handler.on_train_end(args, self.state, self.control)
    _save_if_due(self)


def _forever(dataloader: Any) -> Iterator[Any]:
    while True:
        yield from dataloader


def _begin(trainer: Any) -> None:
    """The state that callbacks see, with intervals given as a share of the run turned into steps."""
    args, state = trainer.args, trainer.state
    state.global_step = state.episode = 0
    state.max_steps = args.num_total_batches
    state.num_train_epochs = args.total_episodes / trainer.train_dataset_len
    for name in ("logging_steps", "eval_steps", "save_steps"):
        interval = getattr(args, name)
        if interval is not None:
            setattr(state, name, math.ceil(state.max_steps * interval) if interval < 1 else interval)
    trainer.control = trainer.callback_handler.on_train_begin(args, state, trainer.control)
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed = trainer.model_wrapped = trainer.model


def _save_if_due(trainer: Any) -> None:
    if trainer.control.should_save:
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


@torch.no_grad()
def _experience(trainer: Any, queries: Tensor) -> _Batch:
    args, pad, eos = (
        trainer.args,
        trainer.processing_class.pad_token_id,
        trainer.processing_class.eos_token_id,
    )
    query_responses, logprobs = _generate(trainer, queries)
    chunks = zip(
        queries.split(args.local_rollout_forward_batch_size),
        query_responses.split(args.local_rollout_forward_batch_size),
        strict=True,
    )
    parts = defaultdict(list)
    for query, query_response in chunks:
        for name, value in _scored(trainer, query, query_response).items():
            parts[name].append(value)
    joined = {name: torch.cat(values) for name, values in parts.items()}
    scores = joined["scores"]
    if args.missing_eos_penalty is not None:
        ended = (joined["truncated"] == eos).any(-1)
        scores[~ended] -= args.missing_eos_penalty
    lengths = _theirs().first_true_indices(joined["truncated"] == pad) - 1
    rollout = ppo.rollout_of(logprobs, joined["ref_logprobs"], joined["values"], scores, lengths)
    estimates = ppo.estimate(
        rollout,
        kl_coef=args.kl_coef,
        kl_estimator=args.kl_estimator,
        gamma=args.gamma,
        lam=args.lam,
        whiten_rewards=args.whiten_rewards,
    )
    prompt_length = queries.shape[1]
    return _Batch(query_responses, query_responses[:, prompt_length:], prompt_length, rollout, estimates)


def _generate(trainer: Any, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts with their responses [B, P + R], and the log-probabilities of the responses [B, R]."""
    from transformers import GenerationConfig

    args, theirs = trainer.args, _theirs()
    pad, prompt_length = trainer.processing_class.pad_token_id, queries.shape[1]
    options = {
        "max_new_tokens": args.response_length,
        "temperature": args.temperature + 1e-7,
        "top_k": 0.0,
        "top_p": 1.0,
        "do_sample": True,
    }
    config = GenerationConfig(**options)
    sequences, logprobs = [], []
    with theirs.unwrap_model_for_generation(
        trainer.model,
        trainer.accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        generation_kwargs=options,
    ) as unwrapped:
        for few in queries.split(args.local_rollout_forward_batch_size):
            query_response, scores = theirs.generate(unwrapped.policy, few, pad, config)
            sequences.append(query_response)
            logprobs.append(ppo.selective_log_softmax(scores, query_response[:, prompt_length:]))
            del scores
    # A part that ended early is padded; what stands at padding is filled in later.
    return _side_by_side(sequences, pad), _side_by_side(logprobs, ppo.INVALID_LOGPROB)


def _side_by_side(parts: list[Tensor], fill: float) -> Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts]
    )


def _scored(trainer: Any, query: Tensor, query_response: Tensor) -> dict[str, Tensor]:
    """The reference's log-probabilities, values, scores and truncated responses of a few sequences."""
    theirs, pad = _theirs(), trainer.processing_class.pad_token_id
    prompt_length = query.shape[1]
    response = query_response[:, prompt_length:]
    ref_logprobs = _reference_logprobs(trainer, query_response, response, prompt_length)
    theirs.empty_cache()
    truncated = response
    if trainer.stop_token_id is not None:
        truncated = theirs.truncate_response(trainer.stop_token_id, pad, response)
    value_model = trainer.accelerator.unwrap_model(trainer.model).value_model
    values, _, _ = theirs.get_reward(value_model, query_response, pad, prompt_length)
    _, scores, _ = theirs.get_reward(
        trainer.reward_model, torch.cat([query, truncated], 1), pad, prompt_length
    )
    return {
        "ref_logprobs": ref_logprobs,
        "values": values[:, prompt_length - 1 : -1].squeeze(-1),
        "scores": scores,
        "truncated": truncated,
    }


def _reference_logprobs(trainer: Any, query_response: Tensor, response: Tensor, prompt_length: int) -> Tensor:
    theirs, pad = _theirs(), trainer.processing_class.pad_token_id
    if trainer.ref_model is None:
        with trainer.null_ref_context():
            output = theirs.forward(trainer.model.policy, query_response, pad)
    else:
        output = theirs.forward(trainer.ref_model, query_response, pad)
    logits = output.logits[:, prompt_length - 1 : -1]
    return ppo.selected(logits, response, trainer.args.temperature + 1e-7)


def _epoch(trainer: Any, batch: _Batch, stats: dict[str, Tensor]) -> None:
    """One pass over the batch in a new order, an optimiser step for each minibatch."""
    args = trainer.args
    order = np.random.permutation(args.local_batch_size)
    for number in range(math.ceil(args.local_batch_size / args.local_mini_batch_size)):
        start = number * args.local_mini_batch_size
        mini = order[start : start + args.local_mini_batch_size]
        size = args.per_device_train_batch_size
        for part in range(math.ceil(args.local_mini_batch_size / size)):
            with trainer.accelerator.accumulate(trainer.model):
                losses = _step(trainer, batch, mini[part * size : (part + 1) * size])
            for name, values in stats.items():
                values[number, part] = getattr(losses, name)
        _theirs().empty_cache()


def _step(trainer: Any, batch: _Batch, chosen: np.ndarray) -> ppo.Losses:
    """Forward, losses, backward; the optimiser steps where the accelerator says so."""
    args, prompt_length = trainer.args, batch.prompt_length
    pad = trainer.processing_class.pad_token_id
    output, values = _theirs().forward(trainer.model, batch.query_responses[chosen], pad)
    losses = ppo.losses(
        output.logits[:, prompt_length - 1 : -1],
        values[:, prompt_length - 1 : -1].squeeze(-1),
        batch.responses[chosen],
        ppo.rows_of(batch.rollout, chosen),
        ppo.rows_of(batch.estimates, chosen),
        temperature=args.temperature + 1e-7,
        cliprange=args.cliprange,
        cliprange_value=args.cliprange_value,
        vf_coef=args.vf_coef,
    )
    trainer.accelerator.backward(losses.loss)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return losses


@torch.no_grad()
def _log(trainer: Any, batch: _Batch, stats: dict[str, Tensor], start: float) -> None:
    rollout, estimates, state = batch.rollout, batch.estimates, trainer.state
    non_score_reward = estimates.non_score_reward.sum(1).mean()

    def gathered(value: Tensor) -> Tensor:
        return trainer.accelerator.gather_for_metrics(value)

    objective = {
        "objective/kl": estimates.kl.sum(1).mean(),
        "objective/entropy": (-rollout.logprobs).masked_fill(rollout.padding, 0).sum(1).mean(),
        "objective/non_score_reward": non_score_reward,
        "objective/rlhf_reward": non_score_reward + rollout.scores.mean(),
        "objective/scores": rollout.scores.mean(),
    }
    metrics: dict[str, float] = {"eps": int(state.episode / (time.time() - start))}
    metrics |= {name: gathered(value).mean().item() for name, value in objective.items()}
    metrics |= {name: gathered(stats[ours]).mean().item() for name, ours in _LOSS_METRICS.items()}
    metrics["val/ratio_var"] = gathered(stats["ratio"]).var().item()
    metrics["val/num_eos_tokens"] = (batch.responses == trainer.processing_class.eos_token_id).sum().item()
    metrics["lr"] = trainer.lr_scheduler.get_last_lr()[0]
    metrics["episode"] = state.episode
    state.epoch = state.episode / trainer.train_dataset_len
    state.global_step += 1
    trainer.log(metrics)
