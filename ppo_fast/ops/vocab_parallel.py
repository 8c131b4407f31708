"""A head sharded by vocabulary over a process group: every rank has a slice of the logits, all get the same results.

Of each row a rank knows the maximum, sum e^d, E_p[d] and, if it is in its slice, the label's logit (with a reference
also max r, sum e^d_ref and E_p[d - d_ref]). These few numbers of all ranks are gathered at once and merged in the order
of the ranks, so that every rank computes the same bits. The gradient of the hidden states is then summed over the
ranks; that of the head stays with its slice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ppo_fast.ops.fused_estimate import coefficient_dtype, widest
from ppo_fast.ops.fused_kl import kl_rows
from ppo_fast.ops.fused_logprob import logprob_entropy
from ppo_fast.ops.fused_policy import clipped_policy_loss_backward
from ppo_fast.ops.fused_policy_rows import RowNumbers
from ppo_fast.ops.linear_chunks import row_state

CHUNK_ROWS = {"cpu": 512, "cuda": 2048}  # of every rank the same, whatever its slice and its free memory
ELSEWHERE, NOWHERE = -1, -2  # for a label: in another rank's slice; outside of the vocabulary


@dataclass(frozen=True)
class RowStats:
    """Numbers of each row over the whole vocabulary."""

    own: Tensor
    """[n, 3]: max x, sum e^d, E_p[d]."""
    target: Tensor
    """[n]: the label's logit."""
    ref: Tensor | None
    """[n, 3]: max r, sum e^d_ref, E_p[d - d_ref]."""

    def logprobs(self, temperature: Tensor) -> Tensor:
        """log p[label]."""
        return (self.target - self.own[:, 0]) / temperature - self.own[:, 1].log()

    def entropy(self) -> Tensor:
        """H(p)."""
        return self.own[:, 1].log() - self.own[:, 2]

    def kl(self) -> Tensor:
        """KL(p || ref)."""
        assert self.ref is not None
        return self.ref[:, 2] - (self.own[:, 1] / self.ref[:, 1]).log()


def agreed_chunk_rows(rows: int, device: torch.device) -> int:
    """Rows of a chunk that every rank arrives at by itself."""
    return max(1, min(rows, CHUNK_ROWS[device.type]))


