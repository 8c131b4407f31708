"""The clipped policy loss from logits, with the gradient made beside the loss or after it: C++, Triton or CUDA.

CUDA has the sweep over the logits; its sums over tokens, and a gradient that is made afterwards, are Triton's.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops import native_rows, native_tokens
from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_estimate import as_bytes, coefficient_dtype, scalar, widest
from ppo_fast.ops.fused_kl import rows_of_one_arithmetic
from ppo_fast.ops.fused_policy import TOKEN_STATS, contiguous, pack_coefficients
from ppo_fast.ops.row_grid import RowGrid, gpu_row_grid, row_grid
from ppo_fast.records import PolicyLoss

LOGITS_STATS = (*TOKEN_STATS, "entropy", "kl")
RowNumbers = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor
]  # label, old logprob, advantage, weight, temperature
STATE = {"cpu": native_rows.POLICY_STATE, "triton": 7, "cuda": 7}  # numbers of a row


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
    impl: str,
    **coefficients: Any,
) -> PolicyLoss:
    """Run `ppo_fast.policy_loss_from_logits`: the gradient in the same launch where it may overwrite the logits.

    Without that permission, under torch.compile, or on rows that share storage, the backward is a launch of its own:
    it reads the logits again and holds nothing vocabulary-sized in between. So it is with the permission in float16,
    whose range a loss scale is there to save: rounded before it is scaled, most of a gradient would be 0.
    """
    numbers, normalizer = pack_coefficients(logits.device, impl=impl, **coefficients)
    arguments = (
        labels,
        old_logprobs.detach(),
        advantages.detach(),
        as_bytes(mask) if impl == "cpu" else comparable(mask),
        scalar(temperature, logits.device, impl),
        None if ref_logits is None else ref_logits.detach(),
        numbers,
        normalizer,
        reduction,
        impl,
    )
    learns = torch.is_grad_enabled() and logits.requires_grad
    if (
        inplace_backward
        and learns
        and not torch.compiler.is_compiling()
        and _lies_ready(logits, ref_logits, impl)
    ):
        function = _TwoLaunches if logits.dtype == torch.float16 else _OneLaunch
        loss, logprobs, entropy, stats = function.apply(logits, arguments)
    else:
        loss, logprobs, entropy, stats, _ = policy_loss_rows(logits, *arguments)
    named = dict(zip(LOGITS_STATS, stats.detach().unbind(), strict=True))
    return PolicyLoss(loss, logprobs.detach(), entropy.detach(), named)


def _lies_ready(logits: Tensor, ref_logits: Tensor | None, impl: str) -> bool:
    """Whether the rows are taken where they lie, each apart from the others, so that a gradient may stand there."""
    rows = row_grid(logits) if impl == "cpu" else gpu_row_grid(logits)
    return rows.owns_rows(logits) and widest(logits, ref_logits) == widest(logits)


def _gpu_ref(logits: Tensor, ref_logits: Tensor | None) -> RowGrid | None:
    """The reference's rows for Triton: beside float32 logits in float32, or a tile would be laid out for 16 bits."""
    if ref_logits is None:
        return None
    return gpu_row_grid(ref_logits.float() if logits.dtype == torch.float32 else ref_logits)


def token_launchers(impl: str) -> tuple[ModuleType, ModuleType]:
    """Where `policy_forward` and `token_weights` of an implementation stand."""
    if impl == "cpu":
        return native_tokens, native_tokens
    from ppo_fast.kernels import sequences, tokens

    return tokens, sequences


def _row_launchers(impl: str) -> ModuleType:
    """Where `policy_rows` of a GPU's implementation stands."""
    if impl == "cuda":
        from ppo_fast.ops import native_cuda

        return native_cuda
    from ppo_fast.kernels import policy_loss

    return policy_loss


