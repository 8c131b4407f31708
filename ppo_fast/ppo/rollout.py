"""Prompts in, sampled responses out.

Layout: prompts are padded on the left, responses on the right, so that token t of every response stands in column t.
Masks are made from lengths and from the first end token, never from pad ids: an end token counts as an action
(the policy chose it), a pad never does, even where a tokenizer gives both the same id.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ppo_fast.ppo.config import RolloutConfig
from ppo_fast.ppo.interruption import EndGeneration, StopSignal
from ppo_fast.ppo.models import autocast, vocabulary_size
from ppo_fast.ppo.sampling import SeededSampling, fresh_seeds
from ppo_fast.prepare.tokens import opening_ids, text_ids
from ppo_fast.records import Rollout

PAD_FILLER = 0


@dataclass(frozen=True)
class Prompt:
    """One prompt: what the user gave, as text, and its tokens."""

    text: str
    ids: tuple[int, ...]


def encode_prompts(records: Sequence[dict[str, Any]], tokenizer: Tokenizer, where: str) -> list[Prompt]:
    """Tokens of each record's `prompt`, or of its `messages` through the tokenizer's chat template.

    Raises ValueError naming `where` and the record's number for an empty prompt or a tokenizer without template.
    """
    prompts = []
    for number, record in enumerate(records, start=1):
        if record.get("messages") is not None:
            if tokenizer.chat_template is None:
                raise ValueError(
                    f"{where}: record {number} has `messages`, but the tokenizer has no chat template"
                )
            chat = _chat(record["messages"], f"{where}: record {number}")
            for turn in chat:
                _check_text(turn["content"], f"{where}: record {number}")
            try:
                text = str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            except TemplateError as error:
                raise ValueError(
                    f"{where}: record {number}: the chat template refuses it: {error}"
                ) from error
            ids = text_ids(tokenizer, text)
        else:
            text = record["prompt"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{where}: record {number} has the prompt {text!r}, expected text that is not blank"
                )
            _check_text(text, f"{where}: record {number}")
            ids = opening_ids(tokenizer) + text_ids(tokenizer, text)
        if not ids:
            raise ValueError(f"{where}: record {number} has a prompt without tokens: {text!r}")
        prompts.append(Prompt(text, tuple(ids)))
    return prompts


def check_prompts(
    prompts: Sequence[Prompt], model: PreTrainedModel, field: str, new_tokens: int, where: str
) -> None:
    """Every prompt and a full response must fit the model that `field` names: its context and its vocabulary.

    Raises ValueError naming the first record that does not.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    known = vocabulary_size(model)
    for number, prompt in enumerate(prompts, start=1):
        if limit is not None and len(prompt.ids) + new_tokens > limit:
            raise ValueError(
                f"{where}: record {number} has {len(prompt.ids)} tokens; with rollout.max_new_tokens={new_tokens} "
                f"that is over the context of {field}, {limit} tokens: shorten the prompt ({prompt.text[:60]!r}...)"
            )
        if max(prompt.ids) >= known:
            raise ValueError(
                f"{where}: record {number} has token {max(prompt.ids)}, but {field} knows {known} tokens: "
                "the tokenizer is of another model"
            )


class PromptSampler:
    """Draws prompts without replacement, reshuffled at each pass; its whole state is two integers."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts = prompts
        self.seed = seed
        self.drawn = 0

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        chosen: list[Prompt] = []
        while len(chosen) < count:
            epoch, place = divmod(self.drawn, len(self.prompts))
            rows = self._order(epoch)[place : place + count - len(chosen)]
            chosen += [self.prompts[row] for row in rows]
            self.drawn += len(rows)
        return chosen

    def _order(self, epoch: int) -> list[int]:
        # A prime apart: the second pass of one seed is not the first of the next.
        generator = torch.Generator().manual_seed(self.seed + 100_003 * epoch)
        return torch.randperm(len(self.prompts), generator=generator).tolist()


def generate(
    actor: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: RolloutConfig,
    *,
    bf16: bool = False,
    stop: StopSignal | None = None,
    seeds: Sequence[int] | None = None,
    prompt_width: int = 0,
) -> Rollout:
    """One sampled response a prompt, from softmax(logits / temperature) and nothing else unless top_p or top_k ask.

    The model's own generation settings (repetition penalty, minimum length, top-k 50 by default) are set aside while
    sampling: each would make the sampled distribution another one than the scored one, and the KL meaningless.

    `seeds`, one a prompt, fix each response's random numbers by themselves: whatever else is sampled beside it, here
    or by another process, the draws are the same. None: seeds from torch's global generator. Prompts are padded to
    `prompt_width` tokens at least.

    Raises Interrupted within one token of a stop that was asked for.
    """
    stop = stop or StopSignal()
    size = config.generation_batch_size or len(prompts)
    ends = end_token_ids(actor, tokenizer)
    pad = pad_token_id(tokenizer)
    ids, mask = left_pad(prompts, pad, actor.device, prompt_width)
    seeds = fresh_seeds(len(prompts)) if seeds is None else seeds
    chunks = []
    with torch.no_grad(), _own_generation_config(actor, GenerationConfig()), autocast(actor.device, bf16):
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            sampled = cast(
                Any, actor
            ).generate(
                input_ids=ids[rows],
                attention_mask=mask[rows].long(),
                stopping_criteria=[EndGeneration(stop)],
                generation_config=generation_config(config, ends, pad),
                logits_processor=LogitsProcessorList([SeededSampling(config, seeds[rows], ids.device)]),
                synced_gpus=False,  # each process stops by itself: no rank waits for another's longest response
            )
            stop.check()
            chunks.append(_widen(sampled[:, ids.shape[1] :], config.max_new_tokens, pad))
    response_ids = torch.cat(chunks)
    response_mask = counted_tokens(response_ids, ends)
    longest = int(response_mask.sum(1).max())
    response_ids, response_mask = response_ids[:, :longest], response_mask[:, :longest]
    return Rollout(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=response_ids.masked_fill(~response_mask, pad),
        response_mask=response_mask,
        ended=ended(response_ids, response_mask, ends),
        prompts=[prompt.text for prompt in prompts],
        responses=decode(tokenizer, response_ids, response_mask),
    )


def generation_config(config: RolloutConfig, ends: list[int], pad: int) -> GenerationConfig:
    """Generation settings that leave the choice of tokens to `SeededSampling` alone: the largest of its scores."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
    )