class Slice:
    """This rank's rows of the head: the tokens [first, first + V)."""

    def __init__(self, group: distributed.ProcessGroup, weight: Tensor) -> None:
        self.group = group
        self.vocab = len(weight)
        sizes = self._gathered(torch.tensor([self.vocab], device=weight.device)).flatten()
        self.first = sizes[: distributed.get_rank(group)].sum()
        self.total = sizes.sum()

    def _gathered(self, tensor: Tensor) -> Tensor:
        """The tensor of every rank, [ranks, ...]."""
        ranks = distributed.get_world_size(self.group)
        out = tensor.new_empty((ranks * len(tensor), *tensor.shape[1:]))
        distributed.all_gather_into_tensor(out, tensor.contiguous(), group=self.group)
        return out.view(ranks, *tensor.shape)

    def local(self, labels: Tensor) -> Tensor:
        """Labels as rows of this slice, ELSEWHERE or NOWHERE."""
        mine = labels - self.first
        inside = (mine >= 0) & (mine < self.vocab)
        known = (labels >= 0) & (labels < self.total)
        return torch.where(inside, mine, torch.where(known, ELSEWHERE, NOWHERE))

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        distributed.all_reduce(tensor, group=self.group)
        return tensor

    def stats(
        self, logits: Tensor, ref_logits: Tensor | None, labels: Tensor, temperature: Tensor, impl: str
    ) -> RowStats:
        """What all slices together say of the rows; one gather of four or seven numbers a row."""
        return self.merged(self.partial(logits, ref_logits, labels, temperature, impl), labels, temperature)

    def partial(
        self, logits: Tensor, ref_logits: Tensor | None, labels: Tensor, temperature: Tensor, impl: str
    ) -> Tensor:
        """This slice's numbers of each row, [n, 4 or 7]; `labels` are local."""
        wide = coefficient_dtype(impl)
        any_label = labels.clamp(min=0)
        own = logprob_entropy(logits, any_label, temperature, impl)[2]
        target = logits.gather(1, any_label.unsqueeze(1)).squeeze(1).to(wide)
        columns = [own, torch.where(labels >= 0, target, 0.0).unsqueeze(1)]
        if ref_logits is not None:
            beside = kl_rows(logits, ref_logits, temperature, impl)[1]
            columns.append(beside[:, 3:6] if impl == "cpu" else beside[:, 2:5])
        return torch.cat(columns, dim=1)

    def merged(self, partial: Tensor, labels: Tensor, temperature: Tensor) -> RowStats:
        """The numbers of the whole vocabulary from those of every slice.

        A slice whose maximum is t measures d from t: by s = (t - top) / T less than from the maximum of all.
        """
        parts = self._gathered(partial)  # [ranks, n, 4 or 7]
        step, top = _steps(parts[:, :, 0], temperature)
        weight = _weighed(parts[:, :, 1], step)
        total = weight.sum(0)
        share = weight / total
        mean = _mean(share, parts[:, :, 2] + step)
        target = torch.where(labels == NOWHERE, torch.nan, parts[:, :, 3].sum(0))
        own = torch.stack((top, total, mean), dim=1)
        if parts.shape[-1] == 4:
            return RowStats(own, target, None)
        ref_step, ref_top = _steps(parts[:, :, 4], temperature)
        ref_total = _weighed(parts[:, :, 5], ref_step).sum(0)
        # A slice that is impossible for the reference is infinitely far wherever the policy may be in it.
        apart = torch.where(parts[:, :, 4] == -torch.inf, torch.inf, parts[:, :, 6] + step - ref_step)
        return RowStats(own, target, torch.stack((ref_top, ref_total, _mean(share, apart)), dim=1))

    def launch_rows(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        numbers: RowNumbers,
        coefficients: Tensor,
        impl: str,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """As `fused_policy_rows.launch_rows`, with local labels, of the whole vocabulary."""
        labels, old_logprobs, advantages, weights, temperature = numbers
        counted = weights != -torch.inf
        tau = torch.where(counted, temperature, 1.0) if temperature.dim() else temperature
        stats = self.stats(logits, ref_logits, torch.where(counted, labels, ELSEWHERE), tau, impl)
        dtype = widest(logits, ref_logits)

        def kept(x: Tensor) -> Tensor:
            return torch.where(counted, x, 0.0).to(dtype)

        logprobs = kept(stats.logprobs(tau))
        slopes = clipped_policy_loss_backward(
            torch.ones((), dtype=dtype, device=logits.device),
            *(x.unsqueeze(0) for x in (logprobs, kept(old_logprobs), kept(advantages), counted)),
            coefficients,
            None,
            torch.full((1,), len(labels), device=logits.device),
            torch.ones((), dtype=coefficients.dtype, device=logits.device),
            "token-sum",
            impl,
        ).squeeze(0)
        wide = stats.own.dtype
        weight = torch.where(counted, weights, 0.0).to(wide)
        g_logprob = torch.where(slopes == 0, 0.0, slopes.to(wide) * weight)
        g_entropy = -weight * coefficients[4].to(wide)
        g_kl = None if stats.ref is None else weight * coefficients[5].to(wide)
        state = row_state(stats.own, impl, g_logprob, g_entropy, g_kl, stats.ref)
        kl = None if stats.ref is None else kept(stats.kl())
        return logprobs, kept(stats.entropy()), kl, state


def _steps(tops: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """How far below the maximum of all slices each one's is, in units of d, and that maximum."""
    top = tops.amax(0)
    return torch.where(tops == top, 0.0, (tops - top) / temperature), top


def _weighed(totals: Tensor, step: Tensor) -> Tensor:
    """Sums e^d of the slices, measured from the maximum of all."""
    factor = step.exp()
    return torch.where(factor == 0, 0.0, totals * factor)


def _mean(share: Tensor, means: Tensor) -> Tensor:
    """The mean over all slices; one that weighs nothing adds nothing."""
    return torch.where(share == 0, 0.0, share * means).sum(0)
