"""TRL 1.16: the kernel behind its helpers in logits space, and the helpers themselves."""

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.contract import for_each_row, nan_where_impossible
from ppo_fast.integrations.originals import WIDE, takes_labels
from ppo_fast.integrations.trl.rows import entropies, selected

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fused_logprob_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Replaces `trl.kernels.selective_log_softmax_and_entropy`, alias `trl.trainer.utils._fused_logprob_entropy`.

    Args:
        logits: [..., V], float32, bfloat16 or float16.
        index: [...], int32 or int64.
        temperature: above 0, a number or a tensor that holds one.
        row_mask: [...], 0 = leave the row out; what it holds, and its index, is not looked at.

    Returns:
        logprobs and entropy, [...] each, float32, 0 in rows left out; both differentiable. A row that holds a logit
        of -inf has the entropy NaN.
    """
    labels, each = index.long(), for_each_row(temperature, index.shape)
    if row_mask is None:
        logprobs, entropy = ppo_fast.logprobs_and_entropy_from_logits(logits, labels, temperature=each)
        return logprobs, nan_where_impossible(entropy, logits)
    counted = row_mask != 0
    labels = torch.where(counted, labels, 0)
    logprobs, entropy = ppo_fast.logprobs_and_entropy_from_logits(logits, labels, temperature=each)
    return torch.where(counted, logprobs, 0.0), torch.where(
        counted, nan_where_impossible(entropy, logits), 0.0
    )


def _kernel_takes(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
    """Whether TRL would take its kernel, whose results are float32; without it they have the dtype of the logits."""
    takes = (
        logits.device.type in ("cuda", "xpu")
        and logits.dtype in _KERNEL_DTYPES
        and 1 <= logits.dim() <= 3
        and logits.stride(-1) == 1
        and logits.shape[-1] > 0
    )
    for tensor, dtypes in (
        (index, (torch.int32, torch.int64)),
        (row_mask, (torch.bool, torch.int32, torch.int64)),
    ):
        if tensor is not None:
            takes = takes and tensor.shape == logits.shape[:-1] and tensor.dtype in dtypes
            takes = takes and tensor.device == logits.device
    return takes


def _positive(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError("temperature must be positive")


def _blank(values: Tensor, row_mask: Tensor | None) -> Tensor:
    return values if row_mask is None else values.masked_fill(row_mask == 0, 0.0)


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Replaces `trl.trainer.utils.selective_log_softmax` of TRL 1.16.

    Args:
        logits: [..., V], floating.
        index: [...], or [..., K] for K of each row.
        temperature: above 0, a number or a tensor that holds one.
        row_mask: shape of the result, 0 = the result is 0; or None.

    Returns:
        Shape of `index`: float32 on a GPU where TRL would run its kernel, else the dtype of the logits.

    Raises:
        ValueError: a temperature that is not above 0.
        RuntimeError: an index outside the vocabulary, on the CPU; shapes that do not fit.
    """
    _positive(temperature)
    if _kernel_takes(logits, index, row_mask):
        return fused_logprob_entropy(logits, index, temperature, row_mask)[0]
    return _blank(selected(logits, index, temperature), row_mask)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Replaces `trl.trainer.utils.entropy_from_logits` of TRL 1.16.

    Args:
        logits: [..., V], floating.
        chunk_size: rows that are taken at a time in half precision on a CPU; the fused op takes them one by one.

    Returns:
        [...], float32 on a GPU where TRL would run its kernel, else the dtype of the logits; NaN in a row that holds
        a logit of -inf.
    """
    if _kernel_takes(logits):
        return nan_where_impossible(ppo_fast.entropy_from_logits(logits), logits)
    return entropies(logits, chunk_size)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Replaces `trl.trainer.utils.selective_log_softmax_and_entropy` of TRL 1.16: both in one pass over the logits.

    Args:
        logits, index, temperature, row_mask: as in `selective_log_softmax`, one label a row.
        entropy_requires_grad: whether the entropy is differentiable.

    Returns:
        (logprobs, entropy), in the dtypes of `selective_log_softmax` and `entropy_from_logits`.

    Raises:
        ValueError, RuntimeError: as `selective_log_softmax`.
    """
    _positive(temperature)
    if _kernel_takes(logits, index, row_mask):
        logprobs, entropy = fused_logprob_entropy(logits, index, temperature, row_mask)
    elif logits.dtype in WIDE and index.dim() < logits.dim() and takes_labels(logits, index):
        logprobs, entropy = ppo_fast.logprobs_and_entropy_from_logits(
            logits, index.long(), temperature=for_each_row(temperature, index.shape)
        )
        logprobs, entropy = (
            _blank(logprobs, row_mask),
            _blank(nan_where_impossible(entropy, logits), row_mask),
        )
    else:
        logprobs = _blank(selected(logits, index, temperature), row_mask)
        entropy = _blank(entropies(logits, 128, temperature), row_mask)
    return logprobs, entropy if entropy_requires_grad else entropy.detach()
