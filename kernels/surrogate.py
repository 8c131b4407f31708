"""The clipped surrogate of one token, shared by the token kernels and the row kernels, and its coefficients."""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import on_device_of
from torch import Tensor

COEFFICIENTS = 7  # 1 - clip_low, 1 + clip_high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef, normalizer
# exp stays finite up to one below the log of float32's largest number
LIMIT: tl.constexpr = tl.constexpr(87.72283905206835)


@triton.jit
def held_log_ratio(log_ratio, clamp):
    """Clamp to [-clamp, clamp], where NaN stays NaN."""
    return tl.where(log_ratio > clamp, clamp, tl.where(log_ratio < -clamp, -clamp, log_ratio))


@triton.jit
def surrogate(log_ratio, advantage, low, high, dual_clip, clamp):
    """(term, d term / d logprob, whether the clipped branch is the larger) of a counted token.

    ratio = e^log_ratio; term = max(-A ratio, -A clip(ratio, low, high)), and at most -c A where A < 0. A tie of max
    or min splits the gradient in halves, a clip passes it at its bounds. dual_clip and clamp are +inf for none.
    """
    held = held_log_ratio(log_ratio, clamp)
    # Where another branch bounds the term the ratio may overflow harmlessly: held finite, else inf * 0 follows.
    bounded_above = tl.where(dual_clip < float("inf"), float("-inf"), 0.0)
    overflows = (advantage > bounded_above) & (held > LIMIT)
    ratio = tl.exp(tl.where(advantage != 0, tl.where(overflows, LIMIT, held), 0.0))
    plain = -advantage * ratio
    clipped = -advantage * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    is_clipped = clipped > plain
    term = tl.where(is_clipped, clipped, plain)

    inside = (ratio >= low) & (ratio <= high)
    of_plain = tl.where(is_clipped, 0.0, tl.where(plain == clipped, 0.5, 1.0))
    passes = of_plain + tl.where(inside, 1.0 - of_plain, 0.0)
    cap = tl.where(advantage < 0, -dual_clip * advantage, float("inf"))
    passes = tl.where(term > cap, 0.0, tl.where(term == cap, 0.5 * passes, passes))
    passes = tl.where(overflows | (log_ratio > clamp) | (log_ratio < -clamp), 0.0, passes)
    # A zero advantage has no slope, also where the term is 0 * inf; NaN must not hide behind a zero share.
    slope = tl.where((passes == 0.0) & (plain == plain), 0.0, plain * passes)
    return tl.where(term > cap, cap, term), slope, is_clipped


@triton.jit
def expm1_less_x(x):
    """e^x - 1 - x >= 0, the k3 estimate of a KL: by its series near 0, where the difference would cancel."""
    series = 1.0 + x / 9 * (1.0 + x / 10 * (1.0 + x / 11))
    series = 1.0 + x / 6 * (1.0 + x / 7 * (1.0 + x / 8 * series))
    series = 0.5 * x * x * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * series)))
    return tl.where((x < 1.0) & (x > -1.0), series, tl.exp(x) - 1.0 - x)


@triton.jit
def pack_coefficients_kernel(out_ptr, c0, c1, c2, c3, c4, c5, c6):
    """Write seven scalars where kernels can read them."""
    tl.store(out_ptr, c0)
    tl.store(out_ptr + 1, c1)
    tl.store(out_ptr + 2, c2)
    tl.store(out_ptr + 3, c3)
    tl.store(out_ptr + 4, c4)
    tl.store(out_ptr + 5, c5)
    tl.store(out_ptr + 6, c6)


def pack_coefficients(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Seven floats as a float32 tensor on `device`, by a launch: a copy from the host cannot go into a CUDA graph."""
    assert len(values) == COEFFICIENTS, f"{len(values)} coefficients"
    packed = torch.empty(COEFFICIENTS, dtype=torch.float32, device=device)
    with on_device_of(packed):
        pack_coefficients_kernel[(1,)](packed, *map(float, values), num_warps=1)
    return packed
