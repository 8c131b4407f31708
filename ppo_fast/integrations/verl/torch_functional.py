"""verl.utils.torch_functional: log-probabilities, entropies and masked moments, on our ops."""

import os

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import contract
from ppo_fast.integrations.originals import log_softmax_dtype


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label, as verl: in the dtype of `logits`, or float32 where flash-attn would run.

    Args:
        logits: [..., V], floating.
        labels: [...], int32 or int64; with flash-attn, -100 gives 0.
        inplace_backward: a permission to write the gradient over the logits; not used.

    Returns:
        [...], differentiable in `logits`; float32 too where autocast widens log_softmax, as it does on a GPU.
    """
    labels = contract.wide_index(labels)
    if contract.flash_attn_cross_entropy() and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1":
        kept = labels != contract.IGNORED_LABEL
        logprobs = ppo_fast.logprobs_from_logits(logits, torch.where(kept, labels, 0))
        return torch.where(kept, logprobs, 0.0).float()
    return ppo_fast.logprobs_from_logits(logits, labels).to(log_softmax_dtype(logits))


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of each row of `logits` [..., V], in log_softmax's dtype; NaN where a logit is -inf, as verl."""
    entropy = ppo_fast.entropy_from_logits(logits).to(log_softmax_dtype(logits))
    return contract.nan_where_impossible(entropy, logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of each row of `logits` [N, V] in float32; there are no temporaries of its size to cut into chunks."""
    if logits.dim() != 2:
        raise RuntimeError(
            f"entropy_from_logits_with_chunking: `logits` has shape {tuple(logits.shape)}, not [N, V]"
        )
    return contract.nan_where_impossible(ppo_fast.entropy_from_logits(logits).float(), logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """sum_j p_j^2 of each row of `logits` [..., V], in log_softmax's dtype.

    log of it = logsumexp(2 z) - 2 logsumexp(z): for any label twice its log-probability at temperature 1, less the one
    at temperature 1/2. The likeliest label keeps both small.
    """
    label = logits.detach().argmax(-1)
    once = ppo_fast.logprobs_from_logits(logits, label)
    sharpened = ppo_fast.logprobs_from_logits(logits, label, temperature=0.5)
    return (2 * once - sharpened).exp().to(log_softmax_dtype(logits))


def fusable(values: Tensor, mask: Tensor) -> bool:
    """Whether our moments mean the same: weights, a broadcast, integers and nested tensors they do not know."""
    if values.is_nested or mask.is_nested:
        return False
    return values.is_floating_point() and values.shape == mask.shape and contract.zero_one(mask)


def _mean_dtype(values: Tensor, mask: Tensor) -> torch.dtype:
    """A sum divided by `mask.sum() + 1e-8`, which is a float32 for a mask of integers."""
    count = mask.dtype if mask.is_floating_point() else torch.get_default_dtype()
    return torch.promote_types(contract.promoted(values, mask), count)


def masked_sum(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """Sum of values * mask, where what stands under a mask of 0 is never read. No replacement: two calls of torch."""
    return (torch.where(mask.bool(), values, 0.0) * mask).sum(axis)


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """sum(values * mask) / (sum(mask) + 1e-8): 0 for an empty mask."""
    if (axis is None or isinstance(axis, int)) and fusable(values, mask):
        return ppo_fast.masked_mean(values, mask, axis).to(_mean_dtype(values, mask))
    return masked_sum(values, mask, axis) / (mask.sum(axis) + 1e-8)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the counted slots, 0-d.

    Raises:
        ValueError: unbiased, and the mask sums to 0 or 1.
    """
    count = _enough(mask.sum()) if unbiased else None
    if fusable(values, mask):
        return ppo_fast.masked_var(values, mask, unbiased=unbiased).to(_mean_dtype(values, mask))
    variance = masked_mean((values - masked_mean(values, mask)) ** 2, mask)
    return variance if count is None else variance * (count / (count - 1))


def _enough(count: Tensor) -> Tensor:
    """`count`, which an unbiased variance divides by less 1."""
    if count == 0:
        raise ValueError("At least one element in the mask has to be 1.")
    if count == 1:
        raise ValueError("The sum of the mask is one, which can cause a division by zero.")
    return count


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(var + 1e-8), the mean added back unless `shift_mean`; in masked slots too."""
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    return _whitened(values, mean, variance) if shift_mean else _whitened(values, mean, variance).add_(mean)


def whitened(values: Tensor, counted: Tensor, count: Tensor) -> Tensor:
    """`masked_whiten` under a mask of bools, whose sum is known."""
    _enough(count)
    mean, variance = (
        ppo_fast.masked_mean(values, counted),
        ppo_fast.masked_var(values, counted, unbiased=True),
    )
    return _whitened(values, mean, variance)


def _whitened(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (values - mean).mul_(torch.rsqrt(variance + 1e-8))
