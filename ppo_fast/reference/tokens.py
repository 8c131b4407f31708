"""Oracles in token space, before the losses: KL estimates, shaped rewards, GAE.

Column t is response token t: `rewards[:, t]` is paid for it, `values[:, t]` is V before it.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppo_fast.records import Experience, KlKind, MaskRule
from ppo_fast.reference.moments import WHITEN_EPS, masked_whiten
from ppo_fast.reference.numerics import keep, pad_rows, unpad_rows, widen

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: KlKind = "k1",
    input_clamp: float | None = None,
    output_clamp: float | None = None,
) -> Tensor:
    """Per-token estimate of KL(pi || ref) from the sampled token alone, in nats.

    With d = logprob - ref_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d|.

    Args:
        logprobs: any shape, floating.
        ref_logprobs: same shape; gets no gradient.
        kind: which estimate. k1 and k3 are unbiased, k3 is never negative.
        input_clamp: c > 0 clamps d to [-c, c] first; verl's k3 has 20.
        output_clamp: c > 0 clamps the estimate to [-c, c]; OpenRLHF and verl's k3 have 10.

    Returns:
        Same shape, float32 (float64 for float64).

    Source: Schulman 2020, "Approximating KL divergence".
    """
    d = widen(logprobs) - widen(ref_logprobs).detach()
    if input_clamp is not None:
        d = d.clamp(-input_clamp, input_clamp)
    if kind == "k1":
        estimate = d
    elif kind == "k2":
        estimate = d.square() / 2
    elif kind == "abs":
        estimate = d.abs()
    else:
        # Past this bound exp overflows; the output clamp would hide the inf but 0 * inf is a NaN gradient.
        floor = None if output_clamp is None else -math.log(torch.finfo(d.dtype).max) + 1
        bounded = d if floor is None else d.clamp(min=floor)
        estimate = torch.expm1(-bounded) + bounded
    return estimate if output_clamp is None else estimate.clamp(-output_clamp, output_clamp)


def last_counted(counted: Tensor) -> Tensor:
    """Index [B] of the last True of each row of `counted` [B, T]; -1 for a row without one."""
    if counted.shape[1] == 0:
        return torch.full((counted.shape[0],), -1, device=counted.device)
    position = torch.arange(1, counted.shape[1] + 1, device=counted.device)
    return (counted * position).amax(dim=1) - 1


def kl_shaped_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.1,
    clip_score: float | None = 5.0,
    kind: KlKind = "k1",
    score_index: Tensor | None = None,
    token_rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r_t = -kl_coef * kl_t + token_reward_t, plus clip(score, -c, c) at the last counted token.

    Args:
        logprobs: [B, T], floating (packed [total] with `cu_seqlens`): policy that sampled.
        ref_logprobs: [B, T]: the frozen reference; gets no gradient.
        scores: [B], one for the whole response.
        mask: [B, T], nonzero = the token counts; holes are allowed.
        kl_coef: weight of the KL estimate, reward per nat.
        clip_score: c > 0, or None for no clip.
        kind: see `kl_estimate`.
        score_index: [B], int64, the slot that is paid the score; None means the last counted token. A slot
            that does not count is not paid.
        token_rewards: [B, T], dense rewards to add, or None.
        cu_seqlens: [B + 1], int, where each sequence starts, or None.

    Returns:
        rewards, shaped as `logprobs`, float32 (float64 for float64). A row without a counted token gets 0.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over the tokens.
    """
    if cu_seqlens is not None:
        rewards = kl_shaped_rewards(
            pad_rows(logprobs, cu_seqlens),
            pad_rows(ref_logprobs, cu_seqlens),
            scores,
            pad_rows(mask, cu_seqlens),
            kl_coef=kl_coef,
            clip_score=clip_score,
            kind=kind,
            score_index=score_index,
            token_rewards=None if token_rewards is None else pad_rows(token_rewards, cu_seqlens),
        )
        return unpad_rows(rewards, cu_seqlens, logprobs.shape[0])
    counted = mask != 0
    kl = kl_estimate(keep(logprobs, counted), keep(ref_logprobs, counted), kind=kind)
    rewards = torch.where(counted, -kl_coef * kl, 0.0)
    if token_rewards is not None:
        rewards = rewards + keep(token_rewards, counted)
    paid_slot = last_counted(counted) if score_index is None else score_index
    paid = counted & (torch.arange(mask.shape[1], device=mask.device) == paid_slot.unsqueeze(1))
    score = widen(scores) if clip_score is None else widen(scores).clamp(-clip_score, clip_score)
    return rewards + torch.where(paid, score.unsqueeze(1), 0.0)


