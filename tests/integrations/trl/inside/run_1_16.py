"""Real runs of TRL 1.16's GRPO and RLOO trainers on a tiny GPT-NeoX: with and without the patch.

Tolerance: what is logged 1e-4 relative, 1e-5 absolute, weights 1e-5 after three steps; both sample the same tokens. The
optimiser is SGD: a bias without effect has a gradient of mere rounding, which Adam would blow up.
"""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedTokenizerFast, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import ppo_fast

WORDS, STEPS = 40, 3
UNCOMPARED = ("time", "runtime", "per_second", "mfu")


def words() -> PreTrainedTokenizerFast:
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(WORDS))])
    }
    raw = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", padding_side="left"
    )


def reward(completions: list[str], **kwargs: object) -> list[float]:
    """How many of the words are even."""
    return [
        sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in text.split()) for text in completions
    ]


def run(name: str, folder: Path, **options: object) -> tuple[list[dict], dict[str, torch.Tensor]]:
    trainer_class, config_class = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[name]
    set_seed(0)
    tokenizer = words()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")  # where the reference is loaded from too
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 7,
        "max_steps": STEPS,
        "num_iterations": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "temperature": 0.9,
        "seed": 3,
    }
    prompts = [" ".join(f"w{(i * 7 + j) % WORDS}" for j in range(4 + i % 3)) for i in range(16)]
    trainer = trainer_class(
        model=model,
        reward_funcs=reward,
        args=config_class(**(settings | options)),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    weights = {key: x.detach().clone() for key, x in trainer.model.state_dict().items()}
    return trainer.state.log_history, weights


OPTIONS: dict[str, dict[str, object]] = {
    "as it comes": {},
    "KL to the reference": {"beta": 0.1},
    "entropy bonus": {"entropy_coef": 0.01},
    "head in float32": {"cast_lm_head_to_fp32": True},
    "sequence ratios": {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon_high": 0.3},
}


@pytest.mark.parametrize(("name", "options"), [("grpo", x) for x in OPTIONS] + [("rloo", "as it comes")])
def test_the_patched_trainer_trains_alike(name: str, options: str, tmp_path: Path) -> None:
    theirs, weights = run(name, tmp_path / "theirs", **OPTIONS[options])
    record = ppo_fast.patch("trl")
    try:
        ours, our_weights = run(name, tmp_path / "ours", **OPTIONS[options])
    finally:
        ppo_fast.unpatch("trl")
    assert len(ours) == len(theirs) > STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            if not any(part in key for part in UNCOMPARED):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5, nan_ok=True), key
    for key, value in weights.items():
        torch.testing.assert_close(our_weights[key], value, rtol=1e-4, atol=1e-5)
    assert len({log["loss"] for log in theirs if "loss" in log}) > 1
    assert record.calls["trl.kernels.chunked_logprob.ChunkedLogProbFunction.apply"] >= STEPS
