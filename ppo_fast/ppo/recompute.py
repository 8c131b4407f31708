"""Gradient checkpointing for models that stay in eval mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, and compute the layer again there.

    transformers' own switch works in train mode alone, and train mode would bring dropout. Raises ValueError for a
    model without layers of transformers' kind.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"models.gradient_checkpointing: {type(model).__name__} has no layers that can be checkpointed"
        )
    for layer in layers:
        # On the instance, under the hooks of the module: what they gather must be there for both passes.
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
