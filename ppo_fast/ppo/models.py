"""The four models: how they are loaded, checked against one another, and asked for logits, values and scores.

Reward model and critic are one kind of thing: a sequence classifier with one label, whose head is read at the last
real token (reward) or at every token (critic). `config.score_bias`, written by ``ppo-fast reward``, is subtracted in
both readings, so that a critic copied from the reward model starts on the reward's own scale.

Nothing here is ever put into train mode: dropout stays off in scoring and in the update, so that the first ratio of
an update is 1 and not the noise of two dropout masks.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from ppo_fast.ppo.config import ModelsConfig
from ppo_fast.ppo.parallel import local_rank


def resolve_device(name: str) -> torch.device:
    """`auto` becomes cuda where there is one, else cpu; an unusable device raises ValueError.

    `cuda` without a number is the GPU of this process: the one with its number on the machine, LOCAL_RANK.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"models.device is {name!r}, expected `auto` or a torch device: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"models.device is {name!r}, but torch sees no CUDA device")
    if device.type == "cuda" and device.index is None and local_rank():
        if local_rank() >= torch.cuda.device_count():
            raise ValueError(
                f"models.device is {name!r}: this is process {local_rank()} of the machine, which has "
                f"{torch.cuda.device_count()} GPU(s): expected a GPU for each process"
            )
        return torch.device("cuda", local_rank())
    return device


def load_tokenizer(source: str, field: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Tokenizer of a model folder; `field` is the setting that an error names."""
    tokenizer = _load(AutoTokenizer.from_pretrained, source, field, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{field}: the tokenizer of {source!r} has no EOS token, expected one to end responses"
        )
    return tokenizer


def load_causal_lm(source: str, field: str, config: ModelsConfig) -> PreTrainedModel:
    """A causal LM in `config.dtype`, in eval mode, on its device."""
    return _load_model(AutoModelForCausalLM, source, field, config)


def load_classifier(source: str, field: str, config: ModelsConfig) -> PreTrainedModel:
    """A one-label sequence classifier; ValueError where it has more labels."""
    model = _load_model(AutoModelForSequenceClassification, source, field, config)
    if model.config.num_labels != 1:
        raise ValueError(
            f"{field}: {source!r} has {model.config.num_labels} labels, expected a model with num_labels=1"
        )
    return model


def sizes_without_loading(source: str, kind: Any, config: ModelsConfig) -> PreTrainedModel | None:
    """The model of a folder as sizes alone, on torch's `meta` device; None where its config cannot be read.

    `kind` is an Auto class. Loading the folder will say what is wrong with it.
    """
    trust = config.trust_remote_code
    try:
        settings = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        with torch.device("meta"):
            return kind.from_config(settings, trust_remote_code=trust)
    except (OSError, ValueError):
        return None


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """No parameter asks for a gradient; eval mode."""
    return model.requires_grad_(False).eval()


def critic_from_classifier(reward_model: PreTrainedModel) -> PreTrainedModel:
    """A trainable copy of the reward model: values start at the score that the text so far would get."""
    return copy.deepcopy(reward_model).requires_grad_(True).eval()


def critic_from_actor(actor: PreTrainedModel) -> PreTrainedModel:
    """The actor's trunk with a value head of zeros, so that every first value is 0."""
    config = copy.deepcopy(actor.config)
    config.num_labels = 1
    config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else config.eos_token_id
    critic = AutoModelForSequenceClassification.from_config(config)
    critic = critic.to(dtype=actor.dtype, device=actor.device)
    critic.base_model.load_state_dict(actor.base_model.state_dict())
    nn.init.zeros_(token_head(critic).weight)
    return critic.requires_grad_(True).eval()


def token_head(classifier: PreTrainedModel) -> nn.Linear:
    """The head that scores each token: `score` in every decoder of transformers."""
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(classifier).__name__} has no linear head named `score`, expected a decoder's sequence classifier; "
            "a reward model of another kind works with `input: text`"
        )
    return head


