"""The clipped policy loss from logits by the Triton kernels, with the gradient made beside the loss or after it."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_kl import scalar_tensor
from ppo_fast.ops.fused_policy import TOKEN_STATS, contiguous, pack_coefficients
from ppo_fast.ops.row_grid import RowGrid, row_grid
from ppo_fast.records import PolicyLoss

LOGITS_STATS = (*TOKEN_STATS, "entropy", "kl")
ROW_STATE = 7


def policy_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logits: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    inplace_backward: bool,
    **coefficients: Any,
) -> PolicyLoss:
    """Run `ppo_fast.policy_loss_from_logits`: the gradient in the same launch where it may overwrite the logits.

    Without that permission, under torch.compile, or on rows that share storage, the backward is a launch of its own:
    it reads the logits again and holds nothing vocabulary-sized in between.
    """
    packed, normalizer = pack_coefficients(logits.device, **coefficients)
    arguments = (
        labels,
        old_logprobs.detach(),
        advantages.detach(),
        comparable(mask),
        scalar_tensor(temperature, logits.device),
        None if ref_logits is None else ref_logits.detach(),
        packed,
        normalizer,
        reduction,
    )
    learns = torch.is_grad_enabled() and logits.requires_grad
    if (
        inplace_backward
        and learns
        and not torch.compiler.is_compiling()
        and row_grid(logits).owns_rows(logits)
    ):
        loss, logprobs, entropy, stats = _OneLaunch.apply(logits, arguments)
    else:
        loss, logprobs, entropy, stats, _ = policy_loss_rows(logits, *arguments)
    named = dict(zip(LOGITS_STATS, stats.detach().unbind(), strict=True))
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named)


def _run_rows(
    rows: RowGrid,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    coefficients: Tensor,
    normalizer: Tensor | None,
    reduction: str,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Weights of the tokens, one launch over the logits, then the sums over the tokens."""
    from ppo_fast.kernels import policy_loss as kernels
    from ppo_fast.kernels import sequences, tokens

    labels, old_logprobs, advantages, mask = contiguous(labels, old_logprobs, advantages, mask)
    ref_rows = None if ref_logits is None else row_grid(ref_logits)
    logprobs, entropy, kl, state = kernels.policy_rows(
        rows.logits,
        labels,
        old_logprobs,
        advantages,
        sequences.token_weights(mask, normalizer, reduction),
        temperature,
        None if ref_rows is None else ref_rows.logits,
        coefficients,
        grid=rows.strides,
        ref_grid=(1, 0, 0) if ref_rows is None else ref_rows.strides,
        inplace=inplace,
    )
    loss, stats, _, _, _ = tokens.policy_forward(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        coefficients,
        normalizer,
        None,
        reduction=reduction,
        entropy=entropy,
        kl=kl,
    )
    return loss, logprobs, entropy, stats, state


@torch.library.custom_op("ppo_fast::policy_loss_rows", mutates_args=())
def policy_loss_rows(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    coefficients: Tensor,
    normalizer: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logprobs [B, T], entropy [B, T], stats [6], state [N, 7]); the state is what the backward needs."""
    loss, logprobs, entropy, stats, state = _run_rows(
        row_grid(logits), labels, old_logprobs, advantages, mask, temperature, ref_logits, coefficients,
        normalizer, reduction, inplace=False,
    )  # fmt: skip
    assert state is not None
    return loss, logprobs, entropy, stats, state


@policy_loss_rows.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    coefficients: Tensor,
    normalizer: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs = coefficients.new_empty(labels.shape)
    return (
        coefficients.new_empty(()),
        logprobs,
        torch.empty_like(logprobs),
        coefficients.new_empty(6),
        coefficients.new_empty((labels.numel(), ROW_STATE)),
    )


@torch.library.custom_op("ppo_fast::policy_loss_rows_backward", mutates_args=())
def policy_loss_rows_backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    state: Tensor,
) -> Tensor:
    """Gradient of the logits, in their dtype."""
    from ppo_fast.kernels import policy_loss as kernels

    rows = row_grid(logits)
    ref_rows = None if ref_logits is None else row_grid(ref_logits)
    return kernels.policy_gradient(
        grad_loss.to(torch.float32),
        rows.logits,
        labels.contiguous(),
        temperature,
        None if ref_rows is None else ref_rows.logits,
        state,
        grid=rows.strides,
        ref_grid=(1, 0, 0) if ref_rows is None else ref_rows.strides,
    )


@policy_loss_rows_backward.register_fake
def _(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    state: Tensor,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, _, _, temperature, ref_logits, *_ = inputs
    ctx.save_for_backward(logits, labels, temperature, ref_logits, output[4])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    return policy_loss_rows_backward(grad_loss, *ctx.saved_tensors), *(None,) * 9


policy_loss_rows.register_autograd(_rows_backward, setup_context=_save_rows)


@torch.library.custom_op("ppo_fast::policy_loss_rows_inplace", mutates_args=("logits",))
def policy_loss_rows_inplace(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    coefficients: Tensor,
    normalizer: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs, entropy, stats); the gradient of the loss stands in `logits` afterwards."""
    return _run_rows(
        row_grid(logits), labels, old_logprobs, advantages, mask, temperature, ref_logits, coefficients,
        normalizer, reduction, inplace=True,
    )[:4]  # fmt: skip


@policy_loss_rows_inplace.register_fake
def _(logits: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = labels.new_empty(labels.shape, dtype=torch.float32)
    return logprobs.new_empty(()), logprobs, torch.empty_like(logprobs), logprobs.new_empty(6)


class _OneLaunch(torch.autograd.Function):
    """The gradient is made in the forward, over the logits; the backward hands it on, scaled where need be."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # A detached alias shares storage and version counter: whoever saved the logits before gets autograd's error.
        gradient = logits.detach()
        outputs = policy_loss_rows_inplace(gradient, *arguments)
        ctx.save_for_backward(gradient)
        ctx.handed_on = False
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor | None) -> tuple[Tensor, None]:
        if ctx.handed_on:
            raise RuntimeError(
                "policy_loss_from_logits: a second backward through a call with `inplace_backward=True`, whose one "
                "gradient has been handed on; call it with inplace_backward=False for retain_graph"
            )
        (gradient,) = ctx.saved_tensors
        ctx.handed_on = True
        from ppo_fast.kernels import policy_loss as kernels

        kernels.scale_rows(grad_loss.to(torch.float32), gradient, grid=row_grid(gradient).strides)
        return gradient, None
