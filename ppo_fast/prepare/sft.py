"""Supervised fine-tuning of a causal language model: the actor that PPO starts from, and its reference."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ppo_fast.prepare.data import Row
from ppo_fast.prepare.folders import refuse_non_empty, staged
from ppo_fast.prepare.tokens import opening_ids, text_ids
from ppo_fast.prepare.training import (
    check_training,
    load_tokenizer,
    pad_right,
    require,
    resolve_device,
    token_mask,
    train_and_heldout,
    trainer_arguments,
    write_card,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEYS = (("messages",), ("prompt", "response"), ("text",))
IGNORED = -100
"""Label of a token that carries no loss; transformers' own convention."""


@dataclass
class SFTConfig:
    """Supervised fine-tuning: mean cross-entropy of the tokens to learn."""

    model: str = ""
    """Folder (or hub name) of the causal language model and its tokenizer. Required."""
    data: str = ""
    """Training rows, `.jsonl` or `.csv`: `text`; or `prompt` and `response`, learning the response alone; or a
    chat as `messages`, learning the last message, the assistant's. Required."""
    output: str = ""
    """Folder for the tuned model; absent or empty. Required."""
    heldout: str | None = None
    """Held-out rows in the same form. By default a share of `data` is held out."""
    heldout_fraction: float = 0.05
    """Share of `data` held out when `heldout` is not given."""
    max_length: int = 512
    """Longest row in tokens; the rest is cut off. 512 holds most chats and suits a small GPU."""
    append_eos: bool = True
    """End every row that was not cut with EOS, so that the model learns to stop."""
    epochs: float = 1.0
    """Passes over the data. One, because small sets are memorised in more."""
    batch_size: int = 16
    """Rows of one forward and backward pass."""
    gradient_accumulation: int = 1
    """Passes per optimiser step; the effective batch is `batch_size` times this."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW: mild, for a pretrained model; one from scratch wants about 1e-3."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay per step, in units of the learning rate."""
    autocast: bool = False
    """Compute in bfloat16 under autocast; the weights being trained stay float32."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    seed: int = 0
    """Seed of the split, the order of rows and dropout."""


@dataclass(frozen=True)
class Example:
    """One encoded row."""

    ids: list[int]
    """Token ids, at most `max_length`."""
    labels: list[int]
    """The same ids where the loss counts, -100 elsewhere."""


def run_sft(config: SFTConfig) -> dict[str, float]:
    """Fine-tune and save to `config.output`: model, tokenizer, `metrics.json`, a model card.

    The weights are trained in float32 and saved in the type that the model folder had.

    Returns:
        `heldout_loss_before`, `heldout_loss_after` (nats per token), `heldout_perplexity_*`,
        `heldout_token_accuracy_*`, `train_rows`, `heldout_rows`, `skipped_rows`.

    Raises:
        FileNotFoundError: a data file does not exist. ValueError: a field is out of range, a row is broken,
        or the output folder is not empty; nothing is written.
    """
    check_training(config)
    output = refuse_non_empty(config.output)
    device = resolve_device(config.device)
    train_rows, heldout_rows = train_and_heldout(config, KEYS)
    tokenizer = load_tokenizer(config.model)
    train = encode_rows(train_rows, tokenizer, config)
    heldout = encode_rows(heldout_rows, tokenizer, config)
    require(
        bool(train and heldout), "max_length", config.max_length, "room for something to learn in some row"
    )
    model, saved_dtype = _load_model(config.model, device)
    before = evaluate(model, heldout, config.batch_size)
    _report("before", before)
    _train(model, train, tokenizer, config, device)
    after = evaluate(model, heldout, config.batch_size)
    _report("after", after)
    metrics = {
        **{f"heldout_{name}_before": value for name, value in before.items()},
        **{f"heldout_{name}_after": value for name, value in after.items()},
        "train_rows": len(train),
        "heldout_rows": len(heldout),
        "skipped_rows": len(train_rows) + len(heldout_rows) - len(train) - len(heldout),
    }
    with staged(output) as folder:
        torch.nn.Module.to(model, saved_dtype)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        _write_card(folder, config, metrics)
    return metrics


def encode_rows(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", config: SFTConfig
) -> list[Example]:
    """Encode rows of any of the three forms, leaving out those whose prompt alone fills `max_length`.

    Prompt and response are tokenised apart and joined, as in PPO, where the response is generated after the
    prompt's tokens; a response that follows in the same line therefore brings its own leading space.
    """
    examples = []
    for number, row in enumerate(rows, start=1):
        prompt, response = _prompt_and_response(row, number, tokenizer)
        # A chat template writes its own opening token.
        prompt_ids = [] if row.get("messages") is not None else opening_ids(tokenizer)
        prompt_ids = prompt_ids + (text_ids(tokenizer, prompt) if prompt else [])
        ids = prompt_ids + text_ids(tokenizer, response)
        if config.append_eos and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        ids = ids[: config.max_length]
        labels = [IGNORED] * min(len(prompt_ids), len(ids)) + ids[len(prompt_ids) :]
        # The first token of a row is predicted from nothing: it carries no loss either.
        if any(label != IGNORED for label in labels[1:]):
            examples.append(Example(ids, labels))
    return examples


def _prompt_and_response(row: Row, number: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    if row.get("messages") is not None:
        return _chat(row["messages"], number, tokenizer)
    keys = ("prompt", "response") if row.get("response") is not None else ("text",)
    for key in keys:
        require(isinstance(row.get(key), str), f"row {number}: {key}", row.get(key), "text")
    return ("", row["text"]) if keys == ("text",) else (row["prompt"], row["response"])


def _chat(messages: Any, number: int, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    """Split the rendered chat before the last message; what the template writes after EOS is dropped."""
    where = f"row {number}: messages"
    well_formed = isinstance(messages, list) and all(isinstance(m, dict) and "role" in m for m in messages)
    require(
        well_formed and len(messages) >= 2,
        where,
        messages,
        "a list of at least 2 objects with role and content",
    )
    require(messages[-1]["role"] == "assistant", where, messages[-1]["role"], "the last role to be assistant")
    require(
        bool(tokenizer.chat_template), "model", "a tokenizer without a chat template", "one, to read messages"
    )
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    require(whole.startswith(prompt), where, whole[:60], "a chat template that only ever appends")
    response, eos, _ = whole[len(prompt) :].partition(tokenizer.eos_token)
    return prompt, response + eos


def evaluate(model: "PreTrainedModel", examples: Sequence[Example], batch_size: int) -> dict[str, float]:
    """Mean cross-entropy over all tokens that count (not over rows), and greedy token accuracy.

    Returns:
        `loss` in nats per token, `perplexity` = exp(loss), `token_accuracy` in [0, 1].
    """
    model.eval()
    loss = correct = count = 0.0
    # Rows of like length together: less padding to compute.
    ordered = sorted(examples, key=lambda example: len(example.ids))
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], pad=0)
            logits = model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
            ).logits[:, :-1]
            labels = batch["labels"][:, 1:].to(model.device)
            kept = labels != IGNORED
            loss += float(cross_entropy(logits[kept].float(), labels[kept], reduction="sum"))
            correct += float((logits[kept].argmax(-1) == labels[kept]).sum())
            count += float(kept.sum())
    mean = loss / count
    # A diverged model's perplexity is past the largest float: infinite rather than an OverflowError.
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return {"loss": mean, "perplexity": perplexity, "token_accuracy": correct / count}


def collate(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    """Batch of `input_ids`, `attention_mask` and `labels`, each int64 [B, L], padded on the right."""
    ids = [example.ids for example in examples]
    labels = [example.labels for example in examples]
    return {
        "input_ids": pad_right(ids, pad),
        "attention_mask": token_mask(ids),
        "labels": pad_right(labels, IGNORED),
    }


def _load_model(folder: str, device: torch.device) -> tuple["PreTrainedModel", torch.dtype]:
    """The model in float32, and the type that its folder had."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    except OSError as error:
        raise ValueError(f"model: no causal language model in {folder!r}: {error}") from error
    saved_dtype = model.dtype
    return model.float().to(device), saved_dtype


