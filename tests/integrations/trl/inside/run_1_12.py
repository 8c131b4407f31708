"""Real runs of TRL 1.12's PPO trainer on a tiny GPT-NeoX: with and without the patch, option by option.

Tolerance: metrics 1e-4 relative, 1e-5 absolute, weights 1e-5 after three updates of two epochs; both runs sample the
same tokens. The optimiser is SGD: a bias without effect has a gradient of mere rounding, which Adam would blow up.
"""

from pathlib import Path
from unittest.mock import DEFAULT
from unittest.mock import patch as replaced

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

import ppo_fast
from ppo_fast.integrations.trl import FusedPPOTrainer

WORDS = 40
UPDATES = 3


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(WORDS))])}
    raw = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )


class Probe(TrainerCallback):
    """What a callback sees, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def on_train_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.seen.append(("begin", state.max_steps, state.logging_steps))

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.seen.append(("step", state.global_step, state.episode))

    def on_save(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.seen.append(("save", state.global_step, state.episode))

    def on_train_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.seen.append(("end", state.global_step, state.episode))


def trainer(cls: type[PPOTrainer], folder: Path, **options: object) -> tuple[PPOTrainer, Probe]:
    torch.manual_seed(0)
    words = tokenizer()
    shape = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "initializer_range": 0.3,  # so that what the models say differs from token to token
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
    }
    config = GPTNeoXConfig(**shape)
    policy, reference = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    head = GPTNeoXConfig(**shape, num_labels=1)
    reward, value = (AutoModelForSequenceClassification.from_config(head) for _ in range(2))
    prompts = [{"input_ids": torch.randint(3, len(words), (4 + i % 3,)).tolist()} for i in range(32)]
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 1,
        "num_ppo_epochs": 2,
        "total_episodes": 8 * UPDATES,
        "local_rollout_forward_batch_size": 3,
        "response_length": 7,
        "learning_rate": 0.05,
        "optim": "sgd",
        "temperature": 0.9,
        "num_sample_generations": 0,
        "save_strategy": "no",
        "logging_steps": 0.5,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
    }
    probe = Probe()
    made = cls(
        args=PPOConfig(**(settings | options)),
        processing_class=words,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts[:8],
        callbacks=[probe],
    )
    return made, probe


def run(cls: type[PPOTrainer], folder: Path, **options: object) -> tuple[list[dict], dict, list]:
    made, probe = trainer(cls, folder, **options)
    np.random.seed(1)
    torch.manual_seed(1)
    made.train()
    weights = {name: x.detach().clone() for name, x in made.model.state_dict().items()}
    return made.state.log_history, weights, probe.seen


def compare(theirs: tuple, ours: tuple) -> None:
    (logs, weights, seen), (our_logs, our_weights, our_seen) = theirs, ours
    assert our_seen == seen
    assert len(our_logs) == len(logs) == UPDATES
    for a, b in zip(our_logs, logs, strict=True):
        assert list(a) == list(b)
        for name in set(b) - {"eps"}:  # episodes a second
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    for name, value in weights.items():
        torch.testing.assert_close(our_weights[name], value, rtol=1e-4, atol=1e-5)
    assert (
        len({log["objective/kl"] for log in logs}) == UPDATES
    )  # the runs learn, and so differ from step to step


OPTIONS: dict[str, dict[str, object]] = {
    "as it comes": {},
    "k3, whitened rewards": {
        "kl_estimator": "k3",
        "whiten_rewards": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
    },
    "two minibatches": {
        "num_mini_batches": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "no stop token": {"stop_token": None, "missing_eos_penalty": None},
    "other coefficients": {
        "gamma": 0.9,
        "lam": 0.5,
        "kl_coef": 0.3,
        "cliprange": 0.01,
        "cliprange_value": 0.02,
        "vf_coef": 0.7,
        "temperature": 1.3,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_patched_trainer_trains_alike(name: str, tmp_path: Path) -> None:
    theirs = run(PPOTrainer, tmp_path / "theirs", **OPTIONS[name])
    record = ppo_fast.patch("trl")
    try:
        ours = run(PPOTrainer, tmp_path / "ours", **OPTIONS[name])
    finally:
        ppo_fast.unpatch("trl")
    compare(theirs, ours)
    assert record.calls["trl.experimental.ppo.ppo_trainer.PPOTrainer.train"] == 1


def test_the_subclass_trains_alike(tmp_path: Path) -> None:
    """With what happens between the updates: a checkpoint, samples, callbacks."""
    options = {"save_strategy": "steps", "save_steps": 2, "num_sample_generations": 1}
    theirs = run(PPOTrainer, tmp_path / "theirs", **options)
    ours = run(FusedPPOTrainer, tmp_path / "ours", **options)
    compare(theirs, ours)
    assert ("save", 2, 16) in ours[2]
    files = {path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*")}
    assert files == {path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*")}


def test_the_ops_are_called(tmp_path: Path) -> None:
    """One pass over the logits of each micro-batch, and one estimate an update."""
    names = ("logprobs_and_entropy_from_logits", "logprobs_from_logits", "gae", "policy_loss", "value_loss")
    with replaced.multiple(ppo_fast, **{name: DEFAULT for name in names}) as spies:
        originals = {name: getattr(ppo_fast.ops.logits, name, None) for name in names}
        originals |= {"gae": ppo_fast.ops.tokens.gae}
        originals |= {name: getattr(ppo_fast.ops.losses, name) for name in ("policy_loss", "value_loss")}
        for name, spy in spies.items():
            spy.side_effect = originals[name]
        run(FusedPPOTrainer, tmp_path)
    calls = {name: spy.call_count for name, spy in spies.items()}
    steps, parts = UPDATES * 2 * 2, UPDATES * 3  # updates x epochs x micro-batches; updates x rollout parts
    assert calls == {
        "logprobs_and_entropy_from_logits": steps,
        "policy_loss": steps,
        "value_loss": steps,
        "logprobs_from_logits": 2 * parts,
        "gae": UPDATES,
    }
