"""TRL 1.12's PPO trainer on a GPT-NeoX of one layer, whose time and memory are those of its vocabulary."""

import tempfile

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedTokenizerFast,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


def trainer(sequences: int, tokens: int, vocab: int, hidden: int) -> PPOTrainer:
    """Two updates of one epoch, in one micro-batch each, of prompts of 8 tokens and responses of `tokens`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1}, unk_token="[EOS]")),
        pad_token="[PAD]",
        eos_token="[EOS]",
        padding_side="left",
    )
    shape = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    policy, reference = (AutoModelForCausalLM.from_config(GPTNeoXConfig(**shape)) for _ in range(2))
    scalar = GPTNeoXConfig(**shape, num_labels=1)
    reward, value = (AutoModelForSequenceClassification.from_config(scalar) for _ in range(2))
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=sequences,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=2 * sequences,
        local_rollout_forward_batch_size=sequences,
        response_length=tokens,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        disable_tqdm=True,
    )
    prompts = [{"input_ids": torch.randint(2, vocab, (8,)).tolist()} for _ in range(2 * sequences)]
    return PPOTrainer(
        args=args,
        processing_class=words,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts,
    )
