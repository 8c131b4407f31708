"""Heads that are sharded for storage alone: gathered for a call, and let go of after it.

ZeRO-3 leaves a parameter empty between uses; FSDP2 and other DTensors hold a slice. Neither library is imported here
before one of its tensors comes.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor

HEADS = ("weight", "bias", "ref_weight", "ref_bias")
F = TypeVar("F", bound=Callable[..., Any])


def is_partitioned(tensor: object) -> bool:
    """Whether DeepSpeed's ZeRO-3 manages it and has not gathered it, as it does within the forward of its engine."""
    if not isinstance(tensor, Tensor) or not hasattr(tensor, "ds_id"):
        return False
    status = getattr(tensor, "ds_status", None)
    return getattr(status, "name", None) != "AVAILABLE"


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "full_tensor")


def _gathering(parameters: list[object]) -> AbstractContextManager[None]:
    import deepspeed  # deepspeed.zero is an attribute, not a module that could be imported from

    return cast(AbstractContextManager[None], deepspeed.zero.GatheredParameters(parameters))


@contextmanager
def gathered(*tensors: object) -> Iterator[None]:
    """Those of them that ZeRO-3 manages are whole inside of the block."""
    partitioned = [x for x in tensors if is_partitioned(x)]
    if not partitioned:
        yield
        return
    with _gathering(partitioned):
        yield


def keep_until_accumulated(*tensors: Tensor | None) -> None:
    """Gather those that ZeRO-3 manages for the rest of a backward, which adds a whole gradient to a whole parameter."""
    for tensor in tensors:
        if tensor is not None and is_partitioned(tensor) and tensor.requires_grad:
            _keep_one(tensor)


def _keep_one(parameter: Tensor) -> None:
    block = _gathering([parameter])
    block.__enter__()

    def release(_: Tensor) -> None:
        handle.remove()
        block.__exit__(None, None, None)

    handle = parameter.register_post_accumulate_grad_hook(release)


def whole(tensor: Any) -> Tensor:
    """A DTensor's whole; its gradient comes back in the DTensor's placements, as the mean over the ranks (as FSDP's).

    Every rank of its mesh must make the call, and the backward.
    """
    from torch.distributed.tensor import Partial

    ranks = tensor.device_mesh.size()
    full: Tensor = tensor.full_tensor(grad_placements=[Partial("sum")] * tensor.device_mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / ranks)
    return full


def takes_sharded_heads(function: F) -> F:
    """Let `function`, an op from hidden states, take heads that are sharded for storage."""
    names = list(inspect.signature(function).parameters)
    places = [index for index, name in enumerate(names) if name in HEADS]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = [args[i] for i in places if i < len(args)] + [
            kwargs[name] for name in HEADS if name in kwargs
        ]
        if not any(is_partitioned(x) or is_distributed(x) for x in given):
            return function(*args, **kwargs)
        positional = [whole(x) if i in places and is_distributed(x) else x for i, x in enumerate(args)]
        named = {k: whole(x) if k in HEADS and is_distributed(x) else x for k, x in kwargs.items()}
        with gathered(*given):
            return function(*positional, **named)

    return cast(F, call)
