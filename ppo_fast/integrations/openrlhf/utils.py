"""openrlhf.models.utils: log-probabilities, entropy and KL estimates, on our ops."""

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import contract
from ppo_fast.integrations.originals import log_softmax_dtype
from ppo_fast.records import KlKind

KL_CLAMP = 10.0
# Where the k3 estimate passes KL_CLAMP on either side, and before its exponential overflows.
K3_INPUT_CLAMP = 20.0
IMPORTANCE_CLAMP = 10.0
KL_KINDS: dict[str, KlKind] = {"k1": "k1", "k2": "k2", "k3": "k3"}


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each label, as OpenRLHF: a temperature other than 1 divides `logits` in place.

    Args:
        logits: [..., V], floating.
        labels: [...], int32 or int64; with flash-attn and float32 logits, -100 gives 0.
        temperature: above 0.

    Returns:
        [...] in log_softmax's dtype, or float32 where flash-attn would run; differentiable in `logits`.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    labels = contract.wide_index(labels)
    if logits.dtype in (torch.float32, torch.float64) and contract.flash_attn_cross_entropy():
        kept = labels != contract.IGNORED_LABEL
        logprobs = ppo_fast.logprobs_from_logits(logits, torch.where(kept, labels, 0))
        return torch.where(kept, logprobs, 0.0).float()
    return ppo_fast.logprobs_from_logits(logits, labels).to(log_softmax_dtype(logits))


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of each row of `logits` [..., V], in log_softmax's dtype; NaN where a logit is -inf, as OpenRLHF."""
    entropy = ppo_fast.entropy_from_logits(logits).to(log_softmax_dtype(logits))
    return contract.nan_where_impossible(entropy, logits)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """Estimate of KL(pi || ref) by the sampled token in float32, clamped at 10 on both sides.

    Args:
        log_probs, log_probs_base: [...], of the policy and of the reference; both get a gradient.
        log_probs_old: [...], of the policy that sampled, for the weight of the unbiased gradient.
        kl_estimator: k1, k2 or k3.
        unbiased_gradient: keep the value, and have the gradient of k2 times exp(log_probs - log_probs_old), at most
            10: that of the reverse KL itself.

    Raises:
        ValueError: another estimator.
    """
    kind = KL_KINDS.get(kl_estimator)
    if kind is None:
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
    new, base = log_probs.float(), log_probs_base.float()
    if base.requires_grad:  # our op has no gradient for the reference
        new, base = new - base, torch.zeros_like(base)
    value = ppo_fast.kl_estimate(
        new, base, kind=kind, input_clamp=K3_INPUT_CLAMP if kind == "k3" else None, output_clamp=KL_CLAMP
    )
    if not unbiased_gradient:
        return value
    surrogate = ppo_fast.kl_estimate(new, base, kind="k2")
    if log_probs_old is not None:
        log_ratio = log_probs.detach().float() - log_probs_old.detach().float()
        surrogate = log_ratio.exp().clamp(max=IMPORTANCE_CLAMP) * surrogate
    return value.detach() + surrogate - surrogate.detach()
