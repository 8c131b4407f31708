"""Peak memory of a PPO step's scoring and policy loss, from hidden states and with the reference's whole logits.

    python bench/trainer_memory.py runs/reviews/lm [--sequences 16] [--tokens 128]

Each in a process of its own, on random tokens in the place of a rollout, with the demo's bfloat16 products. Reported is
how far the resident memory rises above what stands after the models are loaded (Linux).
"""

import argparse
import copy
import subprocess
import sys
import time
from typing import Any

import torch
from measure import extra_bytes

IMPLS = ("auto", "reference")
PROMPT = 32


def trainer_of(folder: str, impl: Any, sequences: int, tokens: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ppo_fast.ppo import PPOConfig, PPOTrainer
    from ppo_fast.ppo.config import ModelsConfig, ObjectiveConfig, RolloutConfig
    from ppo_fast.ppo.models import critic_from_actor
    from ppo_fast.ppo.rewards import FunctionReward
    from ppo_fast.ppo.rollout import encode_prompts

    actor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = PPOConfig(
        impl=impl,
        models=ModelsConfig(autocast=True),
        rollout=RolloutConfig(batch_size=sequences, max_new_tokens=tokens),
        objective=ObjectiveConfig(epochs=1, minibatches=1, micro_batch_size=sequences),
    )
    return PPOTrainer(
        config,
        actor=actor,
        critic=critic_from_actor(actor),
        reference=copy.deepcopy(actor),
        reward=FunctionReward("length", lambda prompts, responses: [1.0] * len(prompts)),
        tokenizer=tokenizer,
        prompts=encode_prompts([{"prompt": "The film"}], tokenizer, "prompts"),
    )


def rollout_of(vocab: int, sequences: int, tokens: int) -> Any:
    from ppo_fast.records import Rollout

    def real(columns: int) -> torch.Tensor:
        return torch.ones(sequences, columns, dtype=torch.bool)

    return Rollout(
        prompt_ids=torch.randint(vocab, (sequences, PROMPT)),
        prompt_mask=real(PROMPT),
        response_ids=torch.randint(vocab, (sequences, tokens)),
        response_mask=real(tokens),
        ended=torch.zeros(sequences, dtype=torch.bool),
        prompts=[""] * sequences,
        responses=[""] * sequences,
    )


def measure(folder: str, impl: str, sequences: int, tokens: int) -> None:
    """Print megabytes and seconds of scoring, and of the policy loss with its backward."""
    trainer = trainer_of(folder, impl, sequences, tokens)
    rollout = rollout_of(trainer.actor.model.config.vocab_size, sequences, tokens)
    kept: list[Any] = []

    def scoring() -> None:
        kept.append(trainer.score(rollout))

    def loss() -> None:
        rows, count = slice(0, sequences), torch.tensor(float(sequences * tokens))
        experience = trainer.experience(kept[0])
        trainer.updater.policy_loss(kept[0], experience, rows, count).loss.backward()

    for run in (scoring, loss):
        start = time.perf_counter()
        peak = extra_bytes(run) or 0
        print(round(peak / 1e6), round(time.perf_counter() - start, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--impl", choices=IMPLS, help="only this one, in this process")
    arguments = parser.parse_args()
    if arguments.impl:
        measure(arguments.folder, arguments.impl, arguments.sequences, arguments.tokens)
        return
    print("| impl | scoring, MB | scoring, s | policy loss, MB | policy loss, s |\n|---|---|---|---|---|")
    for impl in IMPLS:
        sizes = ("--sequences", str(arguments.sequences), "--tokens", str(arguments.tokens))
        command = [sys.executable, __file__, arguments.folder, *sizes, "--impl", impl]
        figures = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        print(f"| {impl} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
