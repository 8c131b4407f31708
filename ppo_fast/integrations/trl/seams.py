"""Which names of TRL are replaced, in which of its versions."""

import importlib.util

from ppo_fast.integrations.patch import Integration, Replacement
from ppo_fast.integrations.trl import kernels, ppo
from ppo_fast.integrations.trl.lm_head import chunked_logprobs
from ppo_fast.integrations.trl.ppo_training import train

_BOTH = ("logprobs_and_entropy_from_logits",)
_PPO = "trl.experimental.ppo.ppo_trainer"

PPO = Integration(
    trainer="trl",
    distribution="trl",
    versions=("1.12",),
    replacements=(
        Replacement(
            "trl.trainer.utils:selective_log_softmax",
            ppo.selective_log_softmax,
            ops=("logprobs_from_logits",),
        ),
        Replacement(
            "trl.trainer.utils:entropy_from_logits", ppo.entropy_from_logits, ops=("entropy_from_logits",)
        ),
        Replacement(f"{_PPO}:masked_var", ppo.masked_var, ops=("masked_var",)),
        Replacement(f"{_PPO}:masked_whiten", ppo.masked_whiten, ops=("masked_var",)),
        Replacement(
            f"{_PPO}:PPOTrainer.train", train, ops=(*_BOTH, "kl_estimate", "gae", "policy_loss", "value_loss")
        ),
    ),
)

# TRL has this kernel only where triton is installed.
_KERNEL = (
    (
        Replacement(
            "trl.kernels.logprob_entropy:selective_log_softmax_and_entropy",
            kernels.fused_logprob_entropy,
            ops=_BOTH,
        ),
    )
    if importlib.util.find_spec("triton") is not None
    else ()
)

KERNELS = Integration(
    trainer="trl",
    distribution="trl",
    versions=("1.16",),
    replacements=(
        *_KERNEL,
        Replacement(
            "trl.trainer.utils:selective_log_softmax",
            kernels.selective_log_softmax,
            ops=("logprobs_from_logits",),
        ),
        Replacement(
            "trl.trainer.utils:entropy_from_logits", kernels.entropy_from_logits, ops=("entropy_from_logits",)
        ),
        Replacement(
            "trl.trainer.utils:selective_log_softmax_and_entropy",
            kernels.selective_log_softmax_and_entropy,
            ops=_BOTH,
        ),
        Replacement(
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply",
            chunked_logprobs,
            ops=("linear_logprobs",),
            signature_of="trl.kernels.chunked_logprob:ChunkedLogProbFunction.forward",
            static=True,
        ),
    ),
)
