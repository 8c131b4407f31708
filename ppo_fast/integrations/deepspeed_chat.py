"""DeepSpeed-Chat (`dschat`): the methods of its PPO trainer, `gather_log_probs`, and the reward model's scores.

Its tensors: `attention_mask` [B, S] is 1 at tokens that are not padding; everything per token is [B, S - 1], column j
scoring token j + 1; answers begin at column `start`, one less than the length of the prompts. The mask holds 0 and 1.
"""

import time
from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.originals import (
    WIDE,
    clipped_policy_loss,
    clipped_value_loss,
    log_softmax_of_labels,
    unmasked_gae,
)
from ppo_fast.integrations.patch import Integration, Replacement


def gather_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Replaces `dschat.rlhf.ppo_trainer.gather_log_probs`: log softmax(logits)[label] in the dtype of the logits.

    Args:
        logits: [..., V], floating, on any strides.
        labels: [...], int64.

    Returns:
        [...]; in half precision the float32 result rounded once, which may be one unit of the last place from torch's.

    Raises:
        RuntimeError: a label outside the vocabulary, on the CPU; shapes that do not fit.
    """
    return log_softmax_of_labels(logits, labels)


def _ends(start: int, action_mask: Tensor) -> Tensor:
    """[B]: one slot beyond the answer, which is where its score goes."""
    return start + action_mask[:, start:].sum(1) + 1


def compute_rewards(
    self: Any,
    prompts: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    reward_score: Tensor,
    action_mask: Tensor,
) -> Tensor:
    """Replaces `DeepSpeedPPOTrainer.compute_rewards`: -kl_ctl (logprob - ref) in every slot, and the clipped score.

    The score goes to the slot after the answer, or the last one: that of the end token where it is the padding too.

    Raises:
        IndexError: no column is left after the prompts.
    """
    start, width = prompts.shape[1] - 1, log_probs.shape[1]
    if start >= width:
        raise IndexError(f"compute_rewards: `log_probs` has {width} columns, none after `prompts` at {start}")
    limit = self.clip_reward_value
    rewards = ppo_fast.kl_shaped_rewards(
        log_probs,
        ref_log_probs,
        reward_score.clamp(-limit, limit),
        torch.ones_like(log_probs, dtype=torch.bool),
        kl_coef=self.kl_ctl,
        clip_score=None,
        score_index=(_ends(start, action_mask).clamp(max=width) - 1).long(),
    )
    return rewards.to(torch.result_type(log_probs, ref_log_probs))


def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """Replaces `DeepSpeedPPOTrainer.get_advantages_and_returns`: GAE over the columns from `start` on, no whitening.

    Returns:
        (advantages, returns), [B, width - start], in the dtype of the inputs; the advantages are detached.

    Raises:
        RuntimeError: no column is left after `start`.
    """
    if start >= rewards.shape[-1]:
        raise RuntimeError(
            f"get_advantages_and_returns: `start` is {start}, expected less than {rewards.shape[-1]} columns"
        )
    advantages, returns = unmasked_gae(rewards[:, start:], values[:, start:], self.gamma, self.lam)
    return advantages.detach(), returns


def actor_loss_fn(
    self: Any, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Replaces `DeepSpeedPPOTrainer.actor_loss_fn`: the clipped loss, sum over the mask / sum of the mask.

    NaN for an empty mask, for NaN under a false mask, and for an overflow under an advantage of 0, as there.
    """
    loss = clipped_policy_loss(logprobs, old_logprobs, advantages, mask, self.cliprange).loss
    dtype = torch.promote_types(torch.result_type(logprobs, old_logprobs), advantages.dtype)
    return loss.to(dtype)


