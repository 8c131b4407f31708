"""Per-token estimate of KL(pi || ref) from the sampled token, element by element, forward and backward."""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.experience import KINDS, kl_of_kind
from ppo_fast.kernels.launch import TOKEN_OPTIONS, on_device_of
from ppo_fast.kernels.surrogate import expm1_less_x, held_log_ratio
from torch import Tensor


@triton.jit
def load_difference(logprobs_ptr, ref_logprobs_ptr, at, size):
    """logprob - ref_logprob in float32."""
    d = tl.load(logprobs_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    return d - tl.load(ref_logprobs_ptr + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
def kl_estimate_kernel(
    logprobs_ptr, ref_logprobs_ptr, clamps_ptr, out_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the estimate of d held in [-a, a], itself held in [-b, b]; a and b are infinite for no clamp."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = held_log_ratio(load_difference(logprobs_ptr, ref_logprobs_ptr, at, size), tl.load(clamps_ptr))
    estimate = held_log_ratio(kl_of_kind(d, KIND), tl.load(clamps_ptr + 1))
    tl.store(out_ptr + at, estimate, mask=at < size)


@triton.jit
def kl_estimate_backward_kernel(
    grad_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    clamps_ptr,
    grad_logprobs_ptr,
    size,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write grad times the slope: 1, d, 1 - e^-d, sign d; a clamp passes it at its bounds and stops it beyond."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    raw = load_difference(logprobs_ptr, ref_logprobs_ptr, at, size)
    input_clamp = tl.load(clamps_ptr)
    output_clamp = tl.load(clamps_ptr + 1)
    d = held_log_ratio(raw, input_clamp)
    stopped = tl.abs(raw) > input_clamp
    stopped = stopped | (tl.abs(kl_of_kind(d, KIND)) > output_clamp)
    if KIND == 0:
        slope = tl.full((BLOCK,), 1.0, tl.float32)
    elif KIND == 1:
        slope = d
    elif KIND == 2:
        slope = d - expm1_less_x(-d)
    else:
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0 * d))
    grad = tl.load(grad_ptr + at, mask=at < size, other=0.0) * tl.where(stopped, 0.0, slope)
    tl.store(grad_logprobs_ptr + at, grad.to(grad_logprobs_ptr.dtype.element_ty), mask=at < size)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, clamps: Tensor, *, kind: str) -> Tensor:
    """Return the estimate, float32, shaped as `logprobs`; both contiguous, `clamps` float32 [2]."""
    _assert_layout(logprobs, ref_logprobs)
    out = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    if out.numel() == 0:
        return out
    with on_device_of(out):
        kl_estimate_kernel[(triton.cdiv(out.numel(), TOKEN_OPTIONS["BLOCK"]),)](
            logprobs_ptr=logprobs,
            ref_logprobs_ptr=ref_logprobs,
            clamps_ptr=clamps,
            out_ptr=out,
            size=out.numel(),
            KIND=KINDS[kind],
            **TOKEN_OPTIONS,
        )
    return out


def kl_estimate_backward(
    grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, clamps: Tensor, *, kind: str
) -> Tensor:
    """Return the gradient of `logprobs`, in its dtype, from `grad`, float32 and contiguous."""
    _assert_layout(logprobs, ref_logprobs)
    assert grad.is_contiguous(), f"grad has strides {grad.stride()}"
    assert grad.dtype == torch.float32, f"grad is {grad.dtype}"
    out = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
    if out.numel() == 0:
        return out
    with on_device_of(out):
        kl_estimate_backward_kernel[(triton.cdiv(out.numel(), TOKEN_OPTIONS["BLOCK"]),)](
            grad_ptr=grad,
            logprobs_ptr=logprobs,
            ref_logprobs_ptr=ref_logprobs,
            clamps_ptr=clamps,
            grad_logprobs_ptr=out,
            size=out.numel(),
            KIND=KINDS[kind],
            **TOKEN_OPTIONS,
        )
    return out


def _assert_layout(logprobs: Tensor, ref_logprobs: Tensor) -> None:
    for name, tensor in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs)):
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"
        assert tensor.shape == logprobs.shape, f"{name} has shape {tuple(tensor.shape)}"
