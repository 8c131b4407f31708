"""verl's two ways from the last hidden state to log-probabilities and entropies, on our linear op."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

import ppo_fast
from ppo_fast.integrations import contract

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def fused_linear_for_ppo_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """FusedLinearForPPO.forward, of every `impl_backend`; `chunk_size` has nothing to cut.

    Args:
        self: the module; not used.
        hidden_states: [N, D] or [B, T, D], floating.
        vocab_weights: [V, D].
        input_ids: [N] or [B, T], integers in [0, V).
        temperature: above 0, a number or a tensor that holds one.

    Returns:
        (log_probs in float32, entropy in the dtype of `hidden_states`), shaped as `input_ids`.
    """
    assert hidden_states.ndim in (2, 3), f"Invalid hidden_states shape, received {hidden_states.shape}"
    logprobs, entropy = ppo_fast.linear_logprobs(
        hidden_states,
        vocab_weights,
        input_ids.long(),
        temperature=contract.for_each_row(temperature, input_ids.shape),
        return_entropy=True,
    )
    return logprobs.float(), entropy.to(hidden_states.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: "ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """LinearCrossEntropy.apply: log-probabilities, and the entropy of each row, in float32.

    Args:
        hidden: [..., D], floating.
        weight: [V, D]; with a group, this rank's share of the vocabulary.
        labels: [...], int64 in [0, V).
        temperature: a float above 0.
        reduction: none, or the sum or mean of the log-probabilities.
        dist_process_group: a vocabulary that is split over ranks is left to verl's own kernel.

    Returns:
        (logprobs [N], or 0-d when reduced; entropy [N]), N being the rows of `hidden`.
    """
    assert isinstance(temperature, float), f"temperature must be a float, but got {type(temperature)}"
    assert isinstance(reduction, str), f"reduction must be a str, but got {type(reduction)}"
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"Invalid reduction: {reduction.lower()}")
    if dist_process_group is not None:
        from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

        return LinearCrossEntropy.apply(hidden, weight, labels, temperature, reduction, dist_process_group)
    logprobs, entropy = ppo_fast.linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        return_entropy=True,
    )
    if reduction.lower() != "none":
        logprobs = logprobs.sum() if reduction.lower() == "sum" else logprobs.mean()
    return logprobs.float(), entropy.float()