def pad_token_id(tokenizer: Tokenizer) -> int:
    """The tokenizer's pad, or any id where it has none: masks say what counts."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else PAD_FILLER


def end_token_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end a response: the tokenizer's EOS and those of the model's generation settings."""
    configured = model.generation_config.eos_token_id
    more = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, *(token for token in more if token is not None)})


def left_pad(
    prompts: Sequence[Prompt], pad: int, device: torch.device, width: int = 0
) -> tuple[Tensor, Tensor]:
    """Prompts flush right: ids [B, P] int64 and mask [B, P] bool, P the longest prompt or `width` if that is more."""
    width = max(width, *(len(prompt.ids) for prompt in prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = True
    return ids.to(device), mask.to(device)


def counted_tokens(response_ids: Tensor, ends: Sequence[int]) -> Tensor:
    """True up to and including the first end token of each row. [B, T] int64 -> [B, T] bool."""
    is_end = torch.isin(response_ids, torch.tensor(ends, device=response_ids.device))
    ends_before = is_end.long().cumsum(1) - is_end.long()
    return ends_before == 0


def ended(response_ids: Tensor, response_mask: Tensor, ends: Sequence[int]) -> Tensor:
    """True where a response holds an end token, False where it was truncated. [B] bool."""
    is_end = torch.isin(response_ids, torch.tensor(ends, device=response_ids.device))
    return (is_end & response_mask).any(1)


def first_rows(rollout: Rollout, count: int) -> Rollout:
    """The first `count` rows."""
    fields = {field.name: getattr(rollout, field.name)[:count] for field in dataclasses.fields(rollout)}
    return Rollout(**fields)


def widen_responses(rollout: Rollout, width: int, pad: int) -> Rollout:
    """The rollout with response columns up to `width`: what is added is masked."""
    more = width - rollout.response_ids.shape[1]
    ids = torch.nn.functional.pad(rollout.response_ids, (0, more), value=pad)
    mask = torch.nn.functional.pad(rollout.response_mask, (0, more), value=False)
    return dataclasses.replace(rollout, response_ids=ids, response_mask=mask)


def decode(tokenizer: Tokenizer, response_ids: Tensor, response_mask: Tensor) -> list[str]:
    """Text of each response's counted tokens, special tokens left out."""
    rows = zip(response_ids.tolist(), response_mask.tolist(), strict=True)
    kept = [[token for token, counts in zip(ids, mask, strict=True) if counts] for ids, mask in rows]
    return tokenizer.batch_decode(kept, skip_special_tokens=True)


def _check_text(text: str, where: str) -> None:
    """Text that a tokenizer can take: UTF-8 holds it, and no character is NUL."""
    bad = next(
        (place for place, letter in enumerate(text) if letter == "\0" or "\ud800" <= letter <= "\udfff"), None
    )
    if bad is not None:
        kind = "a NUL character" if text[bad] == "\0" else "half of a surrogate pair"
        raise ValueError(f"{where} has {kind} at place {bad} of its text, expected Unicode text")


def _chat(messages: Any, where: str) -> list[dict[str, str]]:
    """`messages` if they are a chat: a list of {role, content}, both text."""

    def is_turn(message: Any) -> bool:
        keys = ("role", "content")
        return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in keys)

    good = isinstance(messages, list) and bool(messages) and all(map(is_turn, messages))
    if not good:
        raise ValueError(
            f"{where} has `messages` that are no list of {{role, content}}: {str(messages)[:80]}"
        )
    return messages


def _widen(response_ids: Tensor, width: int, pad: int) -> Tensor:
    return torch.nn.functional.pad(response_ids, (0, width - response_ids.shape[1]), value=pad)


@contextmanager
def _own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's generation settings: generate fills what a given config leaves unset from them."""
    saved = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = saved
