"""The gradient of GAE: the same recurrence run the other way, one program a sequence.

With g_t what comes down on A_t, G_t = g_t + gamma lam G_before is the gradient of the reward of slot t, where `before`
is the slot that took A_t into its own advantage; V_t entered as -V_t in its own delta and as gamma V_t in that one's.
"""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.experience import SCAN_OPTIONS, after, own_or_common
from ppo_fast.kernels.launch import on_device_of
from ppo_fast.kernels.sequences import SEQUENCE_SIZES, sequence_bounds
from torch import Tensor


@triton.jit
def counted_gradients(grad_advantages, grad_returns, mask, t, size):
    """(whether slots t count, gradient of their advantage, that of their return), 0 outside the sequence."""
    inside = (t >= 0) & (t < size)
    counted = tl.load(mask + t, mask=inside, other=0) != 0
    of_return = tl.where(counted, tl.load(grad_returns + t, mask=inside, other=0.0), 0.0)
    of_advantage = tl.where(counted, tl.load(grad_advantages + t, mask=inside, other=0.0), 0.0)
    return counted, of_advantage + of_return, of_return


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def gae_backward_kernel(
    grad_advantages_ptr,
    grad_returns_ptr,
    mask_ptr,
    gamma_ptr,
    lam_ptr,
    coefficients_ptr,
    cu_seqlens_ptr,
    grad_rewards_ptr,
    grad_values_ptr,
    grad_bootstrap_ptr,
    tokens,
    CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of one sequence's rewards, values and bootstrap value."""
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, cu_seqlens_ptr)
    size = size.to(tl.int32)  # a slot within its sequence; where the sequence lies is int64
    gamma = own_or_common(gamma_ptr, sequence, coefficients_ptr + 2)
    both = gamma * own_or_common(lam_ptr, sequence, coefficients_ptr + 3)
    grad_advantages = grad_advantages_ptr + first
    grad_returns = grad_returns_ptr + first
    mask = mask_ptr + first

    carried = tl.full((), 0.0, tl.float32)  # G of the slot before the tile, decayed where a hole is a step
    of_last = tl.full((), 0.0, tl.float32)  # G of the last counted slot so far
    for tile in range(0, tl.cdiv(size, BLOCK)):
        start = tile * BLOCK
        t = start + tl.arange(0, BLOCK)
        # Slot t needs what the slots before it hand on: the scan runs over the slots t - 1.
        met, step, _ = counted_gradients(grad_advantages, grad_returns, mask, t - 1, size)
        in_tile = t > start
        step = tl.where(in_tile, step, 0.0)
        takes_part = (in_tile & met) if CARRY else in_tile
        decay = tl.where(takes_part, both, 1.0)
        decay, before = tl.associative_scan((decay, step), 0, after)
        before += decay * carried

        counted, g, of_return = counted_gradients(grad_advantages, grad_returns, mask, t, size)
        grad = g + both * before
        tl.store(grad_rewards_ptr + first + t, tl.where(counted, grad, 0.0), mask=t < size)
        of_value = of_return + (gamma * before - grad)
        tl.store(grad_values_ptr + first + t, tl.where(counted, of_value, 0.0), mask=t < size)

        latest = tl.max(tl.where(counted, t, -1), axis=0)
        of_last = tl.where(latest < 0, of_last, tl.sum(tl.where(t == latest, grad, 0.0), axis=0))
        handed_on = tl.where(counted, grad, before) if CARRY else grad
        carried = tl.sum(tl.where(t == start + BLOCK - 1, handed_on, 0.0), axis=0)
    tl.store(grad_bootstrap_ptr + sequence, gamma * of_last)


def gae_backward(
    grad_advantages: Tensor,
    grad_returns: Tensor,
    mask: Tensor,
    gamma: Tensor | None,
    lam: Tensor | None,
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    *,
    mask_rule: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rewards and values, shaped as the mask, and of the bootstrap values [B], float32.

    The gradients that come in are float32 and, as the mask, contiguous; the rest is as in `experience_forward`.
    """
    for name, tensor in (
        ("grad_advantages", grad_advantages),
        ("grad_returns", grad_returns),
        ("mask", mask),
    ):
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"
        assert tensor.shape == mask.shape, f"{name} has shape {tuple(tensor.shape)}"
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grad_rewards, grad_values = torch.empty_like(grad_advantages), torch.empty_like(grad_advantages)
    grad_bootstrap = torch.empty(sequences, dtype=torch.float32, device=mask.device)
    if mask.numel() == 0:
        return grad_rewards, grad_values, grad_bootstrap.zero_()
    with on_device_of(mask):
        gae_backward_kernel[(sequences,)](
            grad_advantages_ptr=grad_advantages,
            grad_returns_ptr=grad_returns,
            mask_ptr=mask,
            gamma_ptr=gamma,
            lam_ptr=lam,
            coefficients_ptr=coefficients,
            cu_seqlens_ptr=cu_seqlens,
            grad_rewards_ptr=grad_rewards,
            grad_values_ptr=grad_values,
            grad_bootstrap_ptr=grad_bootstrap,
            tokens=mask.shape[-1],
            CARRY=mask_rule == "carry",
            **SCAN_OPTIONS,
        )
    return grad_rewards, grad_values, grad_bootstrap
