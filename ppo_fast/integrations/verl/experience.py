"""verl.trainer.ppo.core_algos, the experience: GAE and KL penalties, on our ops."""

import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import contract
from ppo_fast.integrations.verl.torch_functional import whitened
from ppo_fast.records import KlKind

LOG_RATIO_CLAMP = 20.0
KL_CLAMP = 10.0
KL_KINDS: dict[str, KlKind] = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """GAE that skips masked slots, whitened with the unbiased variance; no gradient.

    Args:
        token_level_rewards, values: [B, T].
        response_mask: [B, T], integers or floats of 0 and 1; a bool is refused, as in verl.
        gamma, lam: numbers, or tensors 0-d or [B].

    Returns:
        (advantages, returns), [B, T]. A masked slot holds what is carried past it: the advantage of the next counted
        slot, 0 after the last one; its return is that plus what `values` holds there.
    """
    with torch.no_grad():
        1 - response_mask.new_empty(0)  # torch's own refusal of a bool mask
        contract.require_zero_one("compute_gae_advantage_return", "response_mask", response_mask)
        batch = len(values)
        counted, lengths = response_mask != 0, response_mask.sum(1)
        advantages, _ = ppo_fast.gae(
            token_level_rewards,
            values,
            counted,
            gamma=_per_row(gamma, batch),
            lam=_per_row(lam, batch),
            mask_rule="carry",
        )
        advantages = _carried(advantages, counted, lengths)
        if contract.strict():
            advantages = _spoilt(advantages, counted, token_level_rewards, values)
        advantages = advantages.to(_dtype(gamma, lam, token_level_rewards, values, response_mask))
        return whitened(advantages, counted, lengths.sum()), advantages + values


def _dtype(gamma: float | Tensor, lam: float | Tensor, *tensors: Tensor) -> torch.dtype:
    """A coefficient for each row widens what it multiplies; a number, or a 0-d tensor, does not."""
    rows = [x for x in (gamma, lam) if isinstance(x, Tensor) and x.dim() > 0]
    return contract.promoted(*tensors, *rows)


def _per_row(coefficient: float | Tensor, batch: int) -> float | Tensor:
    return coefficient.expand(batch) if isinstance(coefficient, Tensor) else coefficient


def _carried(advantages: Tensor, counted: Tensor, lengths: Tensor) -> Tensor:
    """Put the advantage of the next counted slot, or 0, into every masked slot."""
    steps = counted.shape[1]
    slots = torch.arange(steps, device=counted.device)
    if advantages.device.type == "cpu" and torch.equal(counted, slots < lengths.unsqueeze(1)):
        return advantages  # masked slots only follow, and hold 0
    slot = torch.where(counted, slots, steps)
    following = slot.flip(1).cummin(1).values.flip(1)
    return torch.nn.functional.pad(advantages, (0, 1)).gather(1, following)


def _spoilt(advantages: Tensor, counted: Tensor, *inputs: Tensor) -> Tensor:
    """NaN from the last masked slot whose reward or value is not finite back to the start of its row."""
    if counted.device.type == "cpu" and all(x.sum().isfinite() for x in inputs):
        return advantages  # one that is not finite would show in the sum
    bad = ~counted & ~torch.stack([x.isfinite() for x in inputs]).all(0)
    return torch.where(bad.flip(1).cumsum(1).flip(1) > 0, torch.nan, advantages)


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Estimate of KL(pi || ref) by the sampled token, [...], in the dtype of the two.

    Args:
        logprob, ref_logprob: [...]; both get a gradient.
        kl_penalty: kl or k1, abs, mse or k2, low_var_kl or k3 (difference clamped at 20, result at 10).

    Raises:
        NotImplementedError: any other name, "full" included.
    """
    kind = KL_KINDS.get(kl_penalty)
    if kind is None:
        raise NotImplementedError(f"kl_penalty_forward: `kl_penalty` is {kl_penalty!r}")
    if kind == "k1":
        return logprob - ref_logprob
    dtype = contract.promoted(logprob, ref_logprob)
    if ref_logprob.requires_grad:  # our op has none for the reference
        logprob, ref_logprob = logprob - ref_logprob, torch.zeros_like(ref_logprob)
    input_clamp, output_clamp = (LOG_RATIO_CLAMP, KL_CLAMP) if kind == "k3" else (None, None)
    estimate = ppo_fast.kl_estimate(
        logprob, ref_logprob, kind=kind, input_clamp=input_clamp, output_clamp=output_clamp
    )
    return estimate.to(dtype)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """`kl_penalty_forward`; a name with a + keeps its value and has the gradient of k2."""
    name = kl_penalty.removesuffix("+")
    forward = kl_penalty_forward(logprob, ref_logprob, name)
    if name == kl_penalty:
        return forward
    backward = kl_penalty_forward(logprob, ref_logprob, "k2")
    return backward - backward.detach() + forward.detach()
