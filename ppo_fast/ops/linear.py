"""Public ops in hidden space: from a model's last hidden state and its head, without handing over logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ppo_fast import reference
from ppo_fast.ops import dispatch
from ppo_fast.ops.checks import Checker
from ppo_fast.ops.dispatch import Impl
from ppo_fast.ops.losses import check_objective, check_policy
from ppo_fast.ops.sharded_head import takes_sharded_heads
from ppo_fast.records import PolicyLoss, Reduction

if TYPE_CHECKING:
    from ppo_fast.ops import vocab_parallel


def _check_head(
    check: Checker, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> int:
    """The head fits the hidden state; returns V."""
    check.tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        check.fail("weight", f"has shape {tuple(weight.shape)}", "[V, D] with V of at least 1")
    vocab = weight.shape[0]
    check.floats((vocab, hidden.shape[-1]), "[V, D], D being the last axis of hidden", weight=weight)
    check.optional_floats((vocab,), "one for each row of weight", bias=bias)
    check.optional_number("softcap", softcap)
    check.finite(None, weight=weight, bias=bias)
    return vocab


def _check_ref_head(
    check: Checker,
    rows: Sequence[int],
    vocab: int,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    """The reference's head: its own hidden size, the policy's rows and vocabulary."""
    if ref_hidden is None or ref_weight is None:
        missing = "ref_hidden" if ref_hidden is None else "ref_weight"
        check.fail(missing, "is a NoneType", "a torch.Tensor for the KL term", TypeError)
    check.tensor("ref_hidden", ref_hidden)
    width = ref_hidden.shape[-1] if ref_hidden.dim() else 0
    check.floats((*rows, width), "rows of hidden, then its own hidden size", ref_hidden=ref_hidden)
    check.floats((vocab, width), "V of weight, last axis of ref_hidden", ref_weight=ref_weight)
    check.optional_floats((vocab,), "one for each row of ref_weight", ref_bias=ref_bias)
    check.finite(None, ref_weight=ref_weight, ref_bias=ref_bias)


def _check_chunks(check: Checker, chunk_rows: int | None, compact: bool | None) -> None:
    check.optional_count("chunk_rows", chunk_rows)
    check.optional_flag("compact", compact)


def _vocabulary(
    own: int, group: ProcessGroup | None, weight: Tensor
) -> tuple[int | None, "vocab_parallel.Slice | None"]:
    """How many tokens there are, and which of them this rank's rows of the head are.

    None where the sizes of the other slices are on a GPU, whose host would have to wait for them.
    """
    if group is None:
        return own, None
    from ppo_fast.ops import vocab_parallel

    shard = vocab_parallel.Slice(group, weight)
    return (int(shard.total) if weight.device.type == "cpu" else None), shard


@takes_sharded_heads
def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_rows: int | None = None,
    compact: bool | None = None,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each label straight from the hidden state, in nats.

    z = hidden @ weight.T + bias;  with a softcap s, z = s tanh(z / s);  log softmax(z / temperature)[label].

    Args:
        hidden: [..., D], floating.
        weight: [V, D], floating; one that ZeRO-3 or FSDP2 holds in shards is gathered for the call, and for its
            backward where that reads it. The gradient of a DTensor is the mean over its ranks.
        labels: [...], int64 in [0, V).
        bias: [V], or None.
        temperature: a float above 0, or a tensor [...], one a row; it gets no gradient.
        softcap: s > 0, or None for no cap.
        return_entropy: also return the entropy [...] of each row.
        chunk_rows: rows of logits that are made at a time; None chooses by N, V and the free memory. For a given number
            a row's results have the same bits whatever rows stand round it.
        compact: leave rows that contribute nothing out of the products. That takes their number, for which a GPU's host
            must wait: None does it on a CPU alone, True everywhere.
        group: the ranks over which the head is sharded by vocabulary; weight and bias (the reference's too) are then
            this rank's rows of it, of any number, in the order of the ranks, and all else is the same on every rank, as
            are the results. Its gradients: of `hidden` the whole on every rank, of weight and bias those rows.
        impl: auto, reference, cpu or triton.

    Returns:
        logprobs [...], or (logprobs, entropy); float32 (float64 for float64), differentiable in `hidden`,
        `weight` and `bias`.

    Raises:
        ValueError: wrong shape, device, coefficient or `impl`; a label outside [0, V) on the CPU (on a GPU
            that row is NaN unless `check_inputs(True)`).
        TypeError: wrong dtype.

    Source: softcap from Gemma 2 (arXiv 2408.00118), section 2.
    """
    check = Checker("linear_logprobs", "hidden", hidden)
    check.group(group)
    vocab, shard = _vocabulary(_check_head(check, hidden, weight, bias, softcap), group, weight)
    check.labels(labels, hidden.shape[:-1], "hidden without its last axis", vocab)
    check.temperature(temperature, hidden.shape[:-1])
    check.flag("return_entropy", return_entropy)
    check.finite(None, hidden=hidden)
    _check_chunks(check, chunk_rows, compact)
    options: dict[str, Any] = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "return_entropy": return_entropy,
        "chunk_rows": chunk_rows,
        "compact": compact,
    }
    runs = dispatch.resolve("linear_logprobs", impl, hidden, weight, bias)
    if runs == "reference":
        return reference.linear_logprobs(hidden, weight, labels, group=group, **options)
    from ppo_fast.ops import fused_linear_logprobs

    return fused_linear_logprobs.linear_logprobs(hidden, weight, labels, shard=shard, impl=runs, **options)


