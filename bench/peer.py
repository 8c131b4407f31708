"""Other libraries' kernels for the same work, where they are importable; each is imported only when it is timed."""

import eager
import torch
from measure import DEVICE, peers
from suite import Function
from torch import Tensor

# (peer, op) -> whether it has a backward. Signatures: trl 1.16, flash-attn 2.8, liger-kernel 0.8; flash-attn's is a
# cross-entropy, and Liger's log-probability has a backward inside its GRPO loss alone.
OPS = {
    ("trl", "logprobs_and_entropy"): True,
    ("trl", "logprobs"): True,
    ("flash", "logprobs"): True,
    ("liger", "logprobs"): False,
}
NAMES = [name for name in peers() if DEVICE == "cuda" and any(name == peer for peer, _ in OPS)]


def has(name: str, op: str, backward: bool) -> bool:
    return (name, op) in OPS and (OPS[name, op] or not backward)


def rows(name: str, op: str, temperature: float) -> Function:
    """(logits, labels) -> the results of `op`."""
    return {"trl": trl_rows, "flash": flash_rows, "liger": liger_rows}[name](op, temperature)


def trl_rows(op: str, temperature: float) -> Function:
    from trl.trainer import utils

    def function(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        if op == "logprobs":
            return (utils.selective_log_softmax(logits, labels, temperature=temperature),)
        return utils.selective_log_softmax_and_entropy(logits, labels, temperature=temperature)

    return function


def flash_rows(op: str, temperature: float) -> Function:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def function(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (-cross_entropy_loss(logits, labels, logit_scale=1 / temperature)[0],)

    return function


def liger_rows(op: str, temperature: float) -> Function:
    """Liger leaves the last row of a sequence out; eager torch takes that one here."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def function(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        most = fused_selective_log_softmax(logits.unsqueeze(0), labels[:-1].unsqueeze(0), temperature)[0]
        last = eager.pick(eager.log_softmax(logits[-1:], temperature), labels[-1:])
        return (torch.cat([most, last]),)

    return function
