"""How a text becomes tokens, the same in fine-tuning, in reward training and in PPO."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def opening_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The token that this tokenizer puts before every text: [BOS], or nothing.

    Whatever else it adds stays out: an EOS after the prompt would end the text before the response begins.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Tokens of a text alone, no special token added; special tokens written in it are kept."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)