def _train(
    model: "PreTrainedModel",
    examples: list[Example],
    tokenizer: "PreTrainedTokenizerBase",
    config: SFTConfig,
    device: torch.device,
) -> None:
    from transformers import Trainer

    with trainer_arguments(config, device, len(examples)) as arguments:
        Trainer(
            model=model,
            args=arguments,
            train_dataset=examples,
            data_collator=lambda batch: collate(batch, pad=tokenizer.pad_token_id),
        ).train()


def _report(when: str, metrics: dict[str, float]) -> None:
    print(
        f"held-out {when}: loss {metrics['loss']:.3f} nats/token, perplexity {metrics['perplexity']:.2f}, "
        f"token accuracy {metrics['token_accuracy']:.3f}",
        flush=True,
    )


def _write_card(folder: Path, config: SFTConfig, metrics: dict[str, float]) -> None:
    table = [
        "| held-out | before | after |",
        "|---|---|---|",
        *(
            f"| {name} | {metrics[f'heldout_{key}_before']:.4f} | {metrics[f'heldout_{key}_after']:.4f} |"
            for name, key in (
                ("loss, nats per token", "loss"),
                ("perplexity", "perplexity"),
                ("token accuracy", "token_accuracy"),
            )
        ),
    ]
    settings = json.dumps(dataclasses.asdict(config), indent=2)
    lines = [
        f"`{Path(config.model).name}` fine-tuned with `ppo-fast sft` on {metrics['train_rows']} rows.",
        "",
        *table,
        "",
        "Settings:",
        "",
        f"```json\n{settings}\n```",
    ]
    write_card(folder, "Supervised fine-tuned language model", "text-generation", lines)