def _next_values(values: Tensor, counted: Tensor, bootstrap: Tensor, rule: MaskRule) -> Tensor:
    """V_{t+1} as slot t sees it, [B, T]: of the next counted slot (carry) or of slot t + 1 (the others)."""
    width = values.shape[1]
    column = torch.arange(width, device=values.device)
    following = torch.cat([values, bootstrap.unsqueeze(1)], dim=1)
    if rule != "carry":
        at_last = column == last_counted(counted).unsqueeze(1)
        shifted = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        return torch.where(at_last, bootstrap.unsqueeze(1), shifted)
    # The smallest counted column at or after t, scanned from the right; width stands for the bootstrap.
    here = torch.where(counted, column, width).flip(1).cummin(dim=1).values.flip(1)
    after = torch.cat([here[:, 1:], torch.full_like(here[:, :1], width)], dim=1)
    return following.gather(1, after)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    mask_rule: MaskRule = "carry",
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation and the returns that the critic learns.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.
    V after the last counted token is `bootstrap`, 0 without one; A after it is 0.

    What a masked slot between two counted ones does (a tool's output, an observation):
        carry: nothing, as if it were cut out: no step of gamma or lam (verl).
        multiply: it is a step with reward 0 and value 0 (OpenRLHF).
        none: the source's rule, where the mask is only the end of the response; what stands under a false
            mask is never read, so on a mask with holes the numbers are those of multiply.

    Args:
        rewards: [B, T], floating (packed [total] with `cu_seqlens`); rewards[:, t] is paid for token t.
        values: [B, T]; values[:, t] is V before token t.
        mask: [B, T], nonzero = the token counts.
        gamma: discount in [0, 1], a float or a tensor [B].
        lam: lambda in [0, 1], a float or a tensor [B].
        mask_rule: carry, multiply or none.
        bootstrap: [B], V after the last counted token, for a response that was cut off, or None.
        cu_seqlens: [B + 1], int, where each sequence starts, or None.

    Returns:
        (advantages, returns), shaped as `rewards`, float32 (float64 for float64), 0 in masked slots.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; the paper's r_t and V(s_t) are ours, its s_{t+1}
    is the state after token t.
    """
    if cu_seqlens is not None:
        padded = gae(
            *(pad_rows(x, cu_seqlens) for x in (rewards, values, mask)),
            gamma=gamma,
            lam=lam,
            mask_rule=mask_rule,
            bootstrap=bootstrap,
        )
        advantages, returns = (unpad_rows(x, cu_seqlens, rewards.shape[0]) for x in padded)
        return advantages, returns
    counted = mask != 0
    r, v = keep(rewards, counted), keep(values, counted)
    discount = _per_row(gamma, r)
    decay = discount * _per_row(lam, r)
    end = v.new_zeros(v.shape[0]) if bootstrap is None else widen(bootstrap)
    delta = r + discount * _next_values(v, counted, end, mask_rule) - v
    if mask_rule == "carry":
        delta = torch.where(counted, delta, 0.0)
        decay = torch.where(counted, decay, 1.0)
    advantages = torch.where(counted, _reverse_scan(delta, decay.expand_as(delta)), 0.0)
    return advantages, torch.where(counted, advantages + v, 0.0)


def _per_row(coefficient: float | Tensor, like: Tensor) -> Tensor:
    """A coefficient as a [B, 1] or [1, 1] tensor of the arithmetic's dtype."""
    return torch.as_tensor(coefficient, dtype=like.dtype, device=like.device).detach().reshape(-1, 1)


def _reverse_scan(delta: Tensor, decay: Tensor) -> Tensor:
    """a_t = delta_t + decay_t a_{t+1} from the right, [B, T]."""
    running = delta.new_zeros(delta.shape[0])
    columns = []
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + decay[:, t] * running
        columns.append(running)
    return torch.stack(columns[::-1], dim=1) if columns else delta


def shaped_gae(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.1,
    clip_score: float | None = 5.0,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    kind: KlKind = "k1",
    mask_rule: MaskRule = "carry",
    bootstrap: Tensor | None = None,
    whiten: bool = True,
    unbiased: bool = False,
    group: "ProcessGroup | None" = None,
    score_index: Tensor | None = None,
    token_rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Experience:
    """From four models' outputs to what PPO learns from: `kl_shaped_rewards`, then `gae`, then whitening.

    The returns are taken before whitening. `kl` is the estimate per token, in nats, not scaled by `kl_coef`.

    Args:
        logprobs, ref_logprobs, scores, mask, kl_coef, clip_score, kind, score_index, token_rewards: as in
            `kl_shaped_rewards`.
        values, gamma, lam, mask_rule, bootstrap: as in `gae`.
        whiten: shift and scale the advantages to mean 0, variance 1 over all counted tokens.
        unbiased: divide that variance by n - 1 instead of n.
        group: whiten by the mean and variance over the tokens of all its ranks.
        cu_seqlens: [B + 1], int: then every [B, T] is packed [total].

    Returns:
        Experience(rewards, advantages, returns, kl), shaped as `logprobs`, float32 (float64 for float64).

    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 2; Schulman et al. 2016 (arXiv 1506.02438), eq. 16;
    whitening as in Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    if cu_seqlens is not None:
        padded = shaped_gae(
            pad_rows(logprobs, cu_seqlens),
            pad_rows(ref_logprobs, cu_seqlens),
            scores,
            pad_rows(values, cu_seqlens),
            pad_rows(mask, cu_seqlens),
            kl_coef=kl_coef,
            clip_score=clip_score,
            gamma=gamma,
            lam=lam,
            kind=kind,
            mask_rule=mask_rule,
            bootstrap=bootstrap,
            whiten=whiten,
            unbiased=unbiased,
            group=group,
            score_index=score_index,
            token_rewards=None if token_rewards is None else pad_rows(token_rewards, cu_seqlens),
        )
        return Experience(*(unpad_rows(x, cu_seqlens, logprobs.shape[0]) for x in padded))
    rewards = kl_shaped_rewards(
        logprobs,
        ref_logprobs,
        scores,
        mask,
        kl_coef=kl_coef,
        clip_score=clip_score,
        kind=kind,
        score_index=score_index,
        token_rewards=token_rewards,
    )
    advantages, returns = gae(
        rewards, values, mask, gamma=gamma, lam=lam, mask_rule=mask_rule, bootstrap=bootstrap
    )
    counted = mask != 0
    kl = kl_estimate(keep(logprobs, counted), keep(ref_logprobs, counted), kind=kind)
    if whiten and group is None:
        advantages = masked_whiten(advantages, mask, unbiased=unbiased)
    elif whiten:
        advantages = _whiten_over(group, advantages, counted, unbiased)
    return Experience(rewards, advantages, returns, kl)


def _whiten_over(group: "ProcessGroup | None", x: Tensor, counted: Tensor, unbiased: bool) -> Tensor:
    """`masked_whiten` by the moments of all ranks: sums about 0 in float64, added up by two all-reduces."""
    kept = torch.where(counted, x.detach().double(), 0.0)
    sums = torch.stack([counted.sum().double(), kept.sum()])
    torch.distributed.all_reduce(sums, group=group)
    n, mean = sums[0], sums[1] / sums[0].clamp(min=1)
    squares = torch.where(counted, kept - mean, 0.0).square().sum()
    torch.distributed.all_reduce(squares, group=group)
    scale = torch.rsqrt(squares / (n - 1 if unbiased else n).clamp(min=1) + WHITEN_EPS)
    return torch.where(counted, (x - mean) * scale, 0.0).to(x.dtype)
