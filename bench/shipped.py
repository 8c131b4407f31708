"""The registry of shipped kernel configurations: every launch that a public op makes, recorded without a GPU.

A call of a launcher on meta tensors names its kernels, their constants, options and argument values exactly as on a
device. To add a kernel, add a call of its launcher to `calls`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from ppo_fast.kernels import (
    experience,
    gae_backward,
    kl,
    kl_estimate,
    logprob,
    moments,
    policy_loss,
    sequences,
    surrogate,
    tokens,
    value_loss,
)
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
SEQUENCES, TOKENS = 8, 1024


@dataclass(frozen=True)
class Launch:
    """One kernel with the values of its arguments and its options, as a launcher gave them."""

    kernel: str
    dtype: str
    vocab: str  # empty for a kernel that sees no logits
    variant: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, Any], dict[str, Any]]]]:
    """Collect (kernel, arguments, options) of every launch inside instead of running it."""
    launches = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments = {name: named.pop(name) for name in self.arg_names}
        launches.append((self, arguments, named))

    with mock.patch.object(triton.JITFunction, "run", run):
        yield launches


def logits_calls(dtype: torch.dtype, vocab: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(variant, call) of every launcher that sees logits; the rows are those of a contiguous [B, T, V]."""
    shape, rows = (SEQUENCES, TOKENS), SEQUENCES * TOKENS
    x, ref = meta(*shape, vocab, dtype=dtype), meta(*shape, vocab, dtype=dtype)
    labels, numbers, scalar = meta(*shape, dtype=torch.int64), meta(*shape), meta()
    coefficients = meta(surrogate.COEFFICIENTS)
    strides = {"inner_rows": rows, "outer_stride": 0, "inner_stride": vocab}
    grid = (rows, 0, vocab)
    grids = {"grid": grid, "ref_grid": grid}

    yield "", partial(logprob.logprob_forward, x, labels, scalar, **strides)
    backward = partial(logprob.logprob_backward, x, labels, scalar, meta(rows, logprob.STATS), **strides)
    yield "logprob", partial(backward, numbers, None)
    yield "entropy", partial(backward, None, numbers)
    yield "logprob+entropy", partial(backward, numbers, numbers)

    yield "", partial(kl.kl_forward, x, ref, scalar, **grids)
    backward = partial(kl.kl_backward, x, ref, scalar, meta(rows, kl.KL_STATS), numbers, **grids)
    yield "policy", partial(backward, of_logits=True, of_ref_logits=False)
    yield "reference", partial(backward, of_logits=False, of_ref_logits=True)
    yield "policy+reference", partial(backward, of_logits=True, of_ref_logits=True)

    for other, name in ((None, ""), (ref, "kl")):
        call = partial(
            policy_loss.policy_rows,
            x,
            labels,
            numbers,
            numbers,
            numbers,
            scalar,
            other,
            coefficients,
            **grids,
        )
        yield "+".join(filter(None, ["free", name])), partial(call, inplace=False)
        yield "+".join(filter(None, ["inplace", name])), partial(call, inplace=True)
        state = meta(rows, policy_loss.ROW_STATE)
        gradient = partial(policy_loss.policy_gradient, scalar, x, labels, scalar, other, state, **grids)
        yield name, gradient
        if dtype == torch.float16:  # the one dtype whose gradient is made in place by a launch of its own
            yield "+".join(filter(None, ["inplace", name])), partial(gradient, inplace=True)
    yield "", partial(policy_loss.scale_rows, scalar, x, grid=grid)


def token_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(variant, call) of every launcher that sees one number a token: padded and packed, every reduction."""
    coefficients, scalar = meta(surrogate.COEFFICIENTS), meta()
    lengths = meta(SEQUENCES, dtype=torch.int64)
    padded = (SEQUENCES, TOKENS)
    for reduction in sequences.REDUCTIONS:
        for normalizer, divided in ((None, ""), (scalar, "normalizer")):
            variant = "+".join(filter(None, [reduction, divided]))
            yield (
                variant,
                partial(sequences.token_weights, meta(*padded, dtype=torch.bool), normalizer, reduction),
            )
            for shape, cu, layout in (
                (padded, None, "padded"),
                ((SEQUENCES * TOKENS,), meta(SEQUENCES + 1, dtype=torch.int32), "packed"),
            ):
                x, mask = meta(*shape, dtype=dtype), meta(*shape, dtype=torch.bool)
                call = partial(
                    tokens.policy_forward, x, x, x, mask, coefficients, normalizer, cu, reduction=reduction
                )
                yield f"{variant}+{layout}", call
                yield (
                    f"{variant}+{layout}",
                    partial(
                        tokens.policy_backward,
                        scalar, x, x, x, mask, coefficients, cu, lengths, scalar, reduction=reduction,
                    ),
                )  # fmt: skip
                yield (
                    f"{variant}+{layout}",
                    partial(
                        value_loss.value_forward, x, x, x, mask, scalar, normalizer, cu, reduction=reduction
                    ),
                )
                yield (
                    f"{variant}+{layout}",
                    partial(
                        value_loss.value_backward,
                        scalar, x, x, x, mask, scalar, cu, lengths, scalar, reduction=reduction,
                    ),
                )  # fmt: skip
            if dtype == torch.float32:  # what the loss from logits adds up
                x, mask = meta(*padded), meta(*padded, dtype=torch.bool)
                for kl_of, name in ((None, "entropy"), (x, "entropy+kl")):
                    yield (
                        f"{variant}+{name}",
                        partial(
                            tokens.policy_forward,
                            x, x, x, mask, coefficients, normalizer, None,
                            reduction=reduction, entropy=x, kl=kl_of,
                        ),
                    )  # fmt: skip


def moment_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(variant, call) of every launcher of the masked moments: over everything, and over an outer or the last axis."""
    for shape, name in (
        ((1, SEQUENCES * TOKENS, 1), "all"),
        ((1, SEQUENCES, TOKENS), "first axis"),
        ((SEQUENCES, TOKENS, 1), "last axis"),
    ):
        x, mask, columns = meta(*shape, dtype=dtype), meta(*shape, dtype=torch.bool), shape[0] * shape[2]
        stats, grad = meta(moments.STATS, columns), meta(columns)
        for order in (1, 2):
            options = {"unbiased": False, "order": order}
            yield f"{name}+order {order}", partial(moments.moments_forward, x, mask, **options)
            yield f"{name}+order {order}", partial(moments.moment_backward, grad, x, mask, stats, **options)
    x, mask = meta(1, SEQUENCES * TOKENS, 1, dtype=dtype), meta(1, SEQUENCES * TOKENS, 1, dtype=torch.bool)
    stats, grad = meta(moments.STATS, 1), meta(1, SEQUENCES * TOKENS, 1)
    for keep_mean, name in ((False, "whiten"), (True, "rescale")):
        options = {"unbiased": False, "keep_mean": keep_mean}
        yield name, partial(moments.normalize_forward, x, mask, **options)
        yield name, partial(moments.normalize_backward, grad, x, mask, stats, **options)


