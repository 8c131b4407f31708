"""Experience stage and loss step of a trainer, its own or patched: seconds and peak memory, in a process of their own.

    python bench/stages.py trl-1.12 after --sequences 8 --tokens 128 --vocab 32000

prints one JSON object with both stages. TRL's two versions come from the folders that `make test` makes. DeepSpeed-Chat
and trlX are on no index: "before" is their formulas in eager torch. Peak memory is what a stage needs beyond what was
there: the resident set on a CPU, the allocator's count on a GPU.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = Path(sys.prefix)
HIDDEN = 256

Stage = Callable[[], object]
Stages = dict[str, Stage]


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024


@contextmanager
def watched(result: dict[str, float]) -> Iterator[None]:
    """Seconds and extra bytes of what is inside."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
    start = time.perf_counter()
    yield
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    result["seconds"] = time.perf_counter() - start
    result["bytes"] = (
        torch.cuda.max_memory_allocated() - before if DEVICE == "cuda" else resident("VmHWM") - before
    )


def measured(stage: Stage, rounds: int) -> dict[str, float]:
    """The best time of a few rounds, and the peak of the one before them, which finds nothing kept for it."""
    first: dict[str, float] = {}
    with watched(first):
        stage()
    times = []
    for _ in range(rounds):
        result: dict[str, float] = {}
        with watched(result):
            stage()
        times.append(result["seconds"])
    return {"seconds": min(times), "bytes": first["bytes"]}


def batch(size: argparse.Namespace) -> SimpleNamespace:
    """Logits [B, T, V] of an actor and a reference, and what goes with them; answers end at different tokens."""
    torch.manual_seed(0)
    shape = (size.sequences, size.tokens)
    numbers = partial(torch.randn, shape, device=DEVICE)
    mask = torch.arange(size.tokens, device=DEVICE) < torch.randint(
        1, size.tokens, (size.sequences, 1), device=DEVICE
    )
    return SimpleNamespace(
        logits=torch.randn(*shape, size.vocab, device=DEVICE),
        ref_logits=torch.randn(*shape, size.vocab, device=DEVICE),
        labels=torch.randint(size.vocab, shape, device=DEVICE),
        mask=mask.long(),
        ends=torch.ones_like(mask, dtype=torch.long),  # of sequences that fill their row
        scores=torch.randn(size.sequences, device=DEVICE),
        values=numbers(),
        old_values=numbers(),
        advantages=numbers(),
        returns=numbers(),
    )


def eager_stages(size: argparse.Namespace, trlx: bool) -> Stages:
    """DeepSpeed-Chat's; trlX has no loop over sequences, and whitens."""
    import eager

    data = batch(size)

    def logprobs(logits: Tensor) -> Tensor:
        return eager.pick(torch.log_softmax(logits, -1), data.labels)

    def experience() -> None:
        with torch.no_grad():
            pair = logprobs(data.logits), logprobs(data.ref_logits)
            rewards = pair[0] - pair[1] if trlx else eager.shaped_rewards(*pair, data.scores, data.mask)[0]
            advantages, _ = eager.gae(rewards, data.values.clone(), data.ends if trlx else data.mask)
            if trlx:
                eager.whiten(advantages, data.ends)

    def loss() -> None:
        leaf = data.logits.detach().requires_grad_()
        new = logprobs(leaf)
        value = data.values.detach().requires_grad_()
        policy = eager.policy_loss(new, new.detach(), data.advantages, data.mask)
        (policy + eager.value_loss(value, data.old_values, data.returns, data.mask)).backward()

    return {"experience": experience, "loss": loss}


def deepspeed_chat(size: argparse.Namespace, after: bool) -> Stages:
    if not after:
        return eager_stages(size, trlx=False)
    from ppo_fast.integrations import deepspeed_chat as ours

    data, prompts = batch(size), torch.zeros(size.sequences, 1)
    settings = SimpleNamespace(kl_ctl=0.1, clip_reward_value=5, cliprange=0.2, cliprange_value=0.2)
    settings.gamma, settings.lam, settings.compute_fp32_loss = 1.0, 0.95, False
    past = torch.arange(size.tokens, device=DEVICE) > data.mask.sum(1, keepdim=True)

    def experience() -> None:
        with torch.no_grad():
            pair = [ours.gather_log_probs(logits, data.labels) for logits in (data.logits, data.ref_logits)]
            rewards = ours.compute_rewards(settings, prompts, *pair, data.scores, data.mask).masked_fill(
                past, 0
            )
            ours.get_advantages_and_returns(settings, data.values.masked_fill(past, 0), rewards, 0)

    def loss() -> None:
        leaf = data.logits.detach().requires_grad_()
        new = ours.gather_log_probs(leaf, data.labels)
        value = data.values.detach().requires_grad_()
        policy = ours.actor_loss_fn(settings, new, new.detach(), data.advantages, data.mask)
        critic = ours.critic_loss_fn(settings, value, data.old_values, data.returns, data.mask)
        (policy + critic).backward()

    return {"experience": experience, "loss": loss}


