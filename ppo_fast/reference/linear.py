"""Oracles in hidden space: z = softcap * tanh((h W^T + b) / softcap), then as in logits space."""

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from ppo_fast.records import PolicyLoss, Reduction
from ppo_fast.reference.logits import entropy_rows, kl_from_logits, log_softmax_rows, pick
from ppo_fast.reference.losses import policy_loss_from_logits
from ppo_fast.reference.numerics import keep, widen


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits [..., V] of `hidden` [..., D] under the head `weight` [V, D], `bias` [V], capped."""
    z = widen(hidden) @ widen(weight).T
    if bias is not None:
        z = z + widen(bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def whole_head(
    weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """The head of all ranks from their slices, in their order; only this rank's rows of it learn."""
    if group is None:
        return weight, bias
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=weight.device) for _ in range(ranks)]
    distributed.all_gather(sizes, torch.tensor([len(weight)], device=weight.device), group=group)
    longest = int(torch.cat(sizes).max())

    def whole(own: Tensor) -> Tensor:
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: len(own)] = own.detach()
        slices = [torch.empty_like(padded) for _ in range(ranks)]
        distributed.all_gather(slices, padded, group=group)
        parts = [one[: int(size)] for one, size in zip(slices, sizes, strict=True)]
        parts[rank] = own
        return torch.cat(parts)

    return whole(weight), None if bias is None else whole(bias)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_rows: int | None = None,
    compact: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label straight from the hidden state: log softmax(z / tau)[label], in nats.

    z = h W^T + b, and with a softcap s: z = s tanh(z / s), before the temperature.

    Args:
        hidden: [..., D], floating.
        weight: [V, D], floating.
        labels: [...], int64 in [0, V); outside of it the result is NaN.
        bias: [V] or None.
        temperature: tau > 0, a float or a tensor [...]; it gets no gradient.
        softcap: s > 0, or None for no cap.
        return_entropy: also return H(p) [...].
        chunk_rows, compact: matters of memory and time; here they are not used.
        group: the ranks over which the heads are sharded by vocabulary, or None.

    Returns:
        logprobs [...], or (logprobs, entropy); float32 (float64 for float64). Differentiable in hidden,
        weight and bias.

    Source: softcap from Gemma 2 (arXiv 2408.00118), section 2.
    """
    weight, bias = whole_head(weight, bias, group)
    logp = log_softmax_rows(project(hidden, weight, bias, softcap), temperature)
    logprobs = pick(logp, labels)
    return (logprobs, entropy_rows(logp)) if return_entropy else logprobs


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    compact: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Exact KL(pi || ref) of each row from the hidden states of both models, in nats.

    Args:
        hidden, weight, bias: policy: [..., D], [V, D], [V] or None.
        ref_hidden, ref_weight, ref_bias: reference: [..., D'], [V, D'], [V] or None; they get no gradient.
        softcap: s > 0 of both heads, or None.
        temperature: tau > 0 of both, a float or a tensor [...]; it gets no gradient.
        chunk_rows, compact: matters of memory and time; here they are not used.
        group: the ranks over which the heads are sharded by vocabulary, or None.

    Returns:
        [...] float32 (float64 for float64); see `kl_from_logits`.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 8, with the policy first.
    """
    weight, bias = whole_head(weight, bias, group)
    ref_weight, ref_bias = whole_head(ref_weight, ref_bias, group)
    ref_logits = project(ref_hidden, ref_weight, ref_bias, softcap).detach()
    return kl_from_logits(project(hidden, weight, bias, softcap), ref_logits, temperature=temperature)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    log_ratio_clamp: float | None = None,
    chunk_rows: int | None = None,
    compact: bool | None = None,
    group: ProcessGroup | None = None,
) -> PolicyLoss:
    """`policy_loss_from_logits` of z = h W^T + b (softcapped), without the caller ever holding the logits.

    Args:
        hidden: [B, T, D], floating. Rows whose mask is 0 are never read.
        weight: [V, D], floating.
        bias: [V] or None.
        softcap: s > 0, z = s tanh(z / s) before the temperature; None for no cap. Of both heads.
        ref_hidden, ref_weight, ref_bias: the reference's [B, T, D'], [V, D'], [V] or None, for the KL term;
            they get no gradient.
        labels, old_logprobs, advantages, mask, and the rest: as in `policy_loss_from_logits`.
        chunk_rows, compact: matters of memory and time; here they are not used.
        group: the ranks over which the heads are sharded by vocabulary, or None.

    Returns:
        PolicyLoss; the loss is differentiable in hidden, weight and bias.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 to 9.
    """
    rows = (mask != 0).unsqueeze(-1)
    weight, bias = whole_head(weight, bias, group)
    ref_logits = None
    if ref_hidden is not None and ref_weight is not None:
        ref_logits = project(ref_hidden, *whole_head(ref_weight, ref_bias, group), softcap).detach()
    return policy_loss_from_logits(
        project(keep(hidden, rows), weight, bias, softcap),
        labels,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        ref_logits=ref_logits,
        kl_coef=kl_coef,
        temperature=temperature,
        reduction=reduction,
        normalizer=normalizer,
        log_ratio_clamp=log_ratio_clamp,
    )