def experience_calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(variant, call) of every launcher of the experience stage: padded and packed, every estimate and mask rule."""
    rows = meta(SEQUENCES)
    for shape, cu, layout in (
        ((SEQUENCES, TOKENS), None, "padded"),
        ((SEQUENCES * TOKENS,), meta(SEQUENCES + 1, dtype=torch.int32), "packed"),
    ):
        x, mask, grad = meta(*shape, dtype=dtype), meta(*shape, dtype=torch.bool), meta(*shape)
        nothing = dict.fromkeys(field.name for field in fields(experience.ExperienceInputs))
        given = {**nothing, "mask": mask, "coefficients": meta(surrogate.COEFFICIENTS), "cu_seqlens": cu}
        shaping = {"logprobs": x, "ref_logprobs": x, "scores": rows}
        extra = {
            "bootstrap": rows,
            "gamma": rows,
            "lam": rows,
            "score_index": meta(SEQUENCES, dtype=torch.int64),
            "token_rewards": x,
        }
        for rule in ("carry", "multiply"):
            variants = [*((kind, {}, kind) for kind in experience.KINDS), ("k1", extra, "own numbers")]
            for kind, more, name in variants:
                inputs = experience.ExperienceInputs(**given | shaping | {"values": x} | more)
                options = {"kind": kind, "mask_rule": rule, "moments": True}
                yield f"{layout}+{rule}+{name}", partial(experience.experience_forward, inputs, **options)
            scan = experience.ExperienceInputs(**given | {"token_rewards": x, "values": x})
            options = {"kind": "k1", "mask_rule": rule, "moments": False}
            yield f"{layout}+{rule}+gae", partial(experience.experience_forward, scan, **options)
            coefficients = meta(surrogate.COEFFICIENTS)
            yield (
                f"{layout}+{rule}",
                partial(
                    gae_backward.gae_backward, grad, grad, mask, None, None, coefficients, cu, mask_rule=rule
                ),
            )
        rewards = experience.ExperienceInputs(**given | shaping)
        options = {"kind": "k1", "mask_rule": "carry", "moments": False}
        yield f"{layout}+rewards", partial(experience.experience_forward, rewards, **options)
    flat, size = meta(SEQUENCES * TOKENS, dtype=dtype), SEQUENCES * TOKENS
    for parts in (SEQUENCES, 65536):
        partials = meta(experience.PARTIALS, parts)
        mask = meta(size, dtype=torch.bool)
        yield (
            f"{parts} parts",
            partial(experience.whiten_by_parts, meta(size), mask, partials, unbiased=False),
        )
        yield f"{parts} parts to one", partial(experience.group_parts, partials, 1)
    for kind in experience.KINDS:
        clamps = meta(surrogate.COEFFICIENTS)
        yield kind, partial(kl_estimate.kl_estimate, flat, flat, clamps, kind=kind)
        yield kind, partial(kl_estimate.kl_estimate_backward, meta(size), flat, flat, clamps, kind=kind)


def calls() -> Iterator[tuple[str, str, str, Callable[[], Any]]]:
    """(dtype, vocabulary, variant, call) of every launcher in every shipped configuration."""
    for name, dtype in DTYPES.items():
        for vocab in VOCABULARIES:
            for variant, call in logits_calls(dtype, vocab):
                yield name, str(vocab), variant, call
        for variant, call in (*token_calls(dtype), *moment_calls(dtype), *experience_calls(dtype)):
            yield name, "", variant, call
    coefficients = (1.0,) * surrogate.COEFFICIENTS
    yield "fp32", "", "", partial(surrogate.pack_coefficients, coefficients, torch.device("meta"))


def launches() -> list[Launch]:
    """Every shipped configuration once, in a fixed order; a variant that a kernel does not see is kept by name."""
    found = {}
    for dtype, vocab, variant, call in calls():
        with recorded() as made:
            call()
        for function, arguments, options in made:
            name = function.__name__
            found[name, dtype, vocab, variant] = Launch(
                name, dtype, vocab, variant, function, arguments, options
            )
    return [found[key] for key in sorted(found)]
