"""The experience stage: KL-shaped rewards, GAE and the whitening of its advantages, one program a sequence.

A sequence is read once, in tiles from its end to its start. A tile's recurrence A_t = delta_t + decay_t A_{t+1} is an
associative scan over (decay, delta); between tiles A and the value of the next counted token are carried. Tiles are
counted from the sequence's first slot, whatever its padding, so that packed and padded input give the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import TOKEN_OPTIONS, on_device_of
from ppo_fast.kernels.moments import MOST_CHUNKS, OPTIONS, WHITEN_EPS
from ppo_fast.kernels.partial_moments import PARTIALS, add_tile, degrees_of_freedom, merged
from ppo_fast.kernels.sequences import SEQUENCE_SIZES, sequence_bounds
from ppo_fast.kernels.surrogate import COEFFICIENTS, expm1_less_x, held_log_ratio
from torch import Tensor

# More warps than a token kernel of its own: on gfx942 the masks of four elements a thread spilled scalar registers.
SCAN_OPTIONS: dict[str, int | bool] = {**TOKEN_OPTIONS, "num_warps": 8}
KINDS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}


@triton.jit
def kl_of_kind(d, KIND: tl.constexpr):
    """The estimate of KL(pi || ref) from d = logprob - ref_logprob."""
    if KIND == 0:
        return d
    elif KIND == 1:
        return 0.5 * d * d
    elif KIND == 2:
        return expm1_less_x(-d)
    else:
        return tl.abs(d)


@triton.jit
def after(decay, delta, left_decay, left_delta):
    """Compose two steps of A -> delta + decay A; the left one, earlier in time, is taken last."""
    return left_decay * decay, left_delta + left_decay * delta


@triton.jit
def nearest(has, value, left_has, left_value):
    """The value of the left slot if it has one, else what came from its right."""
    return tl.maximum(has, left_has), tl.where(left_has > 0.0, left_value, value)


@triton.jit
def row_start(ptr, sequence, first, stride, cu_seqlens_ptr):
    """The first slot of `sequence` (int64): `stride` apart, or one after the other where packed."""
    if cu_seqlens_ptr is not None:
        return ptr + first
    else:
        return ptr + sequence * stride


@triton.jit
def own_or_common(own_ptr, sequence, common_ptr):
    """The number of this sequence, or the one for all of them."""
    if own_ptr is not None:
        return tl.load(own_ptr + sequence)
    else:
        return tl.load(common_ptr)


@triton.jit
def next_values(row, mask_row, t, size, counted, last, bootstrap, carried, CARRY: tl.constexpr):
    """V_{t+1} as slot t sees it: of the next counted slot (carry) or of slot t + 1; `bootstrap` at the last one."""
    following = (t + 1 < size) & (tl.load(mask_row + t + 1, mask=t + 1 < size, other=0) != 0)
    value = tl.load(row + t + 1, mask=t + 1 < size, other=0.0).to(tl.float32)
    value = tl.where(following, value, 0.0)
    if CARRY:
        before_hole = tl.where(counted, tl.where(following, 0, tl.where(t == last, 0, 1)), 0)
        if tl.max(before_hole, axis=0) > 0:  # a second scan, for the tiles that need it
            has, filled = tl.associative_scan((following.to(tl.float32), value), 0, nearest, reverse=True)
            value = tl.where(has > 0.0, filled, carried)
    return tl.where(t == last, bootstrap, value)


@triton.jit(do_not_specialize=SEQUENCE_SIZES)
def experience_kernel(
    logprobs_ptr,
    ref_logprobs_ptr,
    token_rewards_ptr,
    values_ptr,
    mask_ptr,
    scores_ptr,
    score_index_ptr,
    bootstrap_ptr,
    gamma_ptr,
    lam_ptr,
    coefficients_ptr,
    cu_seqlens_ptr,
    rewards_ptr,
    kl_ptr,
    advantages_ptr,
    returns_ptr,
    partials_ptr,
    sequences,
    tokens,
    logprobs_stride,
    ref_logprobs_stride,
    token_rewards_stride,
    values_stride,
    mask_stride,
    KIND: tl.constexpr,
    CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write rewards, KL, advantages, returns of one sequence, and the moments of its advantages.

    r_t = -kl_coef kl_t + token_reward_t, plus the clipped score at the slot that is paid. Without log-probabilities
    or scores their terms are left out, without values the recurrence is.
    """
    sequence = tl.program_id(0).to(tl.int64)
    first, size = sequence_bounds(sequence, tokens, cu_seqlens_ptr)
    mask_row = row_start(mask_ptr, sequence, first, mask_stride, cu_seqlens_ptr)
    gamma = own_or_common(gamma_ptr, sequence, coefficients_ptr + 2)
    lam = own_or_common(lam_ptr, sequence, coefficients_ptr + 3)
    bootstrap = own_or_common(bootstrap_ptr, sequence, coefficients_ptr + 4)

    size = size.to(tl.int32)  # a slot within its sequence; where the sequence lies is int64
    last = tl.full((), -1, tl.int32)  # the last counted slot, once it has been met
    carried = bootstrap  # the value of the nearest counted slot to the right of the tile
    advantage = tl.full((), 0.0, tl.float32)  # of the slot to the right of the tile
    n = tl.zeros((1,), tl.float32)
    pivot = tl.zeros((1,), tl.float32)
    total = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    tiles = tl.cdiv(size, BLOCK)
    for done in range(0, tiles):
        start = (tiles - 1 - done) * BLOCK
        t = start + tl.arange(0, BLOCK)
        inside = t < size
        counted = tl.load(mask_row + t, mask=inside, other=0) != 0
        last = tl.where(last < 0, tl.max(tl.where(counted, t, -1), axis=0), last)

        r = tl.zeros((BLOCK,), tl.float32)
        if logprobs_ptr is not None:
            logprobs = row_start(logprobs_ptr, sequence, first, logprobs_stride, cu_seqlens_ptr)
            ref_logprobs = row_start(ref_logprobs_ptr, sequence, first, ref_logprobs_stride, cu_seqlens_ptr)
            d = tl.load(logprobs + t, mask=inside, other=0.0).to(tl.float32)
            d -= tl.load(ref_logprobs + t, mask=inside, other=0.0).to(tl.float32)
            kl = kl_of_kind(tl.where(counted, d, 0.0), KIND)
            if kl_ptr is not None:
                tl.store(kl_ptr + first + t, kl, mask=inside)
            r = tl.where(counted, -tl.load(coefficients_ptr) * kl, 0.0)
        if token_rewards_ptr is not None:
            dense = row_start(token_rewards_ptr, sequence, first, token_rewards_stride, cu_seqlens_ptr)
            r += tl.where(counted, tl.load(dense + t, mask=inside, other=0.0).to(tl.float32), 0.0)
        if scores_ptr is not None:
            paid = last
            if score_index_ptr is not None:
                paid = tl.load(score_index_ptr + sequence)
            score = held_log_ratio(tl.load(scores_ptr + sequence), tl.load(coefficients_ptr + 1))
            r += tl.where(counted, tl.where(t == paid, score, 0.0), 0.0)
        if rewards_ptr is not None:
            tl.store(rewards_ptr + first + t, r, mask=inside)

        if values_ptr is not None:
            row = row_start(values_ptr, sequence, first, values_stride, cu_seqlens_ptr)
            v = tl.where(counted, tl.load(row + t, mask=inside, other=0.0).to(tl.float32), 0.0)
            following = next_values(row, mask_row, t, size, counted, last, bootstrap, carried, CARRY)
            takes_part = counted if CARRY else t <= last
            delta = tl.where(takes_part, r + (gamma * following - v), 0.0)
            decay = tl.where(takes_part, gamma * lam, 1.0)
            decay, delta = tl.associative_scan((decay, delta), 0, after, reverse=True)
            a = delta + decay * advantage
            advantage = tl.sum(tl.where(t == start, a, 0.0), axis=0)
            nearest_counted = tl.min(tl.where(counted, t, size), axis=0)
            value_there = tl.sum(tl.where(t == nearest_counted, v, 0.0), axis=0)
            carried = tl.where(nearest_counted < size, value_there, carried)
            a = tl.where(counted, a, 0.0)
            tl.store(advantages_ptr + first + t, a, mask=inside)
            tl.store(returns_ptr + first + t, tl.where(counted, a + v, 0.0), mask=inside)
            if partials_ptr is not None:
                n, pivot, total, squares = add_tile(n, pivot, total, squares, a[:, None], counted[:, None])

    if partials_ptr is not None:
        out = partials_ptr + sequence + tl.arange(0, 1)
        tl.store(out, n)
        tl.store(out + sequences, pivot)
        tl.store(out + 2 * sequences, total / tl.maximum(n, 1.0))
        tl.store(out + 3 * sequences, squares)


