"""The experience stage as `torch.library` operators: one sweep, and one to whiten, in C++, Triton or CUDA."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops import experience_gradient
from ppo_fast.ops import moments as masked_moments
from ppo_fast.ops.backends import comparable, large_empty
from ppo_fast.ops.fused_estimate import (
    COMPUTE,
    KINDS,
    address,
    as_bytes,
    contiguous_rows,
    packed,
    per_sequence,
    token_rows,
    widest,
)
from ppo_fast.records import Experience

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OUTPUTS = ("rewards", "kl", "advantages", "returns")
CONSTANTS = ("gamma", "lam", "ref_logprobs")
WHITEN = {"biased": 1, "unbiased": 2}  # codes of csrc/cpu/experience.h
MOMENTS = {"cpu": 3, "triton": 4, "cuda": 4}  # numbers of a part: in rows of float64, or in planes of float32


def shaped_gae(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    whiten: bool,
    unbiased: bool,
    group: "ProcessGroup | None",
    impl: str,
    **options: Any,
) -> Experience:
    """Run `ppo_fast.shaped_gae` on `impl`."""
    learns = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (logprobs, scores, values, *options.values())
    )
    if learns and whiten and group is not None:
        raise ValueError("shaped_gae: whitening over `group` has no gradient; detach the inputs")
    whitening = "none"
    if whiten and not learns:
        whitening = "parts" if group is not None else "unbiased" if unbiased else "biased"
    (rewards, kl, advantages, returns), parts = _run(
        impl,
        mask,
        whitening=whitening,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        scores=scores,
        values=values,
        **options,
    )
    if whiten and group is not None:
        whiten_by_parts(advantages, mask, _pooled(parts, group, impl), unbiased, impl)
    elif whiten and learns:
        advantages = masked_moments.masked_whiten(advantages, mask, unbiased=unbiased)
    return Experience(rewards, advantages, returns, kl)


def kl_shaped_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, *, impl: str, **options: Any
) -> Tensor:
    """Run `ppo_fast.kl_shaped_rewards` on `impl`."""
    return _run(impl, mask, logprobs=logprobs, ref_logprobs=ref_logprobs, scores=scores, **options)[0][0]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, impl: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Run `ppo_fast.gae` on `impl`: what is paid for a token comes in as its dense reward."""
    (advantages, returns), _ = _run(impl, mask, token_rewards=rewards, values=values, **options)
    return advantages, returns


