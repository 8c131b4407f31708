"""What TRL's helpers in logits space share, of 1.12 and of 1.16."""

import torch
import torch.nn.functional as F
from torch import Tensor

import ppo_fast
from ppo_fast.integrations.contract import for_each_row, nan_where_impossible
from ppo_fast.integrations.originals import WIDE, takes_labels, with_value


def selected(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at `index`, [...] or [..., K], in the dtype of the logits.

    In half precision TRL rounds at every step, and its tests want the same bits: so its steps are taken, a sequence
    at a time, and the fused op gives the gradient alone.
    """
    if not takes_labels(logits, index):
        return _stepwise(logits, index, temperature)
    if logits.dtype not in WIDE:
        with torch.no_grad():
            value = _stepwise(logits, index, temperature)
        return with_value(_fused(logits, index, temperature), value) if _learns(logits) else value
    return _fused(logits, index, temperature)


def _learns(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


def _fused(logits: Tensor, index: Tensor, temperature: float) -> Tensor:
    of_rows = for_each_row(temperature, logits.shape[:-1])
    if index.dim() < logits.dim():
        return ppo_fast.logprobs_from_logits(logits, index.long(), temperature=of_rows)
    # The normaliser comes out of one label's log-probability; that of the largest logit is finite in any row.
    top = logits.detach().argmax(-1)
    logprob = ppo_fast.logprobs_from_logits(logits, top, temperature=of_rows)
    scaled = logits.gather(-1, index) / temperature
    total = logits.gather(-1, top.unsqueeze(-1)).squeeze(-1) / temperature - logprob
    return scaled.to(logprob.dtype) - total.unsqueeze(-1)


def _stepwise(logits: Tensor, index: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits = logits / temperature
    labels = index.unsqueeze(-1) if index.dim() == logits.dim() - 1 else index
    if logits.dtype in WIDE:
        totals = torch.stack([sequence.logsumexp(-1) for sequence in logits])
        logprobs = logits.gather(-1, labels) - totals.unsqueeze(-1)
    else:
        pairs = zip(logits, labels, strict=True)
        logprobs = torch.stack([F.log_softmax(sequence, -1).gather(-1, picks) for sequence, picks in pairs])
    return logprobs.squeeze(-1) if labels is not index else logprobs


def entropies(logits: Tensor, chunk_size: int, temperature: float = 1.0) -> Tensor:
    """Entropy of each row in the dtype of the logits; NaN where a logit is -inf, since TRL has 0 * inf there."""
    fused = logits.dim() > 0 and logits.numel() > 0 and chunk_size > 0
    if not fused:
        return _stepwise_entropies(logits, chunk_size, temperature)
    of_rows = for_each_row(temperature, logits.shape[:-1])
    if logits.dtype not in WIDE:
        with torch.no_grad():
            value = _stepwise_entropies(logits, chunk_size, temperature)
        if not _learns(logits):
            return value
        return with_value(ppo_fast.entropy_from_logits(logits, temperature=of_rows), value)
    return nan_where_impossible(ppo_fast.entropy_from_logits(logits, temperature=of_rows), logits)


def _stepwise_entropies(logits: Tensor, chunk_size: int, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits = logits / temperature
    rows = logits.reshape(-1, logits.shape[-1])
    parts = []
    for few in rows.split(chunk_size):
        logp = F.log_softmax(few, -1)
        parts.append(-(logp.exp() * logp).sum(-1))
    return torch.cat(parts).reshape(logits.shape[:-1])
