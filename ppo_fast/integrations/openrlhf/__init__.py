"""OpenRLHF 0.11: its numerics on our ops. Each function has the contract of OpenRLHF's function of the same name."""

from ppo_fast.integrations.openrlhf.experience import get_advantages_and_returns, get_cumulative_returns
from ppo_fast.integrations.openrlhf.loss import policy_loss_forward, value_loss_forward
from ppo_fast.integrations.openrlhf.utils import compute_approx_kl, compute_entropy, log_probs_from_logits
from ppo_fast.integrations.openrlhf.worker import patch_worker
from ppo_fast.integrations.patch import Integration, Replacement

__all__ = [
    "INTEGRATIONS",
    "compute_approx_kl",
    "compute_entropy",
    "get_advantages_and_returns",
    "get_cumulative_returns",
    "log_probs_from_logits",
    "patch_worker",
    "policy_loss_forward",
    "value_loss_forward",
]

_UTILS = "openrlhf.models.utils"
_LOSS = "openrlhf.models.loss"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"

INTEGRATIONS = (
    Integration(
        trainer="openrlhf",
        distribution="openrlhf",
        versions=("0.11.2",),
        replacements=(
            Replacement(f"{_UTILS}:log_probs_from_logits", log_probs_from_logits, ("logprobs_from_logits",)),
            Replacement(f"{_UTILS}:compute_entropy", compute_entropy, ("entropy_from_logits",)),
            Replacement(f"{_UTILS}:compute_approx_kl", compute_approx_kl, ("kl_estimate",)),
            Replacement(f"{_LOSS}:PolicyLoss.forward", policy_loss_forward, ("policy_loss",)),
            Replacement(f"{_LOSS}:ValueLoss.forward", value_loss_forward, ("value_loss",)),
            Replacement(f"{_MAKER}.get_advantages_and_returns", get_advantages_and_returns, ("gae",)),
            Replacement(f"{_MAKER}.get_cumulative_returns", get_cumulative_returns, ("gae",)),
        ),
    ),
)
