"""How much memory a run will need, told before it starts: by device, and how many devices four models of a size take.

What is counted (bytes a device, `E` = bytes of a weight, n ranks sharing what their ZeRO stage shares):

- weights: E for each parameter of the four models; shared from stage 3 on;
- gradients: E for each parameter of actor and critic; shared from stage 2 on;
- optimiser: two moments of E bytes for each of these, or, in bfloat16 under DeepSpeed, moments and a master copy in
  float32, 12 bytes; shared from stage 1 on;
- the largest of what sampling (KV cache, and under stage 3 the gathered actor), scoring (logits of policy and
  reference) and the update (activations of one micro-batch, logits and their gradients) hold for a time.

With the linear-head ops logits exist a chunk at a time. Activations are those that transformers' Llama keeps for the
backward pass; other decoders differ by a few tenths.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
LINEAR_CHUNK = 4096
"""Rows of logits that exist at once under the linear-head ops."""
SLACK = 1.05
"""What an allocator cannot give back in whole blocks."""
BASE = {"cuda": 1 * GIB, "cpu": GIB // 2}
"""The CUDA context and libraries, or Python with torch and transformers."""


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on in a decoder."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    """Key-value heads times their width: what the cache keeps of a token and layer, twice."""
    vocabulary: int

    @classmethod
    def llama(
        cls, *, layers: int, hidden: int, intermediate: int, kv_width: int, vocabulary: int, tied: bool
    ) -> ModelShape:
        """Shape of a Llama-like decoder, its parameters counted by formula, without norms and biases."""
        layer = 2 * hidden * hidden + 2 * hidden * kv_width + 3 * hidden * intermediate
        tables = vocabulary * hidden * (1 if tied else 2)
        return cls(layers * layer + tables, layers, hidden, intermediate, kv_width, vocabulary)

    @classmethod
    def of(cls, model: torch.nn.Module) -> ModelShape:
        """Shape of a transformers decoder, on whatever device, `meta` included."""
        # Most configs map the names of their own onto these; what one lacks is taken from what is there.
        config: Any = getattr(model.config, "get_text_config", lambda: model.config)()
        hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 1)
        head = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layers=getattr(config, "num_hidden_layers", 1),
            hidden=hidden,
            intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
            kv_width=(getattr(config, "num_key_value_heads", None) or heads) * head,
            vocabulary=config.vocab_size,
        )


SHAPES = {
    "1B": ModelShape.llama(
        layers=16, hidden=2048, intermediate=8192, kv_width=512, vocabulary=128_256, tied=True
    ),
    "7B": ModelShape.llama(
        layers=28, hidden=3584, intermediate=18_944, kv_width=512, vocabulary=152_064, tied=False
    ),
    "70B": ModelShape.llama(
        layers=80, hidden=8192, intermediate=28_672, kv_width=1024, vocabulary=128_256, tied=False
    ),
}
"""Of Llama-3.2-1B, Qwen2.5-7B and Llama-3.1-70B."""


@dataclass(frozen=True)
class Workload:
    """What a device does in one PPO step, and how the run is shared between devices."""

    prompt: int
    """Longest prompt, tokens."""
    response: int
    """Longest response, tokens."""
    generated: int
    """Sequences sampled in one call, on this device."""
    micro_batch: int
    """Sequences in one forward and backward pass, on this device."""
    weight_bytes: int = 4
    activation_bytes: int = 4
    optimizer_bytes: int = 8
    """Of each trained parameter."""
    linear_head: bool = False
    """Log-probabilities and losses by the linear-head ops, which never hold all logits."""
    recompute: bool = False
    """Gradient checkpointing: a layer's input is kept, the rest computed anew."""
    ranks: int = 1
    zero_stage: int = 0
    device: str = "cpu"

    @property
    def sequence(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.response


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: float
    gradients: float
    optimizer: float
    sampling: float
    scoring: float
    update: float
    base: float

    @property
    def held(self) -> float:
        """What is there in the update whatever the batch."""
        return self.base + self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The most that is there at once. Gradients are made in the update and dropped after it."""
        quiet = self.base + self.weights + self.optimizer
        return SLACK * max(quiet + self.sampling, quiet + self.scoring, self.held + self.update)


def estimate_memory(
    actor: ModelShape, critic: ModelShape, frozen: Sequence[ModelShape], work: Workload
) -> MemoryEstimate:
    """Memory of one device of a run; `frozen` are the reference and the reward models."""
    shared = [work.ranks if work.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    trained = actor.parameters + critic.parameters
    everything = trained + sum(model.parameters for model in frozen)
    rows = work.micro_batch * work.response
    logits = min(rows, LINEAR_CHUNK if work.linear_head else rows) * actor.vocabulary
    gathered = work.weight_bytes * actor.parameters if shared[2] > 1 else 0
    cache = 2 * actor.layers * actor.kv_width * work.generated * work.sequence * work.activation_bytes
    return MemoryEstimate(
        weights=work.weight_bytes * everything / shared[2],
        gradients=work.weight_bytes * trained / shared[1],
        optimizer=work.optimizer_bytes * trained / shared[0],
        # Two layers' cache are there twice while a token is added; the next token's logits are float32, sorted or not.
        sampling=gathered + cache * (1 + 2 / actor.layers) + 3 * 4 * work.generated * actor.vocabulary,
        # The policy's logits while the reference's are made.
        scoring=2 * logits * work.activation_bytes,
        # Logits, the gradient of their response positions, and that gradient padded to where it came from.
        update=max(_activations(model, work) for model in (actor, critic))
        + (1 if work.linear_head else 3) * logits * work.activation_bytes,
        base=BASE["cpu" if work.device == "cpu" else "cuda"],
    )


def _activations(model: ModelShape, work: Workload) -> float:
    """Bytes that the backward pass of a micro-batch finds kept.

    A layer of transformers' Llama keeps, a token: each of two norms' input, normalised value and output (6 hidden);
    queries, and keys and values repeated for every head (3 hidden); the attention's output in both layouts (2 hidden);
    the gate before and after its activation, the other branch, their product (4 intermediate).
    """
    layer = 11 * model.hidden + 4 * model.intermediate
    kept = model.layers * model.hidden + layer if work.recompute else model.layers * layer
    return float(kept * work.micro_batch * work.sequence * work.activation_bytes)


def devices_needed(size: str, sequence: int, capacity: float, *, linear_head: bool) -> int | None:
    """GPUs of `capacity` bytes that four models of a size of SHAPES need; from 8 on a multiple of 8. None: never fits.

    As `table_estimate` says it is done.
    """
    for count in (*range(1, 8), *range(8, 1025, 8)):
        if table_estimate(size, sequence, count, linear_head=linear_head).peak <= capacity:
            return count
    return None


def table_estimate(size: str, sequence: int, ranks: int, *, linear_head: bool) -> MemoryEstimate:
    """The estimate behind an entry of the table.

    bfloat16 with master weights in float32, ZeRO-3, gradient checkpointing; on each GPU four sequences a micro-batch,
    and eight sampled at once; half of a sequence is the prompt.
    """
    shape = SHAPES[size]
    work = Workload(
        prompt=sequence // 2,
        response=sequence // 2,
        generated=8,
        micro_batch=4,
        weight_bytes=2,
        activation_bytes=2,
        optimizer_bytes=12,
        linear_head=linear_head,
        recompute=True,
        ranks=ranks,
        zero_stage=3,
        device="cuda",
    )
    return estimate_memory(shape, shape, [shape, shape], work)


def memory_table() -> str:
    """The table of the documentation, in Markdown, without a final newline. GB are 2**30 bytes."""
    head = "| four models of | tokens | linear-head ops | models, GB in all | batch, GB a GPU |"
    lines = [f"{head} 80 GB GPUs | 192 GB GPUs |", "|---|---|---|---|---|---|---|"]
    for size in SHAPES:
        for sequence in (2048, 8192):
            for linear_head in (False, True):
                one = table_estimate(size, sequence, 1, linear_head=linear_head)
                models = (one.held - one.base) / GIB
                batch = f"{max(one.update, one.sampling, one.scoring) / GIB:.1f}"
                counts = [
                    devices_needed(size, sequence, capacity * GIB, linear_head=linear_head) or "none fits"
                    for capacity in (80, 192)
                ]
                row = [size, sequence, "with" if linear_head else "without", f"{models:.0f}", batch, *counts]
                lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine's RAM as far as this process may use it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return min(installed, int(allowed)) if allowed.isdigit() else installed


def check_memory(estimate: MemoryEstimate, capacity: int, device: str, work: Workload) -> None:
    """Say before a run starts that it will not fit.

    Raises ValueError where weights, gradients and optimiser alone are more than there is; warns where the batch would
    be, which depends on how long the responses turn out to be.
    """
    shown = (
        f"weights {estimate.weights / GIB:.1f}, gradients {estimate.gradients / GIB:.1f}, optimiser "
        f"{estimate.optimizer / GIB:.1f}, batch {max(estimate.update, estimate.sampling, estimate.scoring) / GIB:.1f}"
    )
    there = f"{device} has {capacity / GIB:.1f} GB"
    if estimate.held > capacity:
        smaller = "models.dtype=bfloat16 or smaller models" if work.weight_bytes > 2 else "smaller models"
        raise ValueError(
            f"the four models take {estimate.held / GIB:.1f} GB ({shown}) and {there}: "
            f"take {smaller}, or share them between devices"
        )
    if estimate.peak > capacity:
        warnings.warn(
            f"this run may take {estimate.peak / GIB:.1f} GB ({shown}) and {there}: lower "
            "objective.micro_batch_size, rollout.generation_batch_size or rollout.max_new_tokens",
            stacklevel=2,
        )
