"""What stands between a causal LM's last hidden state and its logits, so that the ops can take the former.

The rule: a head is used from hidden states where it is a plain `nn.Linear`, and where the model's own logits of a few
tokens are those that the head makes of its trunk's last hidden state, with the scale and the softcap of its config.
Any other model (a head wrapped in adapters, a projection or a mask in between, a head that ZeRO-3 holds in shards until
its own forward) is asked for its logits, then whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ppo_fast.ops.linear_chunks import rows_of_a_chunk
from ppo_fast.ops.sharded_head import is_partitioned
from ppo_fast.ppo.models import autocast, model_inputs

PROBE_TOKENS = 4
PROBE_ROUNDINGS = 32  # in units of the dtype's own, at the size of the largest logit


@dataclass(frozen=True)
class HeadForm:
    """logits = cap(hidden @ weight.T + bias) * scale."""

    softcap: float | None
    scale: float


_FORMS: WeakKeyDictionary[nn.Module, HeadForm | None] = WeakKeyDictionary()


def head_form(model: PreTrainedModel) -> HeadForm | None:
    """How the model makes its logits of its last hidden state; None where they must be asked of the model itself."""
    if model not in _FORMS:
        _FORMS[model] = _probed(model)
    return _FORMS[model]


def head_of(model: PreTrainedModel, *, bf16: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head as it stands; in bfloat16 where products are to be."""
    head = cast(nn.Linear, model.get_output_embeddings())
    if not bf16:
        return head.weight, head.bias
    return head.weight.bfloat16(), None if head.bias is None else head.bias.bfloat16()


def response_hidden(model: PreTrainedModel, ids: Tensor, mask: Tensor, length: int, *, bf16: bool) -> Tensor:
    """Last hidden states that predict the last `length` tokens of each row. ids, mask [B, L] -> [B, length, D]."""
    trunk = model.base_model
    with autocast(ids.device, bf16):
        hidden = trunk(**model_inputs(trunk, ids, mask), use_cache=False).last_hidden_state
    hidden = hidden[:, -length - 1 : -1]
    return hidden.bfloat16() if bf16 else hidden


@lru_cache
def settled_chunk_rows(rows: int, vocab: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a chunk for so many rows, the same for a whole process.

    So old log-probabilities and those of the first pass of an update, where masked rows are left out, come of products
    of one shape, and the first ratio is 1 whatever memory is free by then.
    """
    return rows_of_a_chunk(rows, vocab * width * dtype.itemsize, vocab * dtype.itemsize, device, 0)


@torch.no_grad()
def _probed(model: PreTrainedModel) -> HeadForm | None:
    head, trunk = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or trunk is model or is_partitioned(head.weight):
        return None
    ids = torch.arange(PROBE_TOKENS, device=model.device).remainder(head.weight.shape[0]).unsqueeze(0)
    mask = torch.ones_like(ids)
    output = trunk(**model_inputs(trunk, ids, mask), use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.weight.shape[1]:
        return None
    form = _declared(model.config.get_text_config())
    # Not head(hidden), which would hide what a hook of the head does.
    mine = nn.functional.linear(hidden, head.weight, head.bias).float()
    mine = mine if form.softcap is None else form.softcap * torch.tanh(mine / form.softcap)
    own = model(**model_inputs(model, ids, mask), use_cache=False).logits
    allowed = PROBE_ROUNDINGS * torch.finfo(own.dtype).eps * own.float().abs().max()
    agrees = own.shape == mine.shape and bool(((mine * form.scale - own.float()).abs() <= allowed).all())
    return form if agrees else None


def _declared(config: Any) -> HeadForm:
    """Softcap (Gemma) and scale (Cohere multiplies by it, Granite divides) by the names of transformers' configs."""
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )
    return HeadForm(None if not softcap else float(softcap), scale)
