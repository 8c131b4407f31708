"""What the fused ops replace: the forms that RLHF trainers write in eager torch, logits to float32 first."""

import torch
from torch import Tensor
from torch.nn import functional

CLIP = 0.2
KL_COEF, SCORE_CLIP = 0.1, 5.0
GAMMA, LAM = 1.0, 0.95
CHUNK = 128


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


def shaped_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The source's: every row is paid its clipped score in a loop. Also the KL estimate."""
    kl = logprobs - ref_logprobs
    rewards = -KL_COEF * kl
    clipped = scores.clamp(-SCORE_CLIP, SCORE_CLIP)
    for row, length in enumerate(mask.sum(1)):
        rewards[row, length - 1] += clipped[row]
    return rewards, kl


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The source's: a loop over rows writes zeros past their ends, in its arguments, then one over tokens."""
    for row, length in enumerate(mask.sum(1)):
        rewards[row, length:] = 0
        values[row, length:] = 0
    columns = rewards.shape[1]
    running = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(columns)):
        following = values[:, t + 1] if t + 1 < columns else 0.0
        running = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * running
        advantages.append(running)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked, stacked + values


def chunked_gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As slime does: inside a chunk a product with the powers of gamma lam, from chunk to chunk a loop."""
    decay, columns = GAMMA * LAM, rewards.shape[1]
    rewards, values = rewards * mask, values * mask
    delta = rewards + GAMMA * functional.pad(values[:, 1:], (0, 1)) - values
    chunks = functional.pad(delta, (0, -columns % CHUNK)).unflatten(1, (-1, CHUNK))
    position = torch.arange(CHUNK, dtype=delta.dtype, device=delta.device)
    powers = (decay ** (position.unsqueeze(1) - position)).tril()  # row s, column t: what delta_s adds to A_t
    advantages = chunks @ powers
    arriving = decay ** (CHUNK - position)  # of the A that follows the chunk
    running = torch.zeros_like(values[:, 0])
    for chunk in reversed(advantages.unbind(1)):
        chunk += running.unsqueeze(1) * arriving
        running = chunk[:, 0]
    advantages = advantages.flatten(1)[:, :columns]
    return advantages, advantages + values