def launch_rows(
    logits: Tensor,
    ref_logits: Tensor | None,
    numbers: RowNumbers,
    coefficients: Tensor,
    impl: str,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Logprobs, entropy, KL (None without a reference) and the state of each row, or None `inplace`.

    The weight of a row, in the loss, is -inf where it does not count.
    """
    if impl == "cpu":
        rows, ref_rows = rows_of_one_arithmetic(logits, ref_logits)
        return native_rows.policy_rows(rows, *numbers, ref_rows, coefficients, inplace=inplace)
    rows, ref_rows = gpu_row_grid(logits), _gpu_ref(logits, ref_logits)
    return _row_launchers(impl).policy_rows(
        rows.logits,
        *numbers,
        None if ref_rows is None else ref_rows.logits,
        coefficients,
        grid=rows.strides,
        ref_grid=(1, 0, 0) if ref_rows is None else ref_rows.strides,
        inplace=inplace,
    )


def _run_rows(
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
    impl: str,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Weights of the tokens, one launch over the logits, then the sums over the tokens."""
    labels, old_logprobs, advantages, mask = contiguous(labels, old_logprobs, advantages, mask)
    tokens, sequences = token_launchers(impl)
    weights = sequences.token_weights(mask, normalizer, reduction)
    logprobs, entropy, kl, state = launch_rows(
        logits, ref_logits, (labels, old_logprobs, advantages, weights, temperature), coefficients, impl,
        inplace=inplace,
    )  # fmt: skip
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss [], logprobs [B, T], entropy [B, T], stats [6], state [N, 9 or 7]), which is what the backward needs."""
    loss, logprobs, entropy, stats, state = _run_rows(
        logits, labels, old_logprobs, advantages, mask, temperature, ref_logits, coefficients,
        normalizer, reduction, impl, inplace=False,
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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = widest(logits, ref_logits)
    logprobs = coefficients.new_empty(labels.shape, dtype=dtype)
    return (
        coefficients.new_empty((), dtype=dtype),
        logprobs,
        torch.empty_like(logprobs),
        coefficients.new_empty(6, dtype=dtype),
        coefficients.new_empty((labels.numel(), STATE[impl]), dtype=coefficient_dtype(impl)),
    )


@torch.library.custom_op("ppo_fast::policy_loss_rows_backward", mutates_args=())
def policy_loss_rows_backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    state: Tensor,
    impl: str,
) -> Tensor:
    """Gradient of the logits, in their dtype."""
    return gradient_of_rows(grad_loss, logits, labels, temperature, ref_logits, state, impl, inplace=False)


def gradient_of_rows(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    state: Tensor,
    impl: str,
    inplace: bool,
) -> Tensor:
    """Gradient of the logits from the rows' state, times `grad_loss`, a 0-d tensor."""
    labels = labels.contiguous()
    if impl == "cpu":
        wide, ref = rows_of_one_arithmetic(logits, ref_logits)
        gradient = native_rows.policy_gradient(
            grad_loss, wide, labels, temperature, ref, state, inplace=inplace
        )
        return gradient.to(logits.dtype)
    from ppo_fast.kernels import policy_loss as kernels

    rows, ref_rows = gpu_row_grid(logits), _gpu_ref(logits, ref_logits)
    return kernels.policy_gradient(
        grad_loss.to(torch.float32),
        rows.logits,
        labels,
        temperature,
        None if ref_rows is None else ref_rows.logits,
        state,
        grid=rows.strides,
        ref_grid=(1, 0, 0) if ref_rows is None else ref_rows.strides,
        inplace=inplace,
    )


@policy_loss_rows_backward.register_fake
def _(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    state: Tensor,
    impl: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, _, _, _, temperature, ref_logits, *_, ctx.impl = inputs
    ctx.save_for_backward(logits, labels, temperature, ref_logits, output[4])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx: Any, grad_loss: Tensor | None, *_unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 11
    return policy_loss_rows_backward(grad_loss, *ctx.saved_tensors, ctx.impl), *(None,) * 10


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
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, logprobs, entropy, stats); the gradient of the loss stands in `logits` afterwards."""
    return _run_rows(
        logits, labels, old_logprobs, advantages, mask, temperature, ref_logits, coefficients,
        normalizer, reduction, impl, inplace=True,
    )[:4]  # fmt: skip


@policy_loss_rows_inplace.register_fake
def _(logits: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = labels.new_empty(labels.shape, dtype=widest(logits))
    return logprobs.new_empty(()), logprobs, torch.empty_like(logprobs), logprobs.new_empty(6)


@torch.library.custom_op("ppo_fast::policy_loss_rows_backward_inplace", mutates_args=("logits",))
def policy_loss_rows_backward_inplace(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    state: Tensor,
    impl: str,
) -> None:
    """Gradient of the logits in their place."""
    gradient_of_rows(grad_loss, logits, labels, temperature, ref_logits, state, impl, inplace=True)


def _refuse_another(handed_on: bool) -> None:
    """RuntimeError for a second backward, and for one that is to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "policy_loss_from_logits: the gradient has none of its own, so create_graph=True cannot be had"
        )
    if handed_on:
        raise RuntimeError(
            "policy_loss_from_logits: a second backward through a call with `inplace_backward=True`, whose one "
            "gradient has been handed on; call it with inplace_backward=False for retain_graph"
        )


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
        ctx.impl = arguments[-1]
        ctx.handed_on = False
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor | None) -> tuple[Tensor, None]:
        _refuse_another(ctx.handed_on)
        (gradient,) = ctx.saved_tensors
        ctx.handed_on = True
        if ctx.impl == "cpu":
            native_rows.scale_rows(grad_loss, row_grid(gradient))
            return gradient, None
        from ppo_fast.kernels import policy_loss as kernels

        kernels.scale_rows(grad_loss.to(torch.float32), gradient, grid=row_grid(gradient).strides)
        return gradient, None


class _TwoLaunches(torch.autograd.Function):
    """The gradient is made in the backward, with the loss's own already in it, over the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, arguments: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        labels, _, _, _, temperature, ref_logits, *_, ctx.impl = arguments
        kept = logits.detach()
        *outputs, state = policy_loss_rows(kept, *arguments)
        ctx.save_for_backward(kept, labels, temperature, ref_logits, state)
        ctx.handed_on = False
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor | None) -> tuple[Tensor, None]:
        _refuse_another(ctx.handed_on)
        logits, *others = ctx.saved_tensors
        ctx.handed_on = True
        policy_loss_rows_backward_inplace(grad_loss, logits, *others, ctx.impl)
        return logits, None
