"""Models on DeepSpeed engines: ZeRO stages 0 to 3 for those that learn, ZeRO-3 or inference engines for the frozen.

DeepSpeed is imported when the first engine is made and not before. Whatever is asked of a model runs inside its
engine's forward (`run`), because ZeRO-3 holds no more than a shard of each parameter between the calls.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from ppo_fast.ppo.config import OptimizerConfig
from ppo_fast.ppo.engine_state import load_engine_state, own_engine_state, shared_engine_state
from ppo_fast.ppo.ranks import Ranks
from ppo_fast.ppo.state import Saved, State

INVALID = -1.0  # what DeepSpeed's norms say where a gradient is not finite


def load_deepspeed(device: torch.device) -> ModuleType:
    """The package, for models on `device`; ValueError where it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a machine may have GPUs that this run does not use
    os.environ.setdefault("LOCAL_RANK", "0")  # a process that no launcher started
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ValueError(
            f"parallel.deepspeed and parallel.zero_stage need DeepSpeed ({error}): "
            "`pip install ppo-fast[deepspeed]`, with DS_BUILD_OPS=0 for nothing to be compiled"
        ) from error
    if device.type == "cpu":
        # Shared-memory reductions of its inference kernels, compiled at the first start: nothing here calls them.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()  # with the group that is there: what is split before the first engine needs it
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r"`torch.distributed.*` is deprecated", category=FutureWarning)
    return deepspeed


def shard_parameters(model: PreTrainedModel, settings: dict[str, Any], device: torch.device) -> None:
    """Under ZeRO-3: split a model that was loaded on the CPU over the processes' devices, a parameter at a time.

    No device ever holds the whole of it.
    """
    zero = settings["zero_optimization"]
    if zero.get("stage") != 3:
        return
    import deepspeed

    offload = zero.get("offload_param") or {}
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path=settings,
        dtype=model.dtype,
        remote_device=offload.get("device"),
        pin_memory=offload.get("pin_memory", False),
    )
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


class Root(nn.Module):
    """Root of an engine's module: its forward is whatever function of the model is asked for.

    ZeRO-3 gathers a parameter that this function reads by itself (an output head's weight, say) for as long as the
    root's forward lasts, and again for the backward pass, and shards its gradient like any other.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.call: Callable[[PreTrainedModel], Any] | None = None

    def forward(self) -> Any:
        """Run the function that `run_in` has set."""
        assert self.call is not None
        return self.call(self.model)


def run_in(engine: Any, root: Root, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`function(model, *args, **options)` inside the engine's forward. It returns tensors, or a tuple of them."""
    # Not as arguments of forward: ZeRO-3's hooks look for tensors in those and shall find none.
    root.call = lambda model: function(model, *args, **options)
    try:
        return engine()
    finally:
        root.call = None


