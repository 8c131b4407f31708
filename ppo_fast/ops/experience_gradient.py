"""The gradient of the experience stage: GAE's recurrence run the other way, and what comes down on its inputs."""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops.backends import comparable
from ppo_fast.ops.fused_estimate import COMPUTE, address, as_bytes, per_sequence, sampled_kl_backward


@torch.library.custom_op("ppo_fast::gae_backward", mutates_args=())
def gae_backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    mask_rule: str,
    impl: str,
    cu_seqlens: Tensor | None,
    gamma: Tensor | None,
    lam: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rewards, values and bootstrap values, in the dtype of the arithmetic."""
    dtype = grad_advantages.dtype
    grad_advantages, grad_returns, mask = (x.contiguous() for x in (grad_advantages, grad_returns, mask))
    gamma, lam = per_sequence(gamma, dtype), per_sequence(lam, dtype)
    if impl != "cpu":
        from ppo_fast.kernels import gae_backward as kernels

        starts = None if cu_seqlens is None else cu_seqlens.contiguous()
        return kernels.gae_backward(
            grad_advantages,
            grad_returns,
            comparable(mask),
            gamma,
            lam,
            coefficients,
            starts,
            mask_rule=mask_rule,
        )
    starts = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    sequences = mask.shape[0] if starts is None else len(starts) - 1
    counted = as_bytes(mask)
    out = (
        torch.empty_like(grad_advantages),
        torch.empty_like(grad_advantages),
        grad_returns.new_zeros(sequences),
    )
    build.extension().gae_backward(
        sequences=sequences,
        tokens=mask.shape[-1],
        cu_seqlens=address(starts),
        compute=COMPUTE[dtype],
        mask=counted.data_ptr(),
        grad_advantages=grad_advantages.data_ptr(),
        grad_returns=grad_returns.data_ptr(),
        grad_rewards=out[0].data_ptr(),
        grad_values=out[1].data_ptr(),
        grad_bootstrap=out[2].data_ptr(),
        gamma=address(gamma),
        lam=address(lam),
        all_gamma=coefficients[2].item(),
        all_lam=coefficients[3].item(),
        carry=mask_rule == "carry",
        threads=torch.get_num_threads(),
        isa=build.selected_isa(),
    )
    return out


@gae_backward.register_fake
def _(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor,
    coefficients: Tensor,
    mask_rule: str,
    impl: str,
    cu_seqlens: Tensor | None,
    gamma: Tensor | None,
    lam: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    token = grad_advantages.new_empty(mask.shape)
    return token, torch.empty_like(token), grad_advantages.new_empty(sequences)


def _sequence_of(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """(sequence of each slot, its place there, number of sequences), shaped as the mask; no wait for the device."""
    if cu_seqlens is None:
        sequences, tokens = mask.shape
        place = torch.arange(tokens, device=mask.device).expand(mask.shape)
        return torch.arange(sequences, device=mask.device).unsqueeze(1).expand(mask.shape), place, sequences
    slot = torch.arange(mask.shape[0], device=mask.device)
    starts = cu_seqlens.long()
    sequence = torch.searchsorted(starts[1:].contiguous(), slot, right=True)
    return sequence, slot - starts[sequence], len(starts) - 1


def _score_gradient(
    grad_rewards: Tensor,
    mask: Tensor,
    scores: Tensor,
    score_index: Tensor | None,
    clip: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """What comes down on the slot that is paid, where the score is inside its clip."""
    sequence, place, sequences = _sequence_of(mask, cu_seqlens)
    counted = mask != 0
    paid = score_index
    if paid is None:
        paid = place.new_full((sequences,), -1).scatter_reduce(
            0, sequence.flatten(), torch.where(counted, place, -1).flatten(), "amax"
        )
    pays = counted & (place == paid[sequence])
    grad = grad_rewards.new_zeros(sequences).index_add(
        0, sequence.flatten(), torch.where(pays, grad_rewards, 0.0).flatten()
    )
    return torch.where(scores.abs() <= clip, grad, 0.0).to(scores.dtype)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the inputs of the operator."""
    mask, coefficients, ctx.kind, ctx.mask_rule, _whitening, ctx.impl, *tensors = inputs
    ctx.save_for_backward(mask, coefficients, *tensors)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_tokens: Tensor | None, _grad_parts: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the operator's inputs, in their order."""
    (
        mask,
        coefficients,
        cu_seqlens,
        logprobs,
        ref_logprobs,
        token_rewards,
        values,
        scores,
        score_index,
        bootstrap,
        gamma,
        lam,
    ) = ctx.saved_tensors
    if grad_tokens is None:
        return (None,) * 16
    counted = mask != 0
    grad_logprobs, grad_token_rewards, grad_values, grad_scores, grad_bootstrap = (None,) * 5
    down = grad_tokens.new_zeros(())  # what comes down on the rewards
    if scores is not None:
        down = torch.where(counted, grad_tokens[0], 0.0)
    if values is not None:
        scanned, of_values, of_bootstrap = gae_backward(
            *grad_tokens[-2:], mask, coefficients, ctx.mask_rule, ctx.impl, cu_seqlens, gamma, lam
        )
        down = down + scanned
        grad_values = of_values.to(values.dtype)
        grad_bootstrap = None if bootstrap is None else of_bootstrap.to(bootstrap.dtype)
    if token_rewards is not None:
        grad_token_rewards = down.to(token_rewards.dtype)
    if scores is not None:
        grad_scores = _score_gradient(down, mask, scores, score_index, coefficients[1], cu_seqlens)
    if logprobs is not None:
        of_kl = -coefficients[0].to(down.dtype) * down
        if values is not None:
            of_kl = of_kl + torch.where(counted, grad_tokens[1], 0.0)
        kept = [torch.where(counted, x, 0.0).to(of_kl.dtype) for x in (logprobs, ref_logprobs)]
        no_clamps = torch.full_like(coefficients, math.inf)
        of_logprobs = sampled_kl_backward(of_kl, *kept, no_clamps, ctx.kind, ctx.impl)
        grad_logprobs = of_logprobs.to(logprobs.dtype)
    return (
        *(None,) * 7,
        grad_logprobs,
        None,
        grad_token_rewards,
        grad_values,
        grad_scores,
        None,
        grad_bootstrap,
        None,
        None,
    )