def critic_loss_fn(self: Any, values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Replaces `DeepSpeedPPOTrainer.critic_loss_fn`: half the clipped squared error, averaged over the mask.

    In half precision the value is clipped in its own dtype, before `compute_fp32_loss` widens it: that is the
    original's order, and there its steps are taken one by one. NaN as in `actor_loss_fn`.
    """
    if values.dtype in WIDE and old_values.dtype in WIDE and returns.dtype in WIDE:
        loss = clipped_value_loss(values, old_values, returns, mask, self.cliprange_value).loss
        dtype = torch.promote_types(torch.result_type(values, old_values), returns.dtype)
        return loss.to(dtype)
    clipped = values.clamp(old_values - self.cliprange_value, old_values + self.cliprange_value)
    if self.compute_fp32_loss:
        values, clipped = values.float(), clipped.float()
    error = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum() / mask.sum()


def generate_experience(self: Any, prompts: Tensor, mask: Tensor, step: int) -> dict[str, Tensor]:
    """Replaces `DeepSpeedPPOTrainer.generate_experience`.

    `compute_fp32_loss` asks for float32 log-probabilities; the op reads the model's logits as they are and gives
    these, where the original first copies both [B, S, V] into float32.
    """
    self.eval()
    begin = time.time()
    seq = self._generate_sequence(prompts, mask, step)
    self.generate_time = time.time() - begin
    if seq is None:
        assert self.last_generated_experience is not None, f"Invalid generated experience at step={step}"
        prompts, seq = (self.last_generated_experience[name] for name in ("prompts", "seq"))
    else:
        self.last_generated_experience = {"prompts": prompts, "seq": seq}
    self.train()
    attention_mask = seq.not_equal(self.tokenizer.pad_token_id).long()
    with torch.no_grad():
        logits = self.actor_model(seq, attention_mask=attention_mask).logits
        ref_logits = self.ref_model(seq, attention_mask=attention_mask).logits
        scored = self.reward_model.forward_value(seq, attention_mask, prompt_length=self.prompt_length)
        values = self.critic_model.forward_value(seq, attention_mask, return_value_only=True)
    return {
        "prompts": prompts,
        "logprobs": _old_logprobs(self, logits, seq),
        "ref_logprobs": _old_logprobs(self, ref_logits, seq),
        "value": values.detach()[:, :-1],
        "rewards": scored["chosen_end_scores"].detach(),
        "input_ids": seq,
        "attention_mask": attention_mask,
    }


def _old_logprobs(trainer: Any, logits: Tensor, seq: Tensor) -> Tensor:
    if trainer.compute_fp32_loss:
        return ppo_fast.logprobs_from_logits(logits[:, :-1], seq[:, 1:]).float()
    return gather_log_probs(logits[:, :-1], seq[:, 1:])


def train_rlhf(self: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Replaces `DeepSpeedPPOTrainer.train_rlhf`: one update of actor and critic on one experience.

    Log-probabilities are taken of the answers alone, and nothing waits for the device in a loop over sequences. As
    there, `inputs["value"]` is set to 0 past the end of each answer, in place.
    """
    prompts, seq, old_values = inputs["prompts"], inputs["input_ids"], inputs["value"]
    start, action_mask = prompts.shape[-1] - 1, inputs["attention_mask"][:, 1:]
    old_logprobs = inputs["logprobs"]
    with torch.no_grad():
        rewards = self.compute_rewards(
            prompts, old_logprobs, inputs["ref_logprobs"], inputs["rewards"], action_mask
        )
        column = torch.arange(rewards.shape[1], device=rewards.device)
        past = column >= _ends(start, action_mask).unsqueeze(1)
        rewards = rewards.masked_fill(past, 0)
        old_values.masked_fill_(past, 0)
        advantages, returns = self.get_advantages_and_returns(old_values, rewards, start)
    counted = action_mask[:, start:]

    batch = {"input_ids": seq, "attention_mask": inputs["attention_mask"]}
    logits = self.actor_model(**batch, use_cache=False).logits
    logprobs = gather_log_probs(logits[:, start:-1], seq[:, start + 1 :])
    actor_loss = self.actor_loss_fn(logprobs, old_logprobs[:, start:], advantages, counted)
    self.actor_model.backward(actor_loss)
    if not self.args.align_overflow:
        self.actor_model.step()

    values = self.critic_model.forward_value(**batch, return_value_only=True, use_cache=False)[:, :-1]
    critic_loss = self.critic_loss_fn(values[:, start:], old_values[:, start:], returns, counted)
    self.critic_model.backward(critic_loss)
    if self.args.align_overflow:
        _skip_both_on_overflow(self)
        self.actor_model.step()
    self.critic_model.step()
    return actor_loss, critic_loss


def _skip_both_on_overflow(trainer: Any) -> None:
    """Where the gradient of one model overflowed, the other one skips its step too."""
    from dschat.utils.utils import print_rank_0

    overflowed = {
        name: getattr(trainer, f"{name}_model").optimizer.check_overflow(external=True)
        for name in ("actor", "critic")
    }
    if not any(overflowed.values()):
        return
    if not all(overflowed.values()):
        spared = next(name for name, over in overflowed.items() if not over)
        getattr(trainer, f"{spared}_model").optimizer.skip_step = True
    who = " and ".join(name for name, over in overflowed.items() if over)
    message = f"OVERFLOW: {who} overflow, skipping both actor and critic steps"
    print_rank_0(message, torch.distributed.get_rank())


def forward_value(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    position_ids: Tensor | None = None,
    head_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    return_value_only: bool = False,
    prompt_length: int = 0,
    use_cache: bool = False,
) -> Tensor | dict[str, Tensor]:
    """Replaces `RewardModel.forward_value`: a value for each token, and the one at the end of each answer.

    The end is the token before the first padding after the prompt; it is found for all sequences at once, where the
    original asks the device twice for each.
    """
    extra = {} if self.config.model_type == "llama" else {"head_mask": head_mask}
    hidden_states = self.rwtransformer(
        input_ids,
        past_key_values=past_key_values,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **extra,
    )[0]
    values = self.v_head(hidden_states).squeeze(-1)
    if return_value_only:
        return values
    assert prompt_length > 1, "prompt_length must be greater than 1 to help select the end score"
    assert input_ids is not None
    padding = input_ids[:, prompt_length:] == self.PAD_ID
    answered = (padding.cumsum(1) == 0).sum(1)  # tokens before the first padding
    last = (prompt_length + answered).clamp(max=input_ids.shape[1]) - 1
    return {"values": values, "chosen_end_scores": values.gather(1, last.unsqueeze(1)).squeeze(1)}


def _trainer(name: str) -> str:
    return f"dschat.rlhf.ppo_trainer:DeepSpeedPPOTrainer.{name}"


INTEGRATIONS = (
    Integration(
        trainer="deepspeed_chat",
        distribution=None,
        versions=(),
        replacements=(
            Replacement(
                "dschat.rlhf.ppo_trainer:gather_log_probs", gather_log_probs, ops=("logprobs_from_logits",)
            ),
            Replacement(_trainer("compute_rewards"), compute_rewards, ops=("kl_shaped_rewards",)),
            Replacement(_trainer("get_advantages_and_returns"), get_advantages_and_returns, ops=("gae",)),
            Replacement(_trainer("actor_loss_fn"), actor_loss_fn, ops=("policy_loss",)),
            Replacement(_trainer("critic_loss_fn"), critic_loss_fn, ops=("value_loss",)),
            Replacement(_trainer("generate_experience"), generate_experience, ops=("logprobs_from_logits",)),
            Replacement(_trainer("train_rlhf"), train_rlhf, ops=("logprobs_from_logits",)),
            Replacement("dschat.utils.model.reward_model:RewardModel.forward_value", forward_value),
        ),
    ),
)
