"""The KL estimate of sampled tokens as a `torch.library` operator, and how token tensors reach native code."""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops.backends import CPU_DTYPES

KINDS = ("k1", "k2", "k3", "abs")  # in the order of csrc/cpu/experience.h
COMPUTE = {torch.float32: 0, torch.float64: 1}  # codes of the arithmetic
COEFFICIENTS = 7  # as many as a launch packs


def coefficient_dtype(impl: str) -> torch.dtype:
    """The dtype in which `impl` reads the numbers of a call."""
    return torch.float64 if impl == "cpu" else torch.float32


def packed(numbers: tuple[float, ...], device: torch.device, impl: str) -> Tensor:
    """The numbers of a call as a tensor, so that another value compiles nothing anew; filled up with 0."""
    filled = (*numbers, *(0.0,) * (COEFFICIENTS - len(numbers)))
    dtype = coefficient_dtype(impl)
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=dtype, device=device)
        return torch.stack([one * number for number in filled])
    if impl == "cpu":
        return torch.tensor(filled, dtype=dtype)
    from ppo_fast.kernels import surrogate

    return surrogate.pack_coefficients(filled, device)


def scalar(value: float | Tensor, device: torch.device, impl: str) -> Tensor:
    """A number as a 0-d tensor that `impl` reads at run time; a tensor of them as it is, without gradient."""
    if isinstance(value, Tensor):
        return value.detach().to(coefficient_dtype(impl)).contiguous()
    return packed((value,), device, impl)[0]


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic on these: float64 where one of them is, else float32."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def address(tensor: Tensor | None) -> int:
    """Where the data of `tensor` lie, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def as_bytes(mask: Tensor) -> Tensor:
    """`mask` as bool, as native code reads it."""
    return mask if mask.dtype == torch.bool else mask != 0


def contiguous_rows(tensor: Tensor) -> Tensor:
    """`tensor` with contiguous rows: a slice of columns is taken as it is, all else that is strided is copied."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def per_sequence(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One number a sequence, contiguous, in the dtype of the arithmetic."""
    return None if tensor is None else tensor.to(dtype).contiguous()


def token_rows(tensor: Tensor | None) -> tuple[int, int, int]:
    """(address, dtype code, row stride) as the extension takes them."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), CPU_DTYPES.get(tensor.dtype, 0), tensor.stride(0) if tensor.dim() > 1 else 0


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: str,
    input_clamp: float | None,
    output_clamp: float | None,
    impl: str,
) -> Tensor:
    """Run `ppo_fast.kl_estimate` on `impl`, differentiable in `logprobs`."""
    clamps = packed(
        tuple(math.inf if x is None else x for x in (input_clamp, output_clamp)), logprobs.device, impl
    )
    return sampled_kl(logprobs, ref_logprobs.detach(), clamps, kind, impl)


@torch.library.custom_op("ppo_fast::sampled_kl", mutates_args=())
def sampled_kl(logprobs: Tensor, ref_logprobs: Tensor, clamps: Tensor, kind: str, impl: str) -> Tensor:
    """Operator behind `kl_estimate`."""
    logprobs, ref_logprobs = logprobs.contiguous(), ref_logprobs.contiguous()
    if impl == "cpu":
        out = torch.empty(logprobs.shape, dtype=widest(logprobs, ref_logprobs))
        _cpu_kl(logprobs, ref_logprobs, clamps, kind, None, out)
        return out
    from ppo_fast.kernels import kl_estimate as kernels

    return kernels.kl_estimate(logprobs, ref_logprobs, clamps, kind=kind)


@sampled_kl.register_fake
def _(logprobs: Tensor, ref_logprobs: Tensor, clamps: Tensor, kind: str, impl: str) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=widest(logprobs, ref_logprobs))


@torch.library.custom_op("ppo_fast::sampled_kl_backward", mutates_args=())
def sampled_kl_backward(
    grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, clamps: Tensor, kind: str, impl: str
) -> Tensor:
    """Gradient of the log-probabilities, in their dtype."""
    grad, logprobs, ref_logprobs = (x.contiguous() for x in (grad, logprobs, ref_logprobs))
    if impl == "cpu":
        grad = grad.to(widest(logprobs, ref_logprobs))  # as native code takes it, by its address alone
        out = torch.empty(logprobs.shape, dtype=logprobs.dtype)
        _cpu_kl(logprobs, ref_logprobs, clamps, kind, grad, out)
        return out
    from ppo_fast.kernels import kl_estimate as kernels

    return kernels.kl_estimate_backward(grad, logprobs, ref_logprobs, clamps, kind=kind)


@sampled_kl_backward.register_fake
def _(grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, clamps: Tensor, kind: str, impl: str) -> Tensor:
    return logprobs.new_empty(logprobs.shape)


def _cpu_kl(
    logprobs: Tensor, ref_logprobs: Tensor, clamps: Tensor, kind: str, grad: Tensor | None, out: Tensor
) -> None:
    input_clamp, output_clamp, *_ = clamps.tolist()
    build.extension().kl_estimate(
        size=logprobs.numel(),
        compute=COMPUTE[widest(logprobs, ref_logprobs)],
        logprobs=token_rows(logprobs),
        ref_logprobs=token_rows(ref_logprobs),
        grad=address(grad),
        out=out.data_ptr(),
        input_clamp=input_clamp,
        output_clamp=output_clamp,
        kind=KINDS.index(kind),
        threads=torch.get_num_threads(),
        isa=build.selected_isa(),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return sampled_kl_backward(grad, *ctx.saved_tensors, ctx.kind, ctx.impl), None, None, None, None


sampled_kl.register_autograd(_backward, setup_context=_save_for_backward)
