"""Public ops in logits space, one row at a time: log-probability, entropy, exact KL."""

import torch
from torch import Tensor

from ppo_fast import reference
from ppo_fast.ops import dispatch
from ppo_fast.ops.checks import Checker
from ppo_fast.ops.dispatch import Impl


def _constant(temperature: float | Tensor) -> float | Tensor:
    return temperature.detach() if isinstance(temperature, Tensor) else temperature


def _fused(logits: Tensor, labels: Tensor, temperature: float | Tensor, impl: str) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) by a fused kernel; imported here so that importing ppo_fast needs torch alone."""
    from ppo_fast.ops import fused_logprob

    return fused_logprob.logprobs_and_entropy(logits, labels, _constant(temperature), impl)


def _check_rows(op: str, logits: Tensor, temperature: float | Tensor) -> Checker:
    """The arguments that every op here shares."""
    check = Checker(op, "logits", logits)
    check.vocabulary(logits)
    check.temperature(temperature, logits.shape[:-1])
    check.logits(None, logits=logits)
    return check


def _check_labelled_rows(op: str, logits: Tensor, labels: Tensor, temperature: float | Tensor) -> None:
    check = _check_rows(op, logits, temperature)
    check.labels(labels, logits.shape[:-1], "logits without its last axis", logits.shape[-1])


def logprobs_from_logits(
    logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0, impl: Impl = "auto"
) -> Tensor:
    """Log-probability of each label, log softmax(logits / temperature)[label], in nats.

    Equivalent to `log_softmax(logits.float() / temperature, -1).gather(-1, labels[..., None]).squeeze(-1)`.

    Args:
        logits: [..., V], floating; -inf marks an impossible token.
        labels: [...], int64 in [0, V).
        temperature: a float above 0, or a tensor [...], one a row; it gets no gradient.
        impl: auto, reference, cpu or triton.

    Returns:
        [...], float32 (float64 for float64), differentiable in `logits`.

    Raises:
        ValueError: wrong shape, device, temperature or `impl`; a label outside [0, V) on the CPU (on a GPU
            that row is NaN unless `check_inputs(True)`).
        TypeError: wrong dtype.

    Source: softmax policy of Ziegler et al. 2019 (arXiv 1909.08593), section 2.
    """
    _check_labelled_rows("logprobs_from_logits", logits, labels, temperature)
    which = dispatch.resolve("logprobs_from_logits", impl, logits)
    if which == "reference":
        return reference.logprobs_from_logits(logits, labels, temperature=temperature)
    from ppo_fast.ops import fused_logprob

    return fused_logprob.logprobs(logits, labels, _constant(temperature), which)


def logprobs_and_entropy_from_logits(
    logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each row in one pass over the logits, in nats.

    Equivalent to `(logprobs_from_logits(...), entropy_from_logits(...))`; both are differentiable.

    Args:
        logits: [..., V], floating; -inf marks an impossible token.
        labels: [...], int64 in [0, V).
        temperature: a float above 0, or a tensor [...], one a row; it gets no gradient.
        impl: auto, reference, cpu or triton.

    Returns:
        (logprobs, entropy), [...] each, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as `logprobs_from_logits`.

    Source: the entropy bonus of PPO, Schulman et al. 2017 (arXiv 1707.06347), eq. 9.
    """
    _check_labelled_rows("logprobs_and_entropy_from_logits", logits, labels, temperature)
    which = dispatch.resolve("logprobs_and_entropy_from_logits", impl, logits)
    if which == "reference":
        return reference.logprobs_and_entropy_from_logits(logits, labels, temperature=temperature)
    return _fused(logits, labels, temperature, which)


def entropy_from_logits(logits: Tensor, *, temperature: float | Tensor = 1.0, impl: Impl = "auto") -> Tensor:
    """Entropy of each row, H = -sum_j p_j log p_j with p = softmax(logits / temperature), in nats.

    Args:
        logits: [..., V], floating; a column at -inf adds 0 to the entropy and to its gradient.
        temperature: a float above 0, or a tensor [...], one a row; it gets no gradient.
        impl: auto, reference, cpu or triton.

    Returns:
        [...], float32 (float64 for float64), differentiable in `logits`.

    Raises:
        ValueError: wrong shape, temperature or `impl`.
        TypeError: wrong dtype.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 9.
    """
    _check_rows("entropy_from_logits", logits, temperature)
    which = dispatch.resolve("entropy_from_logits", impl, logits)
    if which == "reference":
        return reference.entropy_from_logits(logits, temperature=temperature)
    any_label = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _fused(logits, any_label, temperature, which)[1]


def kl_from_logits(
    logits: Tensor, ref_logits: Tensor, *, temperature: float | Tensor = 1.0, impl: Impl = "auto"
) -> Tensor:
    """Exact KL(pi || ref) = sum_j p_j (log p_j - log q_j) of each row, in nats, q being the reference.

    Args:
        logits: [..., V], floating. A column at -inf adds 0, also where `ref_logits` is -inf too.
        ref_logits: [..., V], floating. A column at -inf here alone makes the KL infinite, and its gradient NaN.
        temperature: of both; a float above 0, or a tensor [...], one a row; it gets no gradient.
        impl: auto, reference, cpu or triton.

    Returns:
        [...], float32 (float64 for float64), differentiable in `logits` and `ref_logits`:
        dx_j = p_j (log p_j - log q_j - KL) / T, dr_j = (q_j - p_j) / T.

    Raises:
        ValueError: wrong shape, device, temperature or `impl`.
        TypeError: wrong dtype.

    Source: the penalty of PPO, Schulman et al. 2017 (arXiv 1707.06347), eq. 8, with the policy first.
    """
    check = _check_rows("kl_from_logits", logits, temperature)
    check.floats(logits.shape, "shape of logits", ref_logits=ref_logits)
    check.logits(None, ref_logits=ref_logits)
    runs = dispatch.resolve("kl_from_logits", impl, logits, ref_logits)
    if runs == "reference":
        return reference.kl_from_logits(logits, ref_logits, temperature=temperature)
    from ppo_fast.ops import fused_kl

    return fused_kl.exact_kl(logits, ref_logits, temperature, runs)
