"""Public ops in token space: KL estimates, KL-shaped rewards, GAE, and the three in one.

Column t is response token t: `rewards[:, t]` is paid for it, `values[:, t]` is V before it.
"""

from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from ppo_fast import reference
from ppo_fast.ops import dispatch, fused_estimate, fused_experience
from ppo_fast.ops.checks import Checker, tokens
from ppo_fast.ops.dispatch import Impl
from ppo_fast.records import Experience, KlKind, MaskRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kind: KlKind = "k1",
    input_clamp: float | None = None,
    output_clamp: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Per-token estimate of KL(pi || ref) from the sampled token alone, in nats.

    With d = logprob - ref_logprob: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d, abs = |d|.

    Args:
        logprobs: any shape, floating.
        ref_logprobs: same shape; gets no gradient.
        kind: which estimate. k1 and k3 are unbiased, k3 is never negative.
        input_clamp: c > 0 clamps d to [-c, c] first; verl's k3 has 20.
        output_clamp: c > 0 clamps the estimate to [-c, c]; OpenRLHF and verl's k3 have 10.
        impl: auto, reference, cpu or triton.

    Returns:
        Same shape, float32 (float64 for float64), differentiable in `logprobs`.

    Raises:
        ValueError: wrong shape, device, kind, clamp or `impl`.
        TypeError: wrong dtype.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    check = Checker("kl_estimate", "logprobs", logprobs)
    check.floats(logprobs.shape, "shape of logprobs", ref_logprobs=ref_logprobs)
    check.choice("kind", kind, get_args(KlKind))
    check.optional_number("input_clamp", input_clamp)
    check.optional_number("output_clamp", output_clamp)
    check.finite(None, logprobs=logprobs, ref_logprobs=ref_logprobs)
    runs = dispatch.resolve("kl_estimate", impl, logprobs, ref_logprobs)
    if runs != "reference":
        return fused_estimate.kl_estimate(
            logprobs, ref_logprobs, kind=kind, input_clamp=input_clamp, output_clamp=output_clamp, impl=runs
        )
    return reference.kl_estimate(
        logprobs, ref_logprobs, kind=kind, input_clamp=input_clamp, output_clamp=output_clamp
    )


def _check_rewards(
    op: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor,
    kl_coef: float,
    clip_score: float | None,
    kind: str,
    score_index: Tensor | None,
    token_rewards: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Checker, int]:
    """The arguments that `kl_shaped_rewards` and `shaped_gae` share."""
    check, batch = tokens(op, "logprobs", logprobs, cu_seqlens)
    shape, why = logprobs.shape, "shape of logprobs"
    check.floats(shape, why, ref_logprobs=ref_logprobs)
    check.optional_floats(shape, why, token_rewards=token_rewards)
    check.floats((batch,), "one for each sequence", scores=scores)
    check.mask(mask, shape, why)
    check.number("kl_coef", kl_coef)
    check.optional_number("clip_score", clip_score)
    check.choice("kind", kind, get_args(KlKind))
    check.score_index(score_index, mask, cu_seqlens, batch)
    check.finite(mask, logprobs=logprobs, ref_logprobs=ref_logprobs, token_rewards=token_rewards)
    check.finite(None, scores=scores)
    return check, batch


