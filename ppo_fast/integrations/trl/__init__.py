"""TRL: the PPO trainer of 1.12, and the kernels of 1.16 that GRPO, RLOO and others score tokens with.

`kernels` and `lm_head` hold the functions of 1.16, `ppo` those of 1.12, `FusedPPOTrainer` needs TRL 1.12. Names that
both versions have (`selective_log_softmax`, `entropy_from_logits`) are 1.16's here, and take a call of 1.12's too.
"""

from typing import TYPE_CHECKING

from ppo_fast.integrations.trl.kernels import (
    entropy_from_logits,
    fused_logprob_entropy,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from ppo_fast.integrations.trl.lm_head import ChunkedLogProbFunction, chunked_logprobs
from ppo_fast.integrations.trl.ppo import masked_var, masked_whiten
from ppo_fast.integrations.trl.seams import KERNELS, PPO

if TYPE_CHECKING:
    from ppo_fast.integrations.trl.fused_ppo_trainer import FusedPPOTrainer

INTEGRATIONS = (PPO, KERNELS)

__all__ = [
    "ChunkedLogProbFunction",
    "FusedPPOTrainer",
    "chunked_logprobs",
    "entropy_from_logits",
    "fused_logprob_entropy",
    "masked_var",
    "masked_whiten",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]


def __getattr__(name: str) -> object:
    if name == "FusedPPOTrainer":
        from ppo_fast.integrations.trl.fused_ppo_trainer import FusedPPOTrainer

        return FusedPPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
