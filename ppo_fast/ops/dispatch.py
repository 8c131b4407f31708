"""The only place that asks which implementation runs an op."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "cpu", "triton", "cuda"]

Probe = Callable[[Tensor], str | None]  # the reason why this implementation cannot run a call, or None

# Fastest first. What auto may take: the interpreter's Triton on CPU tensors only runs when asked for by name.
# CUDA C++ is not among them until a measurement on a GPU puts it before Triton.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton",)}


def _backend(impl: str) -> Probe:
    """Ask the backends, imported only here: `import ppo_fast` must not import what it builds on."""

    def probe(tensor: Tensor) -> str | None:
        from ppo_fast.ops import backends

        return backends.unavailable(impl, tensor)

    return probe


_NATIVE_AND_TRITON = {"cpu": _backend("cpu"), "triton": _backend("triton")}
_EVERY_BACKEND = {**_NATIVE_AND_TRITON, "cuda": _backend("cuda")}
_TABLE: dict[str, dict[str, Probe]] = {
    "entropy_from_logits": _NATIVE_AND_TRITON,
    "logprobs_and_entropy_from_logits": _NATIVE_AND_TRITON,
    "logprobs_from_logits": _NATIVE_AND_TRITON,
    "gae": _EVERY_BACKEND,
    "kl_estimate": _NATIVE_AND_TRITON,
    "kl_shaped_rewards": _EVERY_BACKEND,
    "shaped_gae": _EVERY_BACKEND,
    "masked_mean": _NATIVE_AND_TRITON,
    "masked_var": _NATIVE_AND_TRITON,
    "masked_whiten": _NATIVE_AND_TRITON,
    "masked_rescale": _NATIVE_AND_TRITON,
    "policy_loss": _NATIVE_AND_TRITON,
    "value_loss": _NATIVE_AND_TRITON,
    "kl_from_logits": _NATIVE_AND_TRITON,
    "policy_loss_from_logits": _EVERY_BACKEND,
    "linear_kl": _NATIVE_AND_TRITON,
    "linear_logprobs": _NATIVE_AND_TRITON,
    "linear_policy_loss": _EVERY_BACKEND,
}


def _reason(op: str, impl: str, tensor: Tensor) -> str | None:
    """Why `impl` cannot run `op` on `tensor`, or None if it can."""
    if impl == "reference":
        return None
    probe = _TABLE.get(op, {}).get(impl)
    if probe is None:
        return f"this op has no {impl} implementation"
    return probe(tensor)


def resolve(op: str, impl: str, tensor: Tensor, *others: Tensor | None) -> str:
    """Name the implementation that runs `op` on these tensors: `impl` itself, or for auto the fastest that can.

    Raises:
        ValueError: `impl` is not a known name, or was asked for by name and cannot run; with the reason.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"{op}: `impl` is {impl!r}, expected one of {', '.join(get_args(Impl))}")
    tensors = [tensor, *(x for x in others if x is not None)]

    def why_not(name: str) -> str | None:
        return next(filter(None, (_reason(op, name, x) for x in tensors)), None)

    if impl == "auto":
        fastest = _PREFERENCE.get(tensor.device.type, ())
        return next((name for name in fastest if why_not(name) is None), "reference")
    reason = why_not(impl)
    if reason is not None:
        raise ValueError(f"impl={impl!r} is not available for {op}: {reason}")
    return impl


def reasons(op: str, device: str | torch.device = "cpu") -> dict[str, str | None]:
    """Say of each name that `impl=` knows why it cannot run `op` on float32 tensors of `device`; None where it can."""
    sample = torch.empty(1, 2, device=device)
    return {name: _reason(op, name, sample) for name in get_args(Impl) if name != "auto"}


def available_impls(op: str, device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Names that `impl=` accepts for `op` on float32 tensors of `device`, the one auto takes first.

    Raises:
        ValueError: `op` is not a public op.
    """
    from ppo_fast import reference

    if op not in reference.__all__:
        raise ValueError(f"available_impls: `op` is {op!r}, expected one of {', '.join(reference.__all__)}")
    names = [name for name, reason in reasons(op, device).items() if reason is None]
    first = resolve(op, "auto", torch.empty(1, 2, device=device))
    return (first, *(name for name in names if name != first))
