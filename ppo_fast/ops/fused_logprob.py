"""Logprob of a label and entropy of each row in one pass over the logits: C++ on a CPU, Triton on a GPU.

Both backends are one `torch.library` operator, so that `torch.compile` traces through without a graph break.
"""

from typing import Any

import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops.backends import CPU_DTYPES, large_empty, unavailable
from ppo_fast.ops.row_grid import RowGrid, gpu_row_grid, row_grid


def logprobs_and_entropy(
    logits: Tensor, labels: Tensor, temperature: float | Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """Return log p[label] and the entropy of p = softmax(logits / temperature), differentiable in `logits`.

    With d_j = (x_j - max x) / T: logprob = d_label - log sum exp(d), H = log sum exp(d) - sum p d, and
    dlogprob/dx_j = ([j = label] - p_j) / T, dH/dx_j = -p_j (d_j - sum p d) / T. A probability of 0 (a logit of
    -inf) adds nothing to either. Differentiable once; a row with both upstream gradients 0 is not read again.
    The sums are taken online in one pass (Milakov and Gimelshein 2018).

    Args:
        logits: [..., V] float32, bfloat16 or float16 (float64 with `impl="cpu"`), on any strides; where its rows
            are not contiguous, or have more than two levels of stride, it is copied first. The gradient has its dtype.
        labels: int64 [...], each in [0, V). Out of range: ValueError from "cpu", NaN from "triton".
        temperature: a positive float, or a tensor [...] of them, one a row; it gets no gradient.
        impl: "cpu" or "triton".

    Returns:
        logprobs [...] and entropy [...] in nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: an `impl` that cannot run here, with the reason; V = 0; a temperature that wants a gradient.
    """
    results = logprob_entropy(logits, labels, _checked(logits, temperature, impl), impl)
    return results[0], results[1]


def logprobs(logits: Tensor, labels: Tensor, temperature: float | Tensor, impl: str) -> Tensor:
    """Return log p[label] alone, the same bits as with the entropy, which a CPU then saves itself."""
    return logprob_entropy(logits, labels, _checked(logits, temperature, impl), impl, False)[0]


def _checked(logits: Tensor, temperature: float | Tensor, impl: str) -> Tensor:
    """Refuse what no implementation takes; return the temperature as a tensor."""
    reason = unavailable(impl, logits)
    if reason is not None:
        raise ValueError(f"impl={impl!r} is not available: {reason}")
    if logits.shape[-1] == 0:
        raise ValueError(
            f"`logits` has shape {tuple(logits.shape)}, expected at least one token in the last axis"
        )
    if not isinstance(temperature, Tensor):
        # A tensor, and by this product: torch.compile would compile anew for each value of an operator's float,
        # and of torch.full's.
        temperature = torch.ones((), dtype=_temperature_dtype(impl), device=logits.device) * temperature
    if temperature.requires_grad:
        raise ValueError(
            "`temperature` requires a gradient, which this implementation does not have; detach it"
        )
    return temperature


def _output_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _temperature_dtype(impl: str) -> torch.dtype:
    return torch.float64 if impl == "cpu" else torch.float32


def _stats_dtype(impl: str) -> torch.dtype:
    return torch.float64 if impl == "cpu" else torch.float32


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


@torch.library.custom_op("ppo_fast::logprob_entropy", mutates_args=())
def logprob_entropy(
    logits: Tensor, labels: Tensor, temperature: Tensor, impl: str, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Operator behind the functions above; its third output [N, 3] is what the backward needs of each row.

    Without entropy its second output is empty.
    """
    rows = row_grid(logits) if impl == "cpu" else gpu_row_grid(logits)
    labels = labels.contiguous()
    if impl == "cpu":
        return _cpu_forward(rows, labels, _flat(temperature, _temperature_dtype(impl)), with_entropy)
    from ppo_fast.kernels import logprob

    logprobs, entropy, stats = logprob.logprob_forward(
        logits=rows.logits,
        labels=labels,
        temperature=_flat(temperature, _temperature_dtype(impl)),
        inner_rows=rows.inner_rows,
        outer_stride=rows.outer_stride,
        inner_stride=rows.inner_stride,
    )
    return logprobs, entropy if with_entropy else entropy.new_empty(0), stats


@logprob_entropy.register_fake
def _(
    logits: Tensor, labels: Tensor, temperature: Tensor, impl: str, with_entropy: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.new_empty(labels.shape, dtype=_output_dtype(logits))
    stats = logits.new_empty((labels.numel(), 3), dtype=_stats_dtype(impl))
    return logprobs, logprobs.new_empty(labels.shape if with_entropy else (0,)), stats


@torch.library.custom_op("ppo_fast::logprob_entropy_backward", mutates_args=())
def logprob_entropy_backward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    impl: str,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient [..., V] of the operator above from the gradients of its outputs; None stands for zeros."""
    rows = row_grid(logits) if impl == "cpu" else gpu_row_grid(logits)
    labels = labels.contiguous()
    grads = [
        None if grad is None else _flat(grad, _output_dtype(logits)) for grad in (grad_logprobs, grad_entropy)
    ]
    if impl == "cpu":
        return _cpu_backward(rows, labels, _flat(temperature, _temperature_dtype(impl)), stats, *grads)
    from ppo_fast.kernels import logprob

    return logprob.logprob_backward(
        logits=rows.logits,
        labels=labels,
        stats=stats,
        grad_logprobs=grads[0],
        grad_entropy=grads[1],
        temperature=_flat(temperature, _temperature_dtype(impl)),
        inner_rows=rows.inner_rows,
        outer_stride=rows.outer_stride,
        inner_stride=rows.inner_stride,
    )


@logprob_entropy_backward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    impl: str,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _native_grid(rows: RowGrid, labels: Tensor, temperature: Tensor) -> Any:  # ppo_fast._C.RowGrid
    return build.extension().RowGrid(
        logits=rows.logits.data_ptr(),
        dtype=CPU_DTYPES[rows.logits.dtype],
        rows=labels.numel(),
        vocab=rows.logits.shape[-1],
        inner_rows=rows.inner_rows,
        outer_stride=rows.outer_stride,
        inner_stride=rows.inner_stride,
        labels=labels.data_ptr(),
        temperature=temperature.data_ptr(),
        temperature_stride=min(1, temperature.dim()),
    )


def _cpu_forward(
    rows: RowGrid, labels: Tensor, temperature: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.empty(labels.shape, dtype=_output_dtype(rows.logits))
    entropy = logprobs.new_empty(labels.shape if with_entropy else (0,))
    stats = torch.empty((labels.numel(), 3), dtype=torch.float64)
    build.extension().logprob_forward(
        _native_grid(rows, labels, temperature),
        logprobs=logprobs.data_ptr(),
        entropy=_address(entropy if with_entropy else None),
        stats=stats.data_ptr(),
        threads=torch.get_num_threads(),
        isa=build.selected_isa(),
    )
    return logprobs, entropy, stats


def _cpu_backward(
    rows: RowGrid,
    labels: Tensor,
    temperature: Tensor,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    grad_logits = large_empty(rows.logits.shape, rows.logits.dtype)
    build.extension().logprob_backward(
        _native_grid(rows, labels, temperature),
        stats=stats.contiguous().data_ptr(),
        grad_logprobs=_address(grad_logprobs),
        grad_entropy=_address(grad_entropy),
        grad_logits=grad_logits.data_ptr(),
        threads=torch.get_num_threads(),
        isa=build.selected_isa(),
    )
    return grad_logits


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, temperature, ctx.impl, _ = inputs
    ctx.save_for_backward(logits, labels, temperature, output[2])
    ctx.set_materialize_grads(False)  # an unused output arrives as None, and the kernel drops its term


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _grad_stats: Tensor | None
) -> tuple[Tensor | None, None, None, None, None]:
    if grad_logprobs is None and grad_entropy is None:
        return None, None, None, None, None
    logits, labels, temperature, stats = ctx.saved_tensors
    grad_logits = logprob_entropy_backward(
        logits, labels, temperature, ctx.impl, stats, grad_logprobs, grad_entropy
    )
    return grad_logits, None, None, None, None


logprob_entropy.register_autograd(_backward, setup_context=_save_for_backward)