@triton.jit
def load_parts(partials_ptr, first, last, plane, PARTS: tl.constexpr):
    """Count, pivot, mean less the pivot, M2 of the parts in [first, last), as columns [PARTS, 1]."""
    parts = (first + tl.arange(0, PARTS))[:, None]
    at = partials_ptr + parts
    n = tl.load(at, mask=parts < last, other=0.0)
    pivot = tl.load(at + plane, mask=parts < last, other=0.0)
    shift = tl.load(at + 2 * plane, mask=parts < last, other=0.0)
    return n, pivot, shift, tl.load(at + 3 * plane, mask=parts < last, other=0.0)


@triton.jit
def group_parts_kernel(partials_ptr, grouped_ptr, parts, groups, PARTS: tl.constexpr):
    """Merge PARTS neighbouring parts into one."""
    group = tl.program_id(0).to(tl.int64)
    n, pivot, shift, squares = load_parts(partials_ptr, group * PARTS, parts, parts, PARTS)
    count, mean, rest, squares = merged(n, pivot, shift, squares)
    out = grouped_ptr + group + tl.arange(0, 1)
    tl.store(out, count)
    tl.store(out + groups, mean)
    tl.store(out + 2 * groups, rest)
    tl.store(out + 3 * groups, squares)


@triton.jit
def whiten_kernel(
    x_ptr, mask_ptr, partials_ptr, size, parts, bessel, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """x <- (x - mean) / sqrt(var + 1e-8) where the mask counts, 0 elsewhere, by the moments of all parts."""
    n, pivot, shift, squares = load_parts(partials_ptr, 0, parts, parts, PARTS)
    count, mean, rest, squares = merged(n, pivot, shift, squares)
    scale = tl.rsqrt(squares / degrees_of_freedom(count, bessel) + WHITEN_EPS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counted = tl.load(mask_ptr + at, mask=at < size, other=0) != 0
    x = tl.load(x_ptr + at, mask=at < size, other=0.0)
    tl.store(x_ptr + at, tl.where(counted, ((x - mean) - rest) * scale, 0.0), mask=at < size)


@dataclass(frozen=True)
class ExperienceInputs:
    """What one launch reads. Token tensors are [B, T] with contiguous rows on any stride, or packed [total]."""

    mask: Tensor  # bool or numeric, nonzero = counts
    coefficients: (
        Tensor  # float32 [7]: kl_coef, clip of the score (inf for none), gamma, lam, bootstrap; two not read
    )
    logprobs: Tensor | None  # float32, bfloat16 or float16, as all floats of tokens
    ref_logprobs: Tensor | None
    token_rewards: Tensor | None
    values: Tensor | None
    scores: Tensor | None  # float32 [B]
    score_index: Tensor | None  # int64 [B]
    bootstrap: Tensor | None  # float32 [B]
    gamma: Tensor | None  # float32 [B], in place of the coefficient
    lam: Tensor | None  # float32 [B], in place of the coefficient
    cu_seqlens: Tensor | None  # int32 or int64 [B + 1]


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.dim() == 1 else tensor.stride(0)


def _assert_layout(x: ExperienceInputs, sequences: int) -> None:
    for name in ("logprobs", "ref_logprobs", "token_rewards", "values", "mask"):
        tensor = getattr(x, name)
        if tensor is not None:
            assert tensor.shape == x.mask.shape, f"{name} has shape {tuple(tensor.shape)}"
            assert tensor.shape[-1] <= 1 or tensor.stride(-1) == 1, f"{name} has strides {tensor.stride()}"
    for name in ("scores", "score_index", "bootstrap", "gamma", "lam"):
        tensor = getattr(x, name)
        if tensor is not None:
            assert tensor.shape == (sequences,), f"{name} has shape {tuple(tensor.shape)}"
            assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"
    assert x.coefficients.shape == (COEFFICIENTS,), f"coefficients have shape {tuple(x.coefficients.shape)}"


def experience_forward(
    x: ExperienceInputs, *, kind: str, mask_rule: str, moments: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the token tensors as [k, *shape of the mask] and partial moments [4, B], float32; one launch.

    The token tensors are rewards if there are scores, kl if there are values too, and with values advantages, returns.
    """
    sequences = x.mask.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    _assert_layout(x, sequences)
    shaped, scanned = x.scores is not None, x.values is not None
    wanted = (shaped, shaped and scanned, scanned, scanned)
    out = torch.empty((sum(wanted), *x.mask.shape), dtype=torch.float32, device=x.mask.device)
    tokens = iter(out)
    rewards, kl, advantages, returns = (next(tokens) if want else None for want in wanted)
    partials = torch.empty((PARTIALS, sequences), dtype=torch.float32, device=x.mask.device)
    if x.mask.numel() == 0:
        return out, partials.zero_() if moments else None
    with on_device_of(x.mask):
        experience_kernel[(sequences,)](
            logprobs_ptr=x.logprobs,
            ref_logprobs_ptr=x.ref_logprobs,
            token_rewards_ptr=x.token_rewards,
            values_ptr=x.values,
            mask_ptr=x.mask,
            scores_ptr=x.scores,
            score_index_ptr=x.score_index,
            bootstrap_ptr=x.bootstrap,
            gamma_ptr=x.gamma,
            lam_ptr=x.lam,
            coefficients_ptr=x.coefficients,
            cu_seqlens_ptr=x.cu_seqlens,
            rewards_ptr=rewards,
            kl_ptr=kl,
            advantages_ptr=advantages,
            returns_ptr=returns,
            partials_ptr=partials if moments else None,
            sequences=sequences,
            tokens=x.mask.shape[-1],
            logprobs_stride=_row_stride(x.logprobs),
            ref_logprobs_stride=_row_stride(x.ref_logprobs),
            token_rewards_stride=_row_stride(x.token_rewards),
            values_stride=_row_stride(x.values),
            mask_stride=_row_stride(x.mask),
            KIND=KINDS[kind],
            CARRY=mask_rule == "carry",
            **SCAN_OPTIONS,
        )
    return out, partials if moments else None


def group_parts(partials: Tensor, most: int) -> Tensor:
    """Merge partial moments [4, parts] until at most `most` parts are left; a launch for each factor of 1024.

    Of no parts at all it makes one, of which nothing counts.
    """
    if partials.shape[1] == 0:
        return torch.zeros((PARTIALS, 1), dtype=torch.float32, device=partials.device)
    while partials.shape[1] > most:
        parts = partials.shape[1]
        size = min(triton.next_power_of_2(triton.cdiv(parts, most)), MOST_CHUNKS)
        groups = triton.cdiv(parts, size)
        grouped = torch.empty((PARTIALS, groups), dtype=torch.float32, device=partials.device)
        with on_device_of(partials):
            group_parts_kernel[(groups,)](
                partials_ptr=partials,
                grouped_ptr=grouped,
                parts=parts,
                groups=groups,
                PARTS=size,
                **OPTIONS,
            )
        partials = grouped
    return partials


def whiten_by_parts(x: Tensor, mask: Tensor, partials: Tensor, *, unbiased: bool) -> None:
    """Whiten `x`, float32, in place by partial moments [4, parts]; one launch for up to 1024 parts."""
    assert x.is_contiguous(), f"x has strides {x.stride()}"
    assert mask.is_contiguous(), f"mask has strides {mask.stride()}"
    if x.numel() == 0:
        return
    partials = group_parts(partials, MOST_CHUNKS)
    with on_device_of(x):
        whiten_kernel[(triton.cdiv(x.numel(), TOKEN_OPTIONS["BLOCK"]),)](
            x_ptr=x,
            mask_ptr=mask,
            partials_ptr=partials,
            size=x.numel(),
            parts=partials.shape[1],
            bessel=int(unbiased),
            PARTS=triton.next_power_of_2(partials.shape[1]),
            **TOKEN_OPTIONS,
        )