@takes_sharded_heads
def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    chunk_rows: int | None = None,
    compact: bool | None = None,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Exact KL(pi || ref) of each row from the hidden states of both models, in nats.

    Equivalent to `kl_from_logits(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias)`.

    Args:
        hidden, weight, bias: the policy: [..., D], [V, D], [V] or None.
        ref_hidden, ref_weight, ref_bias: the reference: [..., D'], [V, D'], [V] or None; no gradient.
        softcap: s > 0 of both heads, z = s tanh(z / s); None for no cap.
        temperature: of both; a float above 0, or a tensor [...], one a row; it gets no gradient.
        chunk_rows: rows of logits that are made at a time; None chooses by N, V and the free memory. For a given number
            a row's results have the same bits whatever rows stand round it.
        compact: leave rows that contribute nothing out of the products. That takes their number, for which a GPU's host
            must wait: None does it on a CPU alone, True everywhere.
        group: the ranks over which the head is sharded by vocabulary; weight and bias (the reference's too) are then
            this rank's rows of it, of any number, in the order of the ranks, and all else is the same on every rank, as
            are the results. Its gradients: of `hidden` the whole on every rank, of weight and bias those rows.
        impl: auto, reference, cpu or triton.

    Returns:
        [...], float32 (float64 for float64), differentiable in `hidden`, `weight` and `bias`.

    Raises:
        ValueError: wrong shape, device, coefficient or `impl`.
        TypeError: wrong dtype.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 8, with the policy first.
    """
    check = Checker("linear_kl", "hidden", hidden)
    check.group(group)
    vocab = _check_head(check, hidden, weight, bias, softcap)
    _check_ref_head(check, hidden.shape[:-1], vocab, ref_hidden, ref_weight, ref_bias)
    check.temperature(temperature, hidden.shape[:-1])
    check.finite(None, hidden=hidden, ref_hidden=ref_hidden)
    _check_chunks(check, chunk_rows, compact)
    options: dict[str, Any] = {
        "bias": bias,
        "ref_bias": ref_bias,
        "softcap": softcap,
        "temperature": temperature,
        "chunk_rows": chunk_rows,
        "compact": compact,
    }
    heads = (hidden, weight, ref_hidden, ref_weight)
    runs = dispatch.resolve("linear_kl", impl, *heads, bias, ref_bias)
    if runs == "reference":
        return reference.linear_kl(*heads, group=group, **options)
    from ppo_fast.ops import fused_linear_kl

    _, shard = _vocabulary(vocab, group, weight)
    return fused_linear_kl.linear_kl(*heads, shard=shard, impl=runs, **options)


@takes_sharded_heads
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl_coef: float = 0.0,
    temperature: float | Tensor = 1.0,
    reduction: Reduction = "token-mean",
    normalizer: float | Tensor | None = None,
    log_ratio_clamp: float | None = None,
    chunk_rows: int | None = None,
    compact: bool | None = None,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> PolicyLoss:
    """`policy_loss_from_logits` of z = hidden @ weight.T + bias, softcapped if asked for.

    Args:
        hidden: [B, T, D], floating. Rows whose mask is 0 are never read.
        weight: [V, D], floating.
        labels: [B, T], int64 in [0, V); anything where the mask is 0.
        bias: [V], or None.
        softcap: s > 0, z = s tanh(z / s) before the temperature, of both heads; None for no cap.
        ref_hidden, ref_weight, ref_bias: the reference's [B, T, D'], [V, D'], [V] or None, for the KL term;
            the first two come together and are needed unless `kl_coef` is 0; they get no gradient.
        old_logprobs, advantages, mask, clip_low, clip_high, dual_clip, entropy_coef, kl_coef, temperature,
            reduction, normalizer, log_ratio_clamp: as in `policy_loss_from_logits`.
        chunk_rows: rows of logits that are made at a time; None chooses by N, V and the free memory. For a given number
            a row's results have the same bits whatever rows stand round it.
        compact: leave rows that contribute nothing out of the products. That takes their number, for which a GPU's host
            must wait: None does it on a CPU alone, True everywhere.
        group: the ranks over which the head is sharded by vocabulary; weight and bias (the reference's too) are then
            this rank's rows of it, of any number, in the order of the ranks, and all else is the same on every rank, as
            are the results. Its gradients: of `hidden` the whole on every rank, of weight and bias those rows.
        impl: auto, reference, cpu, triton, or without `ref_hidden` cuda.

    Returns:
        PolicyLoss; only its loss is differentiable, in `hidden`, `weight` and `bias`.

    Raises:
        ValueError, TypeError: as `policy_loss_from_logits`.

    Source: Schulman et al. 2017 (arXiv 1707.06347), eq. 7 to 9; softcap: Gemma 2 (arXiv 2408.00118).
    """
    check = Checker("linear_policy_loss", "hidden", hidden, dims=3)
    rows = hidden.shape[:-1]
    check.group(group)
    own = _check_head(check, hidden, weight, bias, softcap)
    vocab, shard = _vocabulary(own, group, weight)
    surrogate: dict[str, Any] = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "reduction": reduction,
        "normalizer": normalizer,
        "log_ratio_clamp": log_ratio_clamp,
    }
    check_policy(check, old_logprobs, advantages, mask, rows, **surrogate)
    check_objective(check, labels, mask, vocab, entropy_coef, kl_coef, temperature)
    if kl_coef != 0 or not (ref_hidden is ref_weight is ref_bias is None):
        _check_ref_head(check, rows, own, ref_hidden, ref_weight, ref_bias)
    check.finite(mask.unsqueeze(-1), hidden=hidden, ref_hidden=ref_hidden)
    _check_chunks(check, chunk_rows, compact)
    tokens_of = (hidden, weight, labels, old_logprobs, advantages, mask)
    surrogate |= {
        "bias": bias,
        "softcap": softcap,
        "entropy_coef": entropy_coef,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
        "ref_bias": ref_bias,
        "kl_coef": kl_coef,
        "temperature": temperature,
        "chunk_rows": chunk_rows,
        "compact": compact,
    }
    runs = dispatch.resolve(
        "linear_policy_loss", impl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias
    )
    if runs == "cuda" and ref_hidden is not None:
        check.fail("impl", "is 'cuda', which has no exact KL", "'triton', since `ref_hidden` is given")
    if runs == "reference":
        return reference.linear_policy_loss(*tokens_of, group=group, **surrogate)
    from ppo_fast.ops import fused_linear_policy

    return fused_linear_policy.linear_policy_loss(*tokens_of, shard=shard, impl=runs, **surrogate)