def _check_scan(
    check: Checker,
    shape: tuple[int, ...],
    batch: int,
    values: Tensor,
    mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask_rule: str,
    bootstrap: Tensor | None,
) -> None:
    """The arguments that `gae` and `shaped_gae` share."""
    check.floats(shape, f"shape of {check.anchor_name}", values=values)
    check.discount("gamma", gamma, batch)
    check.discount("lam", lam, batch)
    check.choice("mask_rule", mask_rule, get_args(MaskRule))
    check.optional_floats((batch,), "one for each sequence", bootstrap=bootstrap)
    check.finite(mask, values=values)
    check.finite(None, bootstrap=bootstrap)


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
    impl: Impl = "auto",
) -> Tensor:
    """r_t = -kl_coef * kl_t + token_reward_t, plus clip(score, -c, c) at the last counted token.

    Args:
        logprobs: [B, T], floating, of the policy that sampled (packed [total] with `cu_seqlens`).
        ref_logprobs: [B, T], of the frozen reference; gets no gradient.
        scores: [B], one for the whole response.
        mask: [B, T], bool or numeric, nonzero = the token counts; holes are allowed.
        kl_coef: weight of the KL estimate, reward per nat.
        clip_score: c > 0, or None for no clip.
        kind: k1, k2, k3 or abs, see `kl_estimate`.
        score_index: [B], int64, the counted slot that is paid the score; None means the last one.
        token_rewards: [B, T], dense rewards to add, or None.
        cu_seqlens: [B + 1], int, where each sequence starts in packed tensors, or None.
        impl: auto, reference, cpu, triton or cuda.

    Returns:
        rewards, shaped as `logprobs`, float32 (float64 for float64), 0 in masked slots; a row without a
        counted token gets nothing. Differentiable in `logprobs`, `scores`, `token_rewards`.

    Raises:
        ValueError: wrong shape, device, name or coefficient; on the CPU also a `score_index` at a slot that
            does not count (on a GPU that score is not paid unless `check_inputs(True)`).
        TypeError: wrong dtype.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over the tokens.
    """
    _check_rewards(
        "kl_shaped_rewards",
        logprobs,
        ref_logprobs,
        scores,
        mask,
        kl_coef,
        clip_score,
        kind,
        score_index,
        token_rewards,
        cu_seqlens,
    )
    runs = dispatch.resolve("kl_shaped_rewards", impl, logprobs, ref_logprobs, scores, token_rewards)
    options: dict[str, Any] = {
        "kl_coef": kl_coef,
        "clip_score": clip_score,
        "kind": kind,
        "score_index": score_index,
        "token_rewards": token_rewards,
        "cu_seqlens": cu_seqlens,
    }
    if runs != "reference":
        return fused_experience.kl_shaped_rewards(logprobs, ref_logprobs, scores, mask, impl=runs, **options)
    return reference.kl_shaped_rewards(logprobs, ref_logprobs, scores, mask, **options)


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
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, and the returns that the critic learns.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.
    V after the last counted token is `bootstrap`, 0 without one; A after it is 0.

    Args:
        rewards: [B, T], floating (packed [total] with `cu_seqlens`); rewards[:, t] is paid for token t.
        values: [B, T]; values[:, t] is V before token t.
        mask: [B, T], bool or numeric, nonzero = the token counts.
        gamma: discount in [0, 1], a float or a tensor [B].
        lam: lambda in [0, 1], a float or a tensor [B].
        mask_rule: what a masked slot between two counted ones does. carry: nothing, as if it were cut out
            (verl). multiply: it is a step with reward 0 and value 0 (OpenRLHF). none: the source's rule,
            where the mask only ends the response; since what stands under a false mask is never read, on a
            mask with holes it gives multiply's numbers. On a mask without holes all three agree.
        bootstrap: [B], V after the last counted token, for a response that was cut off, or None.
        cu_seqlens: [B + 1], int, where each sequence starts in packed tensors, or None.
        impl: auto, reference, cpu, triton or cuda.

    Returns:
        (advantages, returns), shaped as `rewards`, float32 (float64 for float64), 0 in masked slots.
        Differentiable in `rewards`, `values`, `bootstrap`.

    Raises:
        ValueError: wrong shape, device, name, or a coefficient outside [0, 1].
        TypeError: wrong dtype.

    Source: Schulman et al. 2016 (arXiv 1506.02438), eq. 16; its s_{t+1} is our state after token t.
    """
    check, batch = tokens("gae", "rewards", rewards, cu_seqlens)
    check.mask(mask, rewards.shape, "shape of rewards")
    _check_scan(check, rewards.shape, batch, values, mask, gamma, lam, mask_rule, bootstrap)
    check.finite(mask, rewards=rewards)
    runs = dispatch.resolve("gae", impl, rewards, values, bootstrap)
    options: dict[str, Any] = {
        "gamma": gamma,
        "lam": lam,
        "mask_rule": mask_rule,
        "bootstrap": bootstrap,
        "cu_seqlens": cu_seqlens,
    }
    if runs != "reference":
        return fused_experience.gae(rewards, values, mask, impl=runs, **options)
    return reference.gae(rewards, values, mask, **options)


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
    impl: Impl = "auto",
) -> Experience:
    """From four models' outputs to what PPO learns from: KL-shaped rewards, GAE, whitened advantages.

    Equivalent to `kl_shaped_rewards`, `gae`, `masked_whiten` of the advantages; returns are not whitened.

    Args:
        logprobs, ref_logprobs, scores, mask, kl_coef, clip_score, kind, score_index, token_rewards: as in
            `kl_shaped_rewards`.
        values, gamma, lam, mask_rule, bootstrap: as in `gae`.
        whiten: shift and scale the advantages to mean 0, variance 1 over all counted tokens.
        unbiased: divide that variance by n - 1 instead of n.
        group: a process group whose ranks whiten by the mean and variance of all their tokens, at the price of
            one all-reduce; every rank must call, with whatever batch it has. None: this batch alone.
        cu_seqlens: [B + 1], int: then every [B, T] is packed [total]; or None.
        impl: auto, reference, cpu, triton or cuda.

    Returns:
        Experience(rewards, advantages, returns, kl), shaped as `logprobs`, float32 (float64 for float64), 0
        in masked slots; kl is the estimate per token in nats, not scaled by `kl_coef`. The four may be views of
        one block of memory: clone one to keep, store or change it alone.

    Raises:
        ValueError, TypeError: as `kl_shaped_rewards` and `gae`.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), eq. 2; Schulman et al. 2016 (arXiv 1506.02438), eq. 16;
    whitening as in Huang et al. 2024 (arXiv 2403.17031), section 3.
    """
    check, batch = _check_rewards(
        "shaped_gae",
        logprobs,
        ref_logprobs,
        scores,
        mask,
        kl_coef,
        clip_score,
        kind,
        score_index,
        token_rewards,
        cu_seqlens,
    )
    _check_scan(check, logprobs.shape, batch, values, mask, gamma, lam, mask_rule, bootstrap)
    check.flag("whiten", whiten)
    check.flag("unbiased", unbiased)
    check.group(group)
    runs = dispatch.resolve(
        "shaped_gae", impl, logprobs, ref_logprobs, scores, values, token_rewards, bootstrap
    )
    options: dict[str, Any] = {
        "kl_coef": kl_coef,
        "clip_score": clip_score,
        "gamma": gamma,
        "lam": lam,
        "kind": kind,
        "mask_rule": mask_rule,
        "bootstrap": bootstrap,
        "whiten": whiten,
        "unbiased": unbiased,
        "group": group,
        "score_index": score_index,
        "token_rewards": token_rewards,
        "cu_seqlens": cu_seqlens,
    }
    if runs != "reference":
        return fused_experience.shaped_gae(logprobs, ref_logprobs, scores, values, mask, impl=runs, **options)
    return reference.shaped_gae(logprobs, ref_logprobs, scores, values, mask, **options)
