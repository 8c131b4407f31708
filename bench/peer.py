"""Other libraries' kernels for the same work, where they are importable; each is imported only when it is timed."""

from measure import DEVICE, peers
from suite import Function
from torch import Tensor

# (peer, op) -> whether it has a backward. Signatures: trl 1.16, flash-attn 2.8; flash-attn's is a cross-entropy.
# Liger's fused_selective_log_softmax is not here: it drops the last row of every sequence and has no backward alone.
OPS = {
    ("trl", "logprobs_and_entropy"): True,
    ("trl", "logprobs"): True,
    ("flash", "logprobs"): True,
}
NAMES = [name for name in peers() if DEVICE == "cuda" and any(name == peer for peer, _ in OPS)]


def has(name: str, op: str, backward: bool) -> bool:
    return (name, op) in OPS and (OPS[name, op] or not backward)


def rows(name: str, op: str, temperature: float) -> Function:
    """(logits, labels) -> the results of `op`."""
    return {"trl": trl_rows, "flash": flash_rows}[name](op, temperature)


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
