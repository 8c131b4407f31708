"""Launches of the C++ row ops on two rows of logits: exact KL, and the clipped policy loss with its gradient.

Each has the name and the results of the Triton launcher that it stands in for; what a gradient needs is float64.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops.backends import CPU_DTYPES, large_empty
from ppo_fast.ops.fused_estimate import address, widest
from ppo_fast.ops.row_grid import RowGrid

POLICY_STATE = 9  # numbers of a row, as csrc/cpu/policy.h has them


def _settings() -> dict[str, Any]:
    return {"threads": torch.get_num_threads(), "isa": build.selected_isa()}


def _grid(
    rows: RowGrid, labels: Tensor | None, temperature: Tensor, *, absent_labels: bool = False
) -> Any:  # ppo_fast._C.RowGrid
    """Addresses only: the caller keeps the tensors until the call is over."""
    return build.extension().RowGrid(
        logits=rows.logits.data_ptr(),
        dtype=CPU_DTYPES[rows.logits.dtype],
        rows=rows.logits.shape[:-1].numel(),
        vocab=rows.logits.shape[-1],
        inner_rows=rows.inner_rows,
        outer_stride=rows.outer_stride,
        inner_stride=rows.inner_stride,
        labels=address(labels),
        temperature=temperature.data_ptr(),
        temperature_stride=min(1, temperature.dim()),
        absent_labels=absent_labels,
    )


def _ref(rows: RowGrid | None) -> tuple[int, ...] | None:
    if rows is None:
        return None
    return rows.logits.data_ptr(), CPU_DTYPES[rows.logits.dtype], *rows.strides


def policy_rows(
    rows: RowGrid,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    temperature: Tensor,
    ref_rows: RowGrid | None,
    coefficients: Tensor,
    *,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return logprobs, entropy, KL (None without a reference) and the state [N, 9], or None `inplace`.

    Numbers of a token are contiguous; `weights` is -inf where it does not count; temperature and coefficients are
    float64. Arithmetic and results are float32, float64 for float64 logits.
    """
    dtype = widest(rows.logits)
    counted = weights != -math.inf
    labels = torch.where(counted, labels, 0)
    if temperature.dim():
        temperature = torch.where(counted, temperature, 1.0)
    old_logprobs, advantages, weights = (x.to(dtype) for x in (old_logprobs, advantages, weights))
    logprobs, entropy = torch.empty(labels.shape, dtype=dtype), torch.empty(labels.shape, dtype=dtype)
    kl = None if ref_rows is None else torch.empty(labels.shape, dtype=dtype)
    state = None if inplace else torch.empty((labels.numel(), POLICY_STATE), dtype=torch.float64)
    low, high, dual_clip, log_ratio_clamp, entropy_coef, kl_coef, _ = coefficients.tolist()
    build.extension().policy_forward(
        _grid(rows, labels, temperature),
        ref=_ref(ref_rows),
        old_logprobs=old_logprobs.data_ptr(),
        advantages=advantages.data_ptr(),
        weights=weights.data_ptr(),
        low=low,
        high=high,
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        logprobs=logprobs.data_ptr(),
        entropy=entropy.data_ptr(),
        kl=address(kl),
        state=address(state),
        **_settings(),
    )
    return logprobs, entropy, kl, state


def policy_gradient(
    grad_loss: Tensor,
    rows: RowGrid,
    labels: Tensor,
    temperature: Tensor,
    ref_rows: RowGrid | None,
    state: Tensor,
    *,
    inplace: bool,
) -> Tensor:
    """Return the gradient [..., V] of the logits, contiguous or `inplace`, in their dtype.

    A label of -1 lies in another slice of the vocabulary than these logits.
    """
    out, state = None if inplace else large_empty(rows.logits.shape, rows.logits.dtype), state.contiguous()
    # A row that does not count is not read: any label and temperature in range will do.
    read = (state[:, -3:] != 0).any(1).view(labels.shape)
    labels = torch.where(read, labels, 0)
    if temperature.dim():
        temperature = torch.where(read, temperature, 1.0)
    build.extension().policy_backward(
        _grid(rows, labels, temperature, absent_labels=True),
        ref=_ref(ref_rows),
        state=state.data_ptr(),
        grad_loss=grad_loss.item(),
        grad_logits=address(out),
        **_settings(),
    )
    return rows.logits if out is None else out


def scale_rows(grad_loss: Tensor, rows: RowGrid) -> None:
    """Multiply the gradient that stands in `rows` by `grad_loss`, a 0-d tensor, in place."""
    factor = grad_loss.item()
    if factor != 1.0:
        temperature = torch.ones((), dtype=torch.float64)
        build.extension().scale_rows(_grid(rows, None, temperature), factor=factor, **_settings())


def kl_forward(rows: RowGrid, ref_rows: RowGrid, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(pi || ref) [...] and the state [N, 9] for the backward."""
    shape = rows.logits.shape[:-1]
    kl = torch.empty(shape, dtype=widest(rows.logits))
    state = torch.empty((shape.numel(), POLICY_STATE), dtype=torch.float64)
    build.extension().kl_forward(
        _grid(rows, None, temperature),
        ref=_ref(ref_rows),
        kl=kl.data_ptr(),
        state=state.data_ptr(),
        **_settings(),
    )
    return kl, state


def kl_backward(
    rows: RowGrid,
    ref_rows: RowGrid,
    temperature: Tensor,
    state: Tensor,
    grad_kl: Tensor,
    *,
    of_logits: bool,
    of_ref_logits: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients asked for, contiguous, each in its input's dtype; `grad_kl` is typed like the KL."""
    grads = [
        large_empty(x.logits.shape, x.logits.dtype) if wanted else None
        for x, wanted in ((rows, of_logits), (ref_rows, of_ref_logits))
    ]
    state, grad_kl = state.contiguous(), grad_kl.contiguous()
    build.extension().kl_backward(
        _grid(rows, None, temperature),
        ref=_ref(ref_rows),
        state=state.data_ptr(),
        grad_kl=grad_kl.data_ptr(),
        grad_logits=address(grads[0]),
        grad_ref_logits=address(grads[1]),
        **_settings(),
    )
    return grads[0], grads[1]
