"""Oracles in logits space: one row of logits is z [V], its softmax at temperature tau is p."""

import torch
from torch import Tensor

from ppo_fast.reference.numerics import widen


def log_softmax_rows(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log p_j = z_j / tau - log sum_k exp(z_k / tau), [..., V]; no gradient reaches `temperature`."""
    z = widen(logits)
    if isinstance(temperature, Tensor):
        z = z / temperature.detach().to(z.dtype).unsqueeze(-1)
    elif temperature != 1.0:
        z = z / temperature
    return torch.log_softmax(z, dim=-1)


def pick(logp: Tensor, labels: Tensor) -> Tensor:
    """logp[..., label], and NaN where the label is outside [0, V)."""
    inside = (labels >= 0) & (labels < logp.shape[-1])
    picked = logp.gather(-1, torch.where(inside, labels, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(inside, picked, torch.nan)


def entropy_rows(logp: Tensor) -> Tensor:
    """H = -sum_j p_j log p_j in nats, where a column of log p_j = -inf adds 0, also to the gradient."""
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)


def kl_rows(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """sum_j p_j (log p_j - log q_j) in nats; a column of log p_j = -inf adds 0, whatever q_j is.

    One of log q_j = -inf alone makes the row infinite, also where p_j has underflowed to 0.
    """
    impossible = logp == -torch.inf
    gap = logp.masked_fill(impossible, 0.0) - ref_logp.masked_fill(impossible, 0.0)
    p = logp.exp()
    return torch.where((gap == torch.inf) & (p == 0), torch.inf, p * gap).sum(-1)


def logprobs_from_logits(logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probability of each label: log p[label] = z[label] / tau - log sum_k exp(z_k / tau), in nats.

    Args:
        logits: [..., V], floating; -inf marks an impossible token.
        labels: [...], int64 in [0, V); outside of it the result is NaN.
        temperature: tau > 0, a float or a tensor [...], one a row; it gets no gradient.

    Returns:
        [...] float32 (float64 for float64). Gradient: dz_j = (1[j = label] - p_j) / tau.

    Source: softmax policy of Ziegler et al. 2019 (arXiv 1909.08593), section 2.
    """
    return pick(log_softmax_rows(logits, temperature), labels)


def logprobs_and_entropy_from_logits(
    logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """(log p[label], H(p)) of each row, in nats, both differentiable.

    Args:
        logits: [..., V], floating.
        labels: [...], int64 in [0, V); outside of it the log-probability is NaN.
        temperature: tau > 0, a float or a tensor [...]; it gets no gradient.

    Returns:
        Two tensors [...], float32 (float64 for float64). See `logprobs_from_logits`, `entropy_from_logits`.

    Source: the entropy bonus of PPO, Schulman et al. 2017 (arXiv 1707.06347), eq. 9.
    """
    logp = log_softmax_rows(logits, temperature)
    return pick(logp, labels), entropy_rows(logp)


def entropy_from_logits(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of each row, H = -sum_j p_j log p_j, in nats.

    Args:
        logits: [..., V], floating; a column at -inf adds 0 to the entropy and to its gradient.
        temperature: tau > 0, a float or a tensor [...]; it gets no gradient.

    Returns:
        [...] float32 (float64 for float64). Gradient: dz_j = -p_j (log p_j + H) / tau.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 9.
    """
    return entropy_rows(log_softmax_rows(logits, temperature))


def kl_from_logits(logits: Tensor, ref_logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """Exact KL(pi || ref) = sum_j p_j (log p_j - log q_j) of each row, in nats, q being the reference.

    Args:
        logits: [..., V], floating.
        ref_logits: [..., V], floating.
        temperature: tau > 0 of both, a float or a tensor [...]; it gets no gradient.

    Returns:
        [...] float32 (float64 for float64). Gradient: dz_j = p_j (log p_j - log q_j - KL) / tau, and
        (q_j - p_j) / tau for the reference. A column at -inf in `logits` adds 0; one at -inf in `ref_logits`
        alone makes the row's KL infinite and its gradient NaN.

    Source: the penalty of PPO, Schulman et al. 2017 (arXiv 1707.06347), eq. 8, with the policy first.
    """
    return kl_rows(log_softmax_rows(logits, temperature), log_softmax_rows(ref_logits, temperature))
