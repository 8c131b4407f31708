"""Launches of the CUDA C++ kernels of csrc/cuda, on torch's current stream of the tensors' device."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ppo_fast import build
from ppo_fast.ops.fused_estimate import KINDS, address, as_bytes, token_rows

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # codes of csrc/cuda/policy_rows.h
ROW_STATE = 7
PARTIALS = 4
MOST_PARTS = 1024  # that every block of a whitening merges anew; more of them are merged before

Grid = tuple[int, int, int]


@contextlib.contextmanager
def _launching_on(tensor: Tensor) -> Iterator[dict[str, int]]:
    """Make the tensor's device current; gives the number of it and of torch's stream there."""
    with torch.cuda.device(tensor.device):
        index = torch.cuda.current_device()
        yield {"device": index, "stream": torch.cuda.current_stream(index).cuda_stream}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def policy_rows(
    logits: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    temperature: Tensor,
    ref_logits: Tensor | None,
    coefficients: Tensor,
    *,
    grid: Grid,
    ref_grid: Grid,
    inplace: bool,
    cluster: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Float32 logprobs, entropy, no KL, and the state [N, 7] or, `inplace`, the gradient over the logits.

    As `ppo_fast.kernels.policy_loss.policy_rows`. The logits are read once where the device has clusters, of `cluster`
    blocks a row: 0 for what is thought best, or 1, 2, 4, 8, for a measurement.

    Raises:
        ValueError: with reference logits, or where a row does not fit the shared memory of its blocks.
    """
    if ref_logits is not None:
        raise ValueError("impl='cuda' takes no ref_logits: the exact KL is in the triton implementation")
    assert logits.stride(-1) == 1 or logits.shape[-1] == 1, "rows of logits are not contiguous"
    for name, x in (("labels", labels), ("weights", weights), ("temperature", temperature)):
        assert x.is_contiguous(), f"{name} has strides {x.stride()}"
    device = logits.device
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=device)
    entropy = torch.empty(labels.shape, dtype=torch.float32, device=device)
    state = None if inplace else torch.empty((labels.numel(), ROW_STATE), dtype=torch.float32, device=device)
    old_logprobs, advantages = _float32(old_logprobs), _float32(advantages)
    with _launching_on(logits) as place:
        build.extension().cuda_policy_rows(
            logits=logits.data_ptr(),
            grad_logits=logits.data_ptr() if inplace else 0,
            dtype=DTYPES[logits.dtype],
            rows=labels.numel(),
            vocab=logits.shape[-1],
            inner_rows=grid[0],
            outer_stride=grid[1],
            inner_stride=grid[2],
            labels=labels.data_ptr(),
            old_logprobs=old_logprobs.data_ptr(),
            advantages=advantages.data_ptr(),
            weights=weights.data_ptr(),
            temperature=temperature.data_ptr(),
            temperature_stride=min(1, temperature.dim()),
            coefficients=coefficients.data_ptr(),
            logprobs=logprobs.data_ptr(),
            entropy=entropy.data_ptr(),
            state=address(state),
            cluster=cluster,
            **place,
        )
    return logprobs, entropy, None, state


def experience_forward(
    mask: Tensor,
    tokens: dict[str, Tensor | None],
    per_row: dict[str, Tensor | None],
    coefficients: Tensor,
    cu_seqlens: Tensor | None,
    *,
    wanted: dict[str, bool],
    kind: str,
    mask_rule: str,
    moments: bool,
) -> tuple[Tensor, Tensor | None]:
    """The token tensors that are wanted, as [k, *shape of the mask], and partial moments [4, B]; one launch.

    As `ppo_fast.kernels.experience.experience_forward`, from tensors by their names there, with contiguous rows.
    """
    starts = None if cu_seqlens is None else cu_seqlens.contiguous()
    sequences = mask.shape[0] if starts is None else len(starts) - 1
    counted = as_bytes(mask)
    out = torch.empty((sum(wanted.values()), *mask.shape), dtype=torch.float32, device=mask.device)
    addresses = iter([x.data_ptr() for x in out])
    parts = torch.empty((PARTIALS, sequences), dtype=torch.float32, device=mask.device)
    if mask.numel() == 0:
        return out, parts.zero_() if moments else None
    with _launching_on(mask) as place:
        build.extension().cuda_experience(
            sequences=sequences,
            tokens=mask.shape[-1],
            cu_seqlens=address(starts),
            cu_seqlens_64=starts is not None and starts.dtype == torch.int64,
            **{name: token_rows(x) for name, x in tokens.items()},
            mask=token_rows(counted),
            **{name: address(x) for name, x in per_row.items()},
            coefficients=coefficients.data_ptr(),
            **{name: next(addresses) if want else 0 for name, want in wanted.items()},
            parts=parts.data_ptr() if moments else 0,
            kind=KINDS.index(kind),
            carry=mask_rule == "carry",
            **place,
        )
    return out, parts if moments else None


def group_parts(parts: Tensor, most: int) -> Tensor:
    """Merge partial moments [4, count] until at most `most` are left; a launch for each factor of 1024."""
    if parts.shape[1] == 0:  # of no parts at all one, of which nothing counts
        return torch.zeros((PARTIALS, 1), dtype=torch.float32, device=parts.device)
    while parts.shape[1] > most:
        count = parts.shape[1]
        size = min(-(-count // most), MOST_PARTS)
        merged = torch.empty((PARTIALS, -(-count // size)), dtype=torch.float32, device=parts.device)
        with _launching_on(parts) as place:
            build.extension().cuda_merge_parts(
                parts=parts.data_ptr(),
                count=count,
                merged=merged.data_ptr(),
                groups=merged.shape[1],
                size=size,
                **place,
            )
        parts = merged
    return parts


def whiten_by_parts(x: Tensor, mask: Tensor, parts: Tensor, *, unbiased: bool) -> None:
    """Whiten `x`, float32, in place by partial moments [4, count]; one launch for up to 1024 parts."""
    assert x.is_contiguous(), f"x has strides {x.stride()}"
    counted = as_bytes(mask).contiguous()
    parts = group_parts(parts, MOST_PARTS)
    with _launching_on(x) as place:
        build.extension().cuda_whiten_by_parts(
            x=x.data_ptr(),
            mask=counted.data_ptr(),
            size=x.numel(),
            parts=parts.data_ptr(),
            count=parts.shape[1],
            unbiased=unbiased,
            **place,
        )