def check_same_vocabulary(actor: PreTrainedModel, reference: PreTrainedModel) -> None:
    """The KL needs one vocabulary: ValueError where the logits of the two differ in width."""
    widths = [model.get_output_embeddings().weight.shape[0] for model in (actor, reference)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"models.reference has a vocabulary of {widths[1]} tokens and models.actor one of {widths[0]}, "
            "expected the same"
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Tokens that a model has an embedding for, padding rows of the table included."""
    return int(cast(Tensor, model.get_input_embeddings().weight).shape[0])


def check_reads_vocabulary(model: PreTrainedModel, field: str, actor: PreTrainedModel) -> None:
    """A model that reads sampled tokens must have an embedding for each: ValueError naming `field` where it has not."""
    known, sampled = vocabulary_size(model), actor.get_output_embeddings().weight.shape[0]
    if known < sampled:
        raise ValueError(
            f"{field} has embeddings for {known} tokens, expected at least the {sampled} that models.actor can sample"
        )


def check_same_tokenizer(actor: Tokenizer, other: Tokenizer, source: str, field: str) -> None:
    """A model that reads the actor's tokens must mean the same by them: ValueError naming `field` where it does not."""
    ours, theirs = actor.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    differing = len(set(ours.items()) ^ set(theirs.items()))
    hint = ", or `input: text` for this reward" if field.startswith("rewards") else ""
    raise ValueError(
        f"{field} {source!r} has another tokenizer than models.actor ({differing} entries differ), "
        f"expected the same{hint}"
    )


def position_ids(mask: Tensor) -> Tensor:
    """Position of each token among the real ones of its row: padding on the left shifts nothing. [B, L] int64."""
    return (mask.long().cumsum(-1) - 1).clamp_(min=0)


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[Any]:
    """bfloat16 matrix products, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def response_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int, *, bf16: bool) -> Tensor:
    """Logits that predict the last `length` tokens of each row. ids, mask [B, L] -> [B, length, V].

    The head is applied to those positions only: for a prompt of P tokens the other P - 1 rows of logits are never made.
    """
    with autocast(ids.device, bf16):
        output = model(**model_inputs(model, ids, mask), logits_to_keep=length + 1, use_cache=False)
    return output.logits[:, -length - 1 : -1]


def token_scores(model: PreTrainedModel, ids: Tensor, mask: Tensor, *, bf16: bool) -> Tensor:
    """The classifier's head at every token, in float32, minus its `score_bias`. ids, mask [B, L] -> [B, L]."""
    with autocast(ids.device, bf16):
        hidden = model.base_model(
            **model_inputs(model.base_model, ids, mask), use_cache=False
        ).last_hidden_state
    head = token_head(model)
    # Not under autocast: a value in bfloat16 has two to three digits, too few for advantages.
    bias = None if head.bias is None else head.bias.float()
    scores = nn.functional.linear(hidden.float(), head.weight.float(), bias).squeeze(-1)
    return scores - getattr(model.config, "score_bias", 0.0)


def last_token_scores(model: PreTrainedModel, ids: Tensor, mask: Tensor, *, bf16: bool) -> Tensor:
    """The reward model's score of each row: its head at the last real token. ids, mask [B, L] -> [B]."""
    scores = token_scores(model, ids, mask, bf16=bf16)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (positions * mask.long()).argmax(-1, keepdim=True)
    return scores.gather(1, last).squeeze(1)


def model_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What `model.forward` takes of padded tokens."""
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    # Models with relative positions (ALiBi) take none and need none.
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = position_ids(mask)
    return inputs


def _load_model(auto: Any, source: str, field: str, config: ModelsConfig) -> PreTrainedModel:
    options = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    model = _load(auto.from_pretrained, source, field, **options)
    return model.to(resolve_device(config.device)).eval()


def _load(from_pretrained: Callable[..., Any], source: str, field: str, **options: Any) -> Any:
    if not source:
        raise ValueError(f"{field} is not set, expected a model folder or a hub name")
    is_folder = Path(source).expanduser().is_dir()
    if not is_folder and (source.startswith((".", "~", os.sep)) or source.count("/") > 1):
        raise ValueError(f"{field}: there is no folder {source!r}")
    try:
        return from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        what = (
            "cannot load the folder"
            if is_folder
            else "no such folder, and no model of the hub could be had for"
        )
        raise ValueError(f"{field}: {what} {source!r}: {error}") from error
