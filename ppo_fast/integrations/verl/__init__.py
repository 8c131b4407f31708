"""verl 0.9: its numerics on our ops. Each function has the contract of verl's function of the same name."""

from ppo_fast.integrations.patch import Integration, Replacement
from ppo_fast.integrations.verl.experience import compute_gae_advantage_return, kl_penalty, kl_penalty_forward
from ppo_fast.integrations.verl.linear import fused_linear_for_ppo_forward, linear_cross_entropy
from ppo_fast.integrations.verl.losses import (
    agg_loss,
    compute_policy_loss_gspo,
    compute_policy_loss_vanilla,
    compute_value_loss,
)
from ppo_fast.integrations.verl.torch_functional import (
    calculate_sum_pi_squared_from_logits,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    logprobs_from_logits,
    masked_mean,
    masked_var,
    masked_whiten,
)

__all__ = [
    "INTEGRATIONS",
    "agg_loss",
    "calculate_sum_pi_squared_from_logits",
    "compute_gae_advantage_return",
    "compute_policy_loss_gspo",
    "compute_policy_loss_vanilla",
    "compute_value_loss",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "fused_linear_for_ppo_forward",
    "kl_penalty",
    "kl_penalty_forward",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
]

_FUNCTIONAL = "verl.utils.torch_functional"
_ALGOS = "verl.trainer.ppo.core_algos"
_POLICY_LOSSES = (f"{_ALGOS}:POLICY_LOSS_REGISTRY",)
_ESTIMATORS = (f"{_ALGOS}:ADV_ESTIMATOR_REGISTRY",)
_KERNEL = "verl.utils.kernel.linear_cross_entropy"

INTEGRATIONS = (
    Integration(
        trainer="verl",
        distribution="verl",
        versions=("0.9.1",),
        replacements=(
            Replacement(
                f"{_FUNCTIONAL}:logprobs_from_logits", logprobs_from_logits, ("logprobs_from_logits",)
            ),
            Replacement(f"{_FUNCTIONAL}:entropy_from_logits", entropy_from_logits, ("entropy_from_logits",)),
            Replacement(
                f"{_FUNCTIONAL}:entropy_from_logits_with_chunking",
                entropy_from_logits_with_chunking,
                ("entropy_from_logits",),
            ),
            Replacement(
                f"{_FUNCTIONAL}:calculate_sum_pi_squared_from_logits",
                calculate_sum_pi_squared_from_logits,
                ("logprobs_from_logits",),
            ),
            Replacement(f"{_FUNCTIONAL}:masked_mean", masked_mean, ("masked_mean",)),
            Replacement(f"{_FUNCTIONAL}:masked_var", masked_var, ("masked_var",)),
            Replacement(f"{_FUNCTIONAL}:masked_whiten", masked_whiten, ("masked_mean", "masked_var")),
            Replacement(
                f"{_ALGOS}:compute_gae_advantage_return",
                compute_gae_advantage_return,
                ("gae", "masked_mean", "masked_var"),
                registries=_ESTIMATORS,
            ),
            Replacement(f"{_ALGOS}:kl_penalty", kl_penalty, ("kl_estimate",)),
            Replacement(f"{_ALGOS}:kl_penalty_forward", kl_penalty_forward, ("kl_estimate",)),
            Replacement(f"{_ALGOS}:agg_loss", agg_loss, ("masked_mean",)),
            Replacement(
                f"{_ALGOS}:compute_policy_loss_vanilla",
                compute_policy_loss_vanilla,
                ("policy_loss", "masked_mean"),
                registries=_POLICY_LOSSES,
            ),
            Replacement(
                f"{_ALGOS}:compute_policy_loss_gspo",
                compute_policy_loss_gspo,
                ("policy_loss", "masked_mean"),
                registries=_POLICY_LOSSES,
            ),
            Replacement(f"{_ALGOS}:compute_value_loss", compute_value_loss, ("value_loss",)),
            Replacement(
                "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
                fused_linear_for_ppo_forward,
                ("linear_logprobs",),
            ),
            Replacement(
                f"{_KERNEL}:linear_cross_entropy",
                linear_cross_entropy,
                ("linear_logprobs",),
                signature_of=f"{_KERNEL}:LinearCrossEntropy.forward",
            ),
        ),
    ),
)
