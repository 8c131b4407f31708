"""What a PPO run is made of: one dataclass a section, every field with its default, unit and reason.

The same dataclasses are the Python API, the YAML schema and the command line: a field ``kl_coef`` of the section
``objective`` is ``objective.kl_coef`` in an override, ``objective: {kl_coef: 0.05}`` in YAML.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class ModelsConfig:
    """Where the four models come from and how they are held."""

    actor: str = ""
    """Folder or hub name of the causal LM to tune, in save_pretrained layout. Required."""
    reference: str | None = None
    """Frozen policy that the KL penalty is measured against. None: a frozen copy of the actor as loaded."""
    critic: str = "auto"
    """`reward`: a trainable copy of the first reward model (DeepSpeed-Chat's choice). `actor`: the actor's trunk with
    a value head that starts at zero. `auto`: `reward` where a reward model reads the actor's tokens, else `actor`.
    Otherwise a folder with a one-label sequence classifier."""
    device: str = "auto"
    """Torch device. `auto`: cuda if there is one, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage type of the weights. float32 is the safe choice for training; AdamW states take the same type."""
    autocast: bool = False
    """Run the models' matrix products in bfloat16 by torch.autocast while the weights stay in `dtype`."""
    gradient_checkpointing: bool = False
    """Keep no activations within the layers of actor and critic; compute them again in the backward pass. Less memory,
    about a third more time for the update, the same results."""
    trust_remote_code: bool = False
    """Allow model folders to run their own Python code. Off unless you have read that code."""


@dataclass
class RewardSource:
    """One reward: a model or a Python function, with a weight. Several are added up."""

    model: str | None = None
    """Folder or hub name of a one-label sequence classifier. Its score at the last real token is the reward."""
    function: str | None = None
    """`package.module:name` or `path/to/file.py:name` of a function (prompts, responses) -> list of floats."""
    weight: float = 1.0
    """Factor of this source in the sum."""
    input: Literal["tokens", "text"] = "tokens"
    """`tokens`: the model reads the actor's tokens and must share its tokenizer. `text`: prompt and response are
    decoded and encoded again with the reward model's own tokenizer."""
    on_error: Literal["stop", "drop"] = "stop"
    """What follows where this source raises for a sample or scores it NaN or infinite. `stop`: the run ends and names
    the sample. `drop`: the sample takes no part in the update, and is counted in `objective/dropped`."""

    def __post_init__(self) -> None:
        """Check that exactly one kind of source is named."""
        if (self.model is None) == (self.function is None):
            raise ValueError(
                f"rewards: each source needs exactly one of `model` and `function`, "
                f"got model={self.model!r} and function={self.function!r}"
            )
        _require(math.isfinite(self.weight), "rewards.weight", self.weight, "a finite number")


@dataclass
class DataConfig:
    """The prompts."""

    prompts: str = ""
    """Training prompts: a .jsonl file with `prompt` (text) or `messages` (chat) in each line, or a .csv file with a
    column `prompt`. Required."""
    eval_prompts: str | None = None
    """Held-out prompts in the same form, for evaluation. None: no evaluation."""


@dataclass
class RolloutConfig:
    """How responses are sampled. The distribution sampled from is the one that is scored and trained."""

    batch_size: int = 32
    """Prompts, and so responses, in one PPO step."""
    max_new_tokens: int = 64
    """Longest response, in tokens. A response without an end token by then is truncated there."""
    temperature: float = 1.0
    """Divides the logits when sampling, scoring and training alike."""
    top_p: float = 1.0
    """Nucleus sampling; below 1 the kept tokens of the sampling policy are remembered ([B, T, V] bits as bool) and
    every logprob is renormalised over them. 1.0 = off, which is best for training."""
    top_k: int = 0
    """Sample from the k likeliest tokens, treated like `top_p`. 0 = off."""
    generation_batch_size: int | None = None
    """Prompts in one call of generate. None: the whole batch."""
    missing_eos_penalty: float | None = None
    """Subtracted from the score of a response that was truncated. None: no penalty."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _positive(self, "rollout", "batch_size", "max_new_tokens", "temperature")
        _require(0.0 < self.top_p <= 1.0, "rollout.top_p", self.top_p, "a number in (0, 1]")
        _require(self.top_k >= 0, "rollout.top_k", self.top_k, "0 or a positive integer")
        if self.generation_batch_size is not None:
            _positive(self, "rollout", "generation_batch_size")
        penalty = self.missing_eos_penalty
        finite = penalty is None or math.isfinite(penalty)
        _require(finite, "rollout.missing_eos_penalty", penalty, "a finite number")


@dataclass
class ObjectiveConfig:
    """The formulas: reward shaping, advantages, the clipped losses."""

    kl_coef: float = 0.1
    """Weight of the per-token KL penalty in the reward, in reward units per nat."""
    kl_kind: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimator of the per-token KL. k1 = logprob - ref_logprob."""
    kl_target: float | None = None
    """With a number, nats per sequence, kl_coef adapts towards it (Ziegler et al. 2019). None: fixed."""
    kl_horizon: int = 10_000
    """Episodes over which the adaptive kl_coef moves."""
    clip_score: float | None = 5.0
    """Scores are clipped to [-x, x] before they are paid at the last token. None: no clipping."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE lambda: 1 = no bias, 0 = least variance."""
    whiten_advantages: bool = True
    """Normalise the advantages of a batch to mean 0, variance 1 over counted tokens."""
    epochs: int = 4
    """Passes over each batch of rollouts (ppo_epochs)."""
    minibatches: int = 1
    """Optimiser steps in one pass; must divide rollout.batch_size."""
    micro_batch_size: int = 8
    """Sequences in one forward and backward pass; gradients accumulate up to a minibatch. Sets memory, not results."""
    halve_on_oom: bool = False
    """Where a micro-batch runs out of memory, halve its size and go on with the same gradient. Off: the run ends and
    says which setting to lower."""
    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high."""
    dual_clip: float | None = None
    """With a number c > 1, the loss of a token with negative advantage is at most -c * advantage."""
    log_ratio_clamp: float | None = None
    """Clamp of the log ratio before exp, in nats. verl and OpenRLHF use 20."""
    value_clip: float | None = 0.2
    """New values are clipped to this distance from the old ones. None: no clipping."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per nat."""
    reduction: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = "token-mean"
    """How token losses become one number, over the whole minibatch whatever the micro-batches."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _positive(self, "objective", "epochs", "minibatches", "micro_batch_size", "kl_horizon")
        for name in ("kl_coef", "clip_low", "clip_high"):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), f"objective.{name}", value, "a number >= 0")
        _require(
            self.clip_low <= 1, "objective.clip_low", self.clip_low, "at most 1: a ratio is never below 0"
        )
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"objective.{name}", value, "a number in [0, 1]")
        for name in ("clip_score", "value_clip", "kl_target", "log_ratio_clamp"):
            if getattr(self, name) is not None:
                _positive(self, "objective", name)
        _require(self.dual_clip is None or self.dual_clip > 1, "objective.dual_clip", self.dual_clip, "> 1")
        _require(
            math.isfinite(self.entropy_coef), "objective.entropy_coef", self.entropy_coef, "a finite number"
        )


@dataclass
class OptimizerConfig:
    """AdamW for the actor and, apart from it, for the critic."""

    actor_lr: float = 1e-5
    """Peak learning rate of the actor."""
    critic_lr: float = 1e-5
    """Peak learning rate of the critic."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Shape over the run's optimiser steps. linear and cosine end at 0."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up from 0."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.95
    """AdamW's second decay."""
    eps: float = 1e-5
    """AdamW's epsilon. 1e-5, not torch's 1e-8: it tempers the first updates (the TensorFlow-Adam detail)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this 2-norm, each model apart. 0 = no clipping, norms still logged."""
    max_skipped_updates: int = 8
    """Updates in a row that may be skipped because a loss or gradient is not finite; one more ends the run.
    0: the first ends it."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in (
            "actor_lr",
            "critic_lr",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "max_skipped_updates",
        ):
            value = getattr(self, name)
            _require(value >= 0 and math.isfinite(value), f"optimizer.{name}", value, "a number >= 0")
        _positive(self, "optimizer", "eps")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"optimizer.{name}", value, "a number in [0, 1)")


@dataclass
class EvaluationConfig:
    """Held-out evaluation: before the first step, every n steps, after the last."""

    every: int = 0
    """Steps between evaluations. 0: only before and after."""
    max_prompts: int = 64
    """At most this many of data.eval_prompts, the first ones."""
    judges: dict[str, str] = field(default_factory=dict)
    """Outside judges that never pay a reward: name -> function, named like a reward function."""
    show_samples: int = 3
    """Printed at the end: this many samples that gained most, and as many that gained least. 0 = none."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.every >= 0, "evaluation.every", self.every, "0 or a positive integer")
        _require(
            self.show_samples >= 0, "evaluation.show_samples", self.show_samples, "0 or a positive integer"
        )
        _positive(self, "evaluation", "max_prompts")
        taken = sorted(set(self.judges) & {"score", "score_std", "kl", "length_mean", "eos_fraction"})
        _require(
            not taken, "evaluation.judges", taken, "names other than those of the evaluation's own metrics"
        )


@dataclass
class CheckpointConfig:
    """Resumable state, apart from the final models."""

    every: int = 0
    """Steps between checkpoints. 0: none but the one that SIGTERM asks for. A checkpoint holds weights and optimiser
    state of actor and critic, and everything else that an exact resume takes."""
    keep: int = 2
    """Newest checkpoints that are kept. With 2 there is one to go back to where the newest is damaged."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.every >= 0, "checkpoint.every", self.every, "0 or a positive integer")
        _positive(self, "checkpoint", "keep")


@dataclass
class ParallelConfig:
    """Several processes (`torchrun`, `deepspeed`), and what of the models each of them holds."""

    deepspeed: str | None = None
    """A DeepSpeed JSON file: actor and critic live on its engines. What the run has settings for (batch sizes,
    learning rates, clipping, bf16) may be "auto" there or left out. None, without `zero_stage`: no DeepSpeed; several
    processes then add their gradients up and each holds everything."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed engines without a file. 0 splits nothing, 1 the optimiser's state, 2 gradients too, 3 parameters
    too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What the engines keep in CPU memory: `optimizer`: master weights and moments, `all`: parameters too (stage 3)."""
    frozen: Literal["auto", "inference", "zero3"] = "auto"
    """Engines of reference and reward models: `inference` (whole on every GPU) or `zero3` (spread over all). `auto`:
    zero3 where the actor's stage is 3."""
    timeout_minutes: float = 30.0
    """How long one process waits for another before it gives up."""

    def __post_init__(self) -> None:
        """Check ranges."""
        _positive(self, "parallel", "timeout_minutes")


@dataclass
class PPOConfig:
    """A whole PPO run."""

    output_dir: str = ""
    """Run folder: metrics, samples, curves, report, actor/ and critic/. New or empty, unless resumed. Required."""
    steps: int = 100
    """PPO steps: batches of rollouts."""
    seed: int = 0
    """Seeds prompts' order, sampling and fresh value heads."""
    resume: str = "never"
    """`auto`: go on from the newest checkpoint in output_dir, or start if there is none. A folder: go on from that
    checkpoint of output_dir. `never`: output_dir must be new or empty."""
    tensorboard: bool = True
    """Write event files to output_dir/tensorboard."""
    impl: Literal["auto", "reference"] = "auto"
    """Which implementation of the ops computes. `auto`: the fastest that supports each call; `reference`: eager torch
    throughout, to compare with."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    """Where the four models come from."""
    rewards: list[RewardSource] = field(default_factory=list)
    """What pays: one or several models and functions. Required from the command line."""
    data: DataConfig = field(default_factory=DataConfig)
    """The prompts."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Reward shaping, advantages, losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Learning rates and schedules."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Resumable state."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Several processes, DeepSpeed."""

    def __post_init__(self) -> None:
        """Check what no single section can see."""
        _positive(self, "", "steps")
        _require(bool(self.resume), "resume", self.resume, "`never`, `auto` or the folder of a checkpoint")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "an integer in [0, 2**32)")
        batch, minibatches = self.rollout.batch_size, self.objective.minibatches
        if batch % minibatches:
            raise ValueError(
                f"objective.minibatches is {minibatches}, expected a divisor of rollout.batch_size ({batch})"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, as written to config.yaml."""
        return dataclasses.asdict(self)

    @property
    def minibatch_size(self) -> int:
        """Rows behind one optimiser step."""
        return self.rollout.batch_size // self.objective.minibatches

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run, for the schedules."""
        return self.steps * self.objective.epochs * self.objective.minibatches


def differing_settings(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings in which two nested dicts differ, such as `objective.kl_coef`."""
    names = []
    for name in sorted(set(one) | set(other)):
        ours, theirs = one.get(name), other.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            names += differing_settings(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            names.append(prefix + name)
    return names


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def _positive(section: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        shown = f"{prefix}.{name}" if prefix else name
        _require(value > 0 and math.isfinite(value), shown, value, "a number > 0")