class EngineLearner:
    """A model that learns on a DeepSpeed engine: the twin of `update.Learner`, with the same few methods."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        learning_rate: float,
        config: OptimizerConfig,
        steps: int,
        *,
        settings: dict[str, Any],
        device: torch.device,
    ) -> None:
        deepspeed = load_deepspeed(device)
        shard_parameters(model, settings, device)
        self.model = model
        self.name = name
        self.ranks = Ranks()
        self.root = Root(model).eval()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"model_parameters": parameters}
        if "optimizer" not in settings:
            options["optimizer"] = functools.partial(
                torch.optim.AdamW,
                lr=learning_rate,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=config.weight_decay,
            )
        if "scheduler" not in settings:
            options["lr_scheduler"] = lambda base: get_scheduler(
                config.schedule, base, config.warmup_steps, steps
            )
        self.engine = deepspeed.initialize(model=self.root, config=settings, **options)[0]
        self.root.eval()
        self.stage = self.engine.zero_optimization_stage()
        self._norm = _GradientNorm(self.engine)
        self._begun, self._whole = False, False

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.engine.optimizer.param_groups[0]["lr"])

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """`function(model, ...)` with its parameters in place, differentiable."""
        return run_in(self.engine, self.root, function, *args, **options)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of this process's share of the loss; `last` says that the minibatch ends with it."""
        self._begun, self._whole = True, last
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the processes; the loss is this process's part of a sum.
        self.engine.backward(loss * self.ranks.count, scale_wrt_gas=False)

    def clip(self) -> Tensor:
        """2-norm of the minibatch's gradient over all processes; `step` clips by it. Not finite where it is not."""
        return self._norm.read()

    def step(self) -> None:
        """Step the weights, advance the schedule, clear the gradients."""
        self.engine.step()
        self._norm.forget()
        self._begun = False

    def discard(self) -> None:
        """Clear the gradients; weights and schedule stay. After a step there are none."""
        if not self._begun:
            return
        if self._whole:
            self._norm.discard()
        else:
            _drop_part(self.engine)
        self._begun = False

    @contextmanager
    def gathered(self) -> Iterator[PreTrainedModel]:
        """The model with whole parameters, which ZeRO-3 gathers once here, for many forward passes without gradient."""
        with gathered(self.model, self.engine, self.stage):
            yield self.model

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters and buffers on the CPU, on the first process; empty on the others, who must call it too."""
        return shared_engine_state(self.engine, self.model, self.stage)

    def shared_state(self) -> dict[str, State]:
        """The weights."""
        return {self.name: State(self.weights())}

    def own_state(self) -> dict[str, State]:
        """This process's shard of master weights and moments, and the schedule's place."""
        return {f"{self.name}_shard": own_engine_state(self.engine)}

    def load_state(self, saved: Saved) -> None:
        """Restore weights, optimiser and schedule."""
        weights, own = saved.shared(self.name), saved.own(f"{self.name}_shard")
        load_engine_state(self.engine, self.model, weights, own, self.name)


class FrozenEngine:
    """A frozen model on a ZeRO-3 engine (its parameters are spread over the processes) or an inference engine."""

    def __init__(self, model: PreTrainedModel, settings: dict[str, Any] | None, device: torch.device) -> None:
        deepspeed = load_deepspeed(device)
        self.model = model
        self.root = Root(model).eval()
        if settings is None:
            kind = next(model.parameters()).dtype
            cast(nn.Module, model).to(device)
            self.engine = deepspeed.init_inference(
                self.root, config={"dtype": kind, "replace_with_kernel_inject": False}
            )
        else:
            shard_parameters(model, settings, device)
            self.engine = deepspeed.initialize(model=self.root, config=settings)[0]
        self.root.eval()

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """`function(model, ...)` with its parameters in place."""
        return run_in(self.engine, self.root, function, *args, **options)


@contextmanager
def gathered(model: nn.Module, engine: Any, stage: int) -> Iterator[None]:
    """Whole parameters under ZeRO-3, without the hooks that would gather and release them layer by layer."""
    if stage < 3:
        yield
        return
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        for hooks in (offload.forward_hooks, offload.backward_hooks):
            for hook in hooks:
                hook.remove()
            hooks.clear()
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


class _GradientNorm:
    """The norm of an engine's gradient, known before the step.

    An engine finds out within its step whether the norm is finite, and steps or drops the gradients alone. Actor and
    critic must do so together: so the norm is read first, from the same function, and handed to the step; a norm that
    is declared invalid makes the engine take its own way out.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        # Of stage 3, of stages 1 and 2; stage 0 has neither.
        names = [name for name in ("_get_norm_groups", "scaled_global_norm") if hasattr(self.optimizer, name)]
        self.function = names[0] if names else None
        self.original: Callable[[], Any] | None = (
            getattr(self.optimizer, self.function) if self.function else None
        )

    def read(self) -> Tensor:
        """The norm, NaN or infinite where a gradient is."""
        if self.original is None:
            return self._of_gradients()
        found = self.original()
        setattr(self.optimizer, str(self.function), lambda *_, **__: found)
        groups: Sequence[Any] = found if isinstance(found, list) else [found]
        norms = torch.stack([torch.as_tensor(norm, dtype=torch.float32).cpu() for norm in groups])
        return torch.where((norms < 0).any(), torch.nan, torch.linalg.vector_norm(norms))

    def discard(self) -> None:
        """Let the engine drop a minibatch's gradients, as it does where one is not finite."""
        if self.original is None:
            self.engine.zero_grad()
            return
        invalid = torch.tensor(INVALID)
        groups = self.function == "_get_norm_groups"
        setattr(self.optimizer, str(self.function), lambda *_, **__: [invalid] if groups else invalid)
        self.engine.step()
        self.forget()

    def forget(self) -> None:
        """The engine computes its norms again."""
        if self.original is not None:
            setattr(self.optimizer, str(self.function), self.original)

    def _of_gradients(self) -> Tensor:
        """Stage 0: every process holds every gradient, summed up already."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


def _drop_part(engine: Any) -> None:
    """Clear what a minibatch that was left in the middle has accumulated."""
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        parameter.grad = None
    if engine.zero_optimization_stage() in (1, 2):
        optimizer.micro_step_id = -1
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
    optimizer.zero_grad()