def _run(
    impl: str,
    mask: Tensor,
    *,
    whitening: str = "none",
    kl_coef: float = 0.0,
    clip_score: float | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    kind: str = "k1",
    mask_rule: str = "carry",
    cu_seqlens: Tensor | None = None,
    **tensors: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Run the operator with what is given: its token tensors one by one, and the moments."""
    numbers = (
        kl_coef,
        math.inf if clip_score is None else clip_score,
        *(1.0 if isinstance(x, Tensor) else x for x in (gamma, lam)),
    )
    own = {name: x for name, x in (("gamma", gamma), ("lam", lam)) if isinstance(x, Tensor)}
    tokens, parts = experience(
        mask,
        packed(numbers, mask.device, impl),
        cu_seqlens=cu_seqlens,
        kind=kind,
        mask_rule=mask_rule,
        whitening=whitening,
        impl=impl,
        **{
            name: x.detach() if name in CONSTANTS else x
            for name, x in (own | tensors).items()
            if x is not None
        },
    )
    return tokens.unbind(), parts


def _wanted(scores: Tensor | None, values: Tensor | None) -> tuple[bool, ...]:
    """Which of rewards, kl, advantages and returns these inputs give."""
    shaped, scanned = scores is not None, values is not None
    return shaped, shaped and scanned, scanned, scanned


@torch.library.custom_op("ppo_fast::experience", mutates_args=())
def experience(
    mask: Tensor,
    coefficients: Tensor,
    kind: str,
    mask_rule: str,
    whitening: str,
    impl: str,
    cu_seqlens: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_rewards: Tensor | None = None,
    values: Tensor | None = None,
    scores: Tensor | None = None,
    score_index: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: Tensor | None = None,
    lam: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rewards, kl, advantages and returns, those of them that are wanted, in one tensor; moments of each sequence.

    `whitening` of the advantages: none, by their biased or unbiased variance, or parts: left as they are, and their
    moments returned, to be pooled with those of other ranks.

    One tensor, since the allocator of the CPU gives one large block back to the next call, but not four smaller ones.
    """
    dtype = widest(logprobs, ref_logprobs, token_rewards, values, scores, bootstrap)
    token_tensors = {
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "token_rewards": token_rewards,
        "values": values,
    }
    numbers = {"scores": scores, "bootstrap": bootstrap, "gamma": gamma, "lam": lam}
    tokens = {name: None if x is None else contiguous_rows(x) for name, x in token_tensors.items()}
    per_row = {name: per_sequence(x, dtype) for name, x in numbers.items()}
    per_row["score_index"] = None if score_index is None else score_index.contiguous()
    if impl == "cpu":
        return _cpu_experience(
            contiguous_rows(mask),
            tokens,
            per_row,
            coefficients,
            cu_seqlens,
            dtype,
            kind,
            mask_rule,
            whitening,
        )
    moments = whitening != "none"
    if impl == "cuda":
        from ppo_fast.ops import native_cuda

        wanted = dict(zip(OUTPUTS, _wanted(scores, values), strict=True))
        out, parts = native_cuda.experience_forward(
            contiguous_rows(mask), tokens, per_row, coefficients, cu_seqlens,
            wanted=wanted, kind=kind, mask_rule=mask_rule, moments=moments,
        )  # fmt: skip
    else:
        out, parts = _triton_experience(
            contiguous_rows(comparable(mask)),
            tokens,
            per_row,
            coefficients,
            cu_seqlens,
            kind,
            mask_rule,
            moments,
        )
    if parts is not None and whitening == "parts":
        return out, parts
    if parts is not None:
        _whiten(out[-2], mask, parts, whitening == "unbiased", impl)
    return out, coefficients.new_empty(0)


@experience.register_fake
def _(
    mask: Tensor,
    coefficients: Tensor,
    kind: str,
    mask_rule: str,
    whitening: str,
    impl: str,
    cu_seqlens: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    token_rewards: Tensor | None = None,
    values: Tensor | None = None,
    scores: Tensor | None = None,
    score_index: Tensor | None = None,
    bootstrap: Tensor | None = None,
    gamma: Tensor | None = None,
    lam: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = widest(logprobs, ref_logprobs, token_rewards, values, scores, bootstrap)
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    parts = (sequences, MOMENTS[impl]) if impl == "cpu" else (MOMENTS[impl], sequences)
    tokens = mask.new_empty((sum(_wanted(scores, values)), *mask.shape), dtype=dtype)
    return tokens, coefficients.new_empty(parts if whitening == "parts" else (0,))


def _triton_experience(
    mask: Tensor,
    tokens: dict[str, Tensor | None],
    per_row: dict[str, Tensor | None],
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    kind: str,
    mask_rule: str,
    moments: bool,
) -> tuple[Tensor, Tensor | None]:
    from ppo_fast.kernels import experience as kernels

    inputs = kernels.ExperienceInputs(
        mask=mask,
        coefficients=coefficients,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        **tokens,
        **per_row,
    )
    return kernels.experience_forward(inputs, kind=kind, mask_rule=mask_rule, moments=moments)


def _whiten(x: Tensor, mask: Tensor, parts: Tensor, unbiased: bool, impl: str) -> None:
    """Whiten `x` in place on a GPU."""
    if impl == "cuda":
        from ppo_fast.ops import native_cuda

        native_cuda.whiten_by_parts(x, mask, parts, unbiased=unbiased)
        return
    from ppo_fast.kernels import experience as kernels

    kernels.whiten_by_parts(x, comparable(mask).contiguous(), parts, unbiased=unbiased)


def _cpu_experience(
    mask: Tensor,
    tokens: dict[str, Tensor | None],
    per_row: dict[str, Tensor | None],
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    dtype: torch.dtype,
    kind: str,
    mask_rule: str,
    whitening: str,
) -> tuple[Tensor, Tensor]:
    starts = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    sequences = mask.shape[0] if starts is None else len(starts) - 1
    counted = as_bytes(mask)
    kl_coef, clip_score, all_gamma, all_lam, *_ = coefficients.tolist()
    native = build.extension()
    inputs = native.ExperienceIn(
        sequences=sequences,
        tokens=mask.shape[-1],
        cu_seqlens=address(starts),
        compute=COMPUTE[dtype],
        mask=token_rows(counted),
        **{name: token_rows(x) for name, x in tokens.items()},
        **{name: address(x) for name, x in per_row.items()},
        kl_coef=kl_coef,
        clip_score=clip_score,
        all_gamma=all_gamma,
        all_lam=all_lam,
        kind=KINDS.index(kind),
        carry=mask_rule == "carry",
    )
    wanted = _wanted(per_row["scores"], tokens["values"])
    out = large_empty((sum(wanted), *mask.shape), dtype)
    addresses = iter([x.data_ptr() for x in out])
    parts = torch.empty((sequences, MOMENTS["cpu"]) if whitening == "parts" else (0,), dtype=torch.float64)
    native.experience_forward(
        inputs,
        **{name: next(addresses) if want else 0 for name, want in zip(OUTPUTS, wanted, strict=True)},
        moments=parts.data_ptr(),
        whiten=WHITEN.get(whitening, 0),
        threads=torch.get_num_threads(),
        isa=build.selected_isa(),
    )
    return out, parts


@torch.library.custom_op("ppo_fast::whiten_by_parts", mutates_args=("x",))
def whiten_by_parts(x: Tensor, mask: Tensor, parts: Tensor, unbiased: bool, impl: str) -> None:
    """Whiten `x` in place, float32 or float64, contiguous, by the moments of all its parts; 0 where masked."""
    if impl == "cpu":
        counted = as_bytes(mask).contiguous()
        build.extension().whiten_by_parts(
            x=x.data_ptr(),
            mask=counted.data_ptr(),
            size=x.numel(),
            compute=COMPUTE[x.dtype],
            parts=parts.data_ptr(),
            count=parts.shape[0],
            unbiased=unbiased,
            threads=torch.get_num_threads(),
            isa=build.selected_isa(),
        )
        return
    _whiten(x, mask, parts, unbiased, impl)


@torch.library.custom_op("ppo_fast::merge_parts", mutates_args=())
def merge_parts(parts: Tensor, impl: str) -> Tensor:
    """The moments of all parts as those of one."""
    if impl == "cpu":
        whole = torch.empty((1, MOMENTS[impl]), dtype=torch.float64)
        build.extension().merge_parts(parts=parts.data_ptr(), count=parts.shape[0], whole=whole.data_ptr())
        return whole
    if impl == "cuda":
        from ppo_fast.ops import native_cuda

        merged = native_cuda.group_parts(parts, 1)
    else:
        from ppo_fast.kernels import experience as kernels

        merged = kernels.group_parts(parts, 1)
    return merged.clone() if merged is parts else merged


@merge_parts.register_fake
def _(parts: Tensor, impl: str) -> Tensor:
    return parts.new_empty((1, MOMENTS[impl]) if impl == "cpu" else (MOMENTS[impl], 1))


def _pooled(parts: Tensor, group: "ProcessGroup", impl: str) -> Tensor:
    """The moments of every rank, one part each, by one all-reduce of a table in which each rank fills its own place."""
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    whole = merge_parts(parts, impl)
    table = whole.new_zeros((ranks, *whole.shape))
    table[rank] = whole
    torch.distributed.all_reduce(table, group=group)
    return table.flatten(0, 1) if impl == "cpu" else table.squeeze(2).T.contiguous()


experience.register_autograd(
    experience_gradient.backward, setup_context=experience_gradient.save_for_backward
)
