"""What the fused ops replace: the forms that RLHF trainers write in eager torch, logits to float32 first."""

import torch
from torch import Tensor

CLIP = 0.2


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide / temperature, dim=-1)


def pick(logp: Tensor, labels: Tensor) -> Tensor:
    return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_of(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


def kl(logits: Tensor, ref_logits: Tensor, temperature: float) -> Tensor:
    logp, ref_logp = log_softmax(logits, temperature), log_softmax(ref_logits, temperature)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = ((logprobs - old_logprobs) * mask).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    return masked_mean(torch.maximum(plain, clipped), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    near = values.clamp(old_values - CLIP, old_values + CLIP)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask
