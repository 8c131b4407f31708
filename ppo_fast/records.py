"""Named results and the option names that every layer shares."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

KlKind = Literal["k1", "k2", "k3", "abs"]
MaskRule = Literal["carry", "multiply", "none"]
Reduction = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum"]


class PolicyLoss(NamedTuple):
    """A policy loss with what a trainer logs beside it.

    Only `loss` carries a gradient. Masked slots of `logprobs` and `entropy` are 0.
    """

    loss: Tensor  # 0-d, float32 or float64
    logprobs: Tensor  # shape of the mask, nats, detached
    entropy: Tensor | None  # shape of the mask, nats, detached; None where no logits were seen
    stats: dict[str, Tensor]  # 0-d detached tensors on the device of the loss


class ValueLoss(NamedTuple):
    """A value loss with what a trainer logs beside it. Only `loss` carries a gradient."""

    loss: Tensor  # 0-d, float32 or float64
    stats: dict[str, Tensor]  # 0-d detached tensors on the device of the loss


class Experience(NamedTuple):
    """What one batch of responses teaches: [B, T] each, or packed [total]. Masked slots are 0."""

    rewards: Tensor  # KL-shaped reward paid for token t
    advantages: Tensor  # GAE, whitened if it was asked for
    returns: Tensor  # advantage before whitening + value
    kl: Tensor  # KL estimate per token, nats, not scaled by kl_coef


@dataclass(frozen=True)
class Rollout:
    """Prompts and what a policy sampled after them.

    Prompts are padded on the left and responses on the right, so that response token t stands in column t for
    every sequence. B sequences, P prompt columns, T response columns.
    """

    prompt_ids: Tensor  # [B, P] int64
    prompt_mask: Tensor  # [B, P] bool, True = a prompt token
    response_ids: Tensor  # [B, T] int64
    response_mask: Tensor  # [B, T] bool, True = the policy chose this token, its end token included
    ended: Tensor  # [B] bool, False = cut off at the length limit
    prompts: list[str]  # B texts
    responses: list[str]  # B texts

    @property
    def batch_size(self) -> int:
        """B."""
        return self.response_ids.shape[0]

    @property
    def sequences(self) -> tuple[Tensor, Tensor]:
        """Prompt and response side by side: ids [B, P + T] int64 and their attention mask [B, P + T] bool."""
        ids = torch.cat([self.prompt_ids, self.response_ids], dim=1)
        return ids, torch.cat([self.prompt_mask, self.response_mask], dim=1)
