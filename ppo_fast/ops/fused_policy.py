"""The clipped policy loss by the Triton kernels: over tokens, and from logits with or without a gradient in place."""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.fused_kl import scalar_tensor
from ppo_fast.ops.row_grid import RowGrid, row_grid
from ppo_fast.records import PolicyLoss

TOKEN_STATS = ("clip_fraction", "approx_kl", "ratio_mean", "ratio_max")  # in the order of the kernels
LOGITS_STATS = (*TOKEN_STATS, "entropy", "kl")
ROW_STATE = 7


def pack_coefficients(
    device: torch.device,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float | None,
    normalizer: float | Tensor | None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """The numbers of a call as one float32 tensor on the device, and the normalizer, a 0-d tensor, if there is one.

    Read there at run time, so that another value compiles nothing anew, and a CUDA graph may be captured.
    """
    own = normalizer if isinstance(normalizer, float | int) else 1.0
    values = (
        1 - clip_low,
        1 + clip_high,
        math.inf if dual_clip is None else dual_clip,
        math.inf if log_ratio_clamp is None else log_ratio_clamp,
        entropy_coef,
        kl_coef,
        own if normalizer is None or isinstance(normalizer, Tensor) else normalizer,
    )
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float32, device=device)
        packed = torch.stack([one * value for value in values])
    else:
        from ppo_fast.kernels import surrogate

        packed = surrogate.pack_coefficients(values, device)
    if normalizer is None:
        return packed, None
    return packed, scalar_tensor(normalizer, device) if isinstance(normalizer, Tensor) else packed[-1].clone()


def _token_tensors(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


# Over tokens


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reduction: str,
    cu_seqlens: Tensor | None,
    **coefficients: Any,
) -> PolicyLoss:
    """Run `ppo_fast.policy_loss` in two launches, and one for the gradient."""
    packed, normalizer = pack_coefficients(logprobs.device, **coefficients)
    loss, stats, kept, _, _ = clipped_policy_loss(
        logprobs, old_logprobs.detach(), advantages.detach(), mask, packed, normalizer, cu_seqlens, reduction
    )
    named = dict(zip(TOKEN_STATS, stats.detach().unbind(), strict=False))
    return PolicyLoss(loss, kept.detach(), None, named)


@torch.library.custom_op("ppo_fast::clipped_policy_loss", mutates_args=())
def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], stats [6], logprobs, lengths [B], divisor []); the last two are what the backward needs."""
    from ppo_fast.kernels import tokens

    return tokens.policy_forward(
        *_token_tensors(logprobs, old_logprobs, advantages, mask),
        coefficients,
        normalizer,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        reduction=reduction,
    )


@clipped_policy_loss.register_fake
def _(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    normalizer: Tensor | None,
    cu_seqlens: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    number = coefficients.new_empty(())
    return (
        number,
        coefficients.new_empty(6),
        coefficients.new_empty(logprobs.shape),
        coefficients.new_empty(sequences, dtype=torch.int64),
        torch.empty_like(number),
    )


@torch.library.custom_op("ppo_fast::clipped_policy_loss_backward", mutates_args=())
def clipped_policy_loss_backward(
    grad_loss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    reduction: str,
) -> Tensor:
    """Gradient of the log-probabilities, in their dtype."""
    from ppo_fast.kernels import tokens

    return tokens.policy_backward(
        grad_loss.to(torch.float32),
        *_token_tensors(logprobs, old_logprobs, advantages, mask),
        coefficients,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        lengths,
        divisor,
        reduction=reduction,
    )


@clipped_policy_loss_backward.register_fake
def _(
    grad_loss: Tensor,
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    lengths: Tensor,
    divisor: Tensor,
    reduction: str,
) -> Tensor:
    return logprobs.new_empty(logprobs.shape)


def _save_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _normalizer, cu_seqlens, ctx.reduction = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[3:])
    ctx.set_materialize_grads(False)


def _tokens_backward(
    ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    grad = clipped_policy_loss_backward(grad_loss, *ctx.saved_tensors, ctx.reduction)
    return grad, *(None,) * 7


clipped_policy_loss.register_autograd(_tokens_backward, setup_context=_save_tokens)


# From logits


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
        mask,
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

    labels, old_logprobs, advantages, mask = _token_tensors(labels, old_logprobs, advantages, mask)
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