def trlx(size: argparse.Namespace, after: bool) -> Stages:
    if not after:
        return eager_stages(size, trlx=True)
    from ppo_fast.integrations import trlx as ours

    data = batch(size)
    settings = SimpleNamespace(gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=1.0)

    def experience() -> None:
        with torch.no_grad():
            pair = [ours.logprobs_of_labels(logits, data.labels) for logits in (data.logits, data.ref_logits)]
            ours.get_advantages_and_returns(settings, data.values, pair[0] - pair[1], size.tokens)

    def loss() -> None:
        leaf = data.logits.detach().requires_grad_()
        new = ours.logprobs_of_labels(leaf, data.labels)
        value = data.values.detach().requires_grad_()
        tensors = (new, value, new.detach(), data.old_values, data.advantages, data.returns, data.mask)
        ours.loss(settings, *tensors)[0].backward()

    return {"experience": experience, "loss": loss}


def trl_1_16(size: argparse.Namespace, after: bool) -> Stages:
    """What GRPO runs on the hidden states of its model, float32."""
    from trl.trainer import utils

    import ppo_fast

    if after:
        ppo_fast.patch("trl")
    torch.manual_seed(0)
    rows = size.sequences * size.tokens
    hidden = torch.randn(rows, HIDDEN, device=DEVICE, requires_grad=True)
    weight = torch.randn(size.vocab, HIDDEN, device=DEVICE, requires_grad=True)
    labels = torch.randint(size.vocab, (rows,), device=DEVICE)

    def scored() -> tuple[Tensor, Tensor]:
        outputs = ("log_probs", "entropy")
        results = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, labels, 1.0, 32768, None, 1.0, outputs
        )
        return results[0], results[1]

    def experience() -> None:
        with torch.no_grad():
            scored()

    def loss() -> None:
        hidden.grad = weight.grad = None
        logprobs, entropy = scored()
        ((logprobs - logprobs.detach()).exp().mean() - 0.01 * entropy.mean()).backward()

    return {"experience": experience, "loss": loss}


def trl_1_12(size: argparse.Namespace, after: bool) -> dict[str, dict[str, float]]:
    """Two real updates of PPO on a model that is little but its head; the stages are told apart from outside.

    The experience begins where the last generation ends, the loss step at the first forward pass of the update.
    """
    from tiny_ppo import trainer  # a sibling, which needs TRL 1.12

    import ppo_fast

    if after:
        ppo_fast.patch("trl")
    results: dict[str, dict[str, float]] = {"experience": {}, "loss": {}}
    made = trainer(size.sequences, size.tokens, size.vocab, HIDDEN)
    from trl.experimental.ppo import ppo_trainer as theirs

    generate, forward, policy = theirs.generate, theirs.forward, made.model
    running: list[tuple[str, Any]] = []

    def enter(name: str | None) -> None:
        """End the stage that is running, and begin this one."""
        if running:
            running.pop()[1].__exit__(None, None, None)
        if name is not None:
            running.append((name, watched(results[name])))
            running[-1][1].__enter__()

    def generate_then(*args: object, **kwargs: object) -> object:
        enter(None)
        result = generate(*args, **kwargs)
        enter("experience")
        return result

    def forward_after(model: object, *args: object, **kwargs: object) -> object:
        if model is policy and running[-1][0] == "experience":
            enter("loss")
        return forward(model, *args, **kwargs)

    theirs.generate, theirs.forward = generate_then, forward_after
    made.train()
    enter(None)
    return results  # of the second update, since each one writes over the last


TRAINERS: dict[str, Callable[[argparse.Namespace, bool], Any]] = {
    "deepspeed_chat": deepspeed_chat,
    "trlx": trlx,
    "trl-1.12": trl_1_12,
    "trl-1.16": trl_1_16,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("when", choices=["before", "after"])
    for name, default in (("sequences", 8), ("tokens", 128), ("vocab", 32000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    size = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if size.trainer.startswith("trl-"):
        folders = [PACKAGES / f"{size.trainer}.0", PACKAGES / "datasets"]
        sys.path[:0] = [str(folder) for folder in folders if folder.exists()]
        if not folders[1].exists():
            from unittest.mock import MagicMock

            sys.modules["datasets"] = MagicMock(name="datasets", __spec__=MagicMock())
    stages = TRAINERS[size.trainer](size, size.when == "after")
    if size.trainer != "trl-1.12":
        stages = {name: measured(stage, size.rounds) for name, stage in stages.items()}
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
