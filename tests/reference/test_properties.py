"""Properties over shapes, masks and values: each op against its definition, written once more without tensors."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ppo_fast import reference

SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def batches(draw: st.DrawFn, count: int = 3) -> tuple[list[Tensor], Tensor]:
    """`count` float64 tensors of one shape [B, T], and a mask with holes, empty rows, or nothing in it."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    size = shape[0] * shape[1]
    finite = st.floats(-8, 8, width=32)
    tensors = [
        torch.tensor(draw(st.lists(finite, min_size=size, max_size=size)), dtype=torch.float64).view(shape)
        for _ in range(count)
    ]
    kind = draw(st.sampled_from(["holes", "lengths", "all", "none"]))
    if kind == "holes":
        bits = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(shape)
    elif kind == "lengths":
        lengths = draw(st.lists(st.integers(0, shape[1]), min_size=shape[0], max_size=shape[0]))
        bits = torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)
    else:
        bits = torch.full(shape, kind == "all")
    return tensors, bits


UNIT = st.floats(0, 1)


def loop_gae(r: list, v: list, m: list, gamma: float, lam: float, rule: str, end: float) -> list[float]:
    """One row by the recurrence; carry drops the masked slots, multiply keeps them as zeros up to the last."""
    counted = [t for t, on in enumerate(m) if on]
    slots = counted if rule == "carry" else list(range(counted[-1] + 1 if counted else 0))
    reward, value = (lambda t: r[t] if m[t] else 0.0), (lambda t: v[t] if m[t] else 0.0)
    out, after, running = [0.0] * len(r), end, 0.0
    for t in reversed(slots):
        running = reward(t) + gamma * after - value(t) + gamma * lam * running
        after = value(t)
        if m[t]:
            out[t] = running
    return out


@SETTINGS
@given(batch=batches(), gamma=UNIT, lam=UNIT, rule=st.sampled_from(["carry", "multiply", "none"]))
def test_gae(batch: tuple[list[Tensor], Tensor], gamma: float, lam: float, rule: str) -> None:
    (rewards, values, ends), mask = batch
    bootstrap = ends[:, 0]
    advantages, returns = reference.gae(
        rewards, values, mask, gamma=gamma, lam=lam, mask_rule=rule, bootstrap=bootstrap
    )
    expected = [
        loop_gae(r, v, m, gamma, lam, rule, e)
        for r, v, m, e in zip(*(x.tolist() for x in (rewards, values, mask, bootstrap)), strict=True)
    ]
    assert_close(advantages, torch.tensor(expected, dtype=torch.float64))
    assert_close(returns, (advantages + values).masked_fill(~mask, 0.0))


@SETTINGS
@given(batch=batches(), gamma=UNIT, lam=UNIT)
def test_all_gae_rules_agree_without_holes(
    batch: tuple[list[Tensor], Tensor], gamma: float, lam: float
) -> None:
    (rewards, values, ends), mask = batch
    lengths = mask.sum(1, keepdim=True)
    prefix = torch.arange(mask.shape[1]) < lengths
    got = [
        reference.gae(rewards, values, prefix, gamma=gamma, lam=lam, mask_rule=rule, bootstrap=ends[:, 0])[0]
        for rule in ("carry", "multiply", "none")
    ]
    assert_close(got[0], got[1])
    assert torch.equal(got[1], got[2])


@SETTINGS
@given(batch=batches(), kind=st.sampled_from(["k1", "k2", "k3", "abs"]), coef=st.floats(-1, 1))
def test_kl_shaped_rewards(batch: tuple[list[Tensor], Tensor], kind: str, coef: float) -> None:
    (new, ref, extra), mask = batch
    scores = extra[:, 0]
    got = reference.kl_shaped_rewards(new, ref, scores, mask, kl_coef=coef, kind=kind, clip_score=3.0)
    for b in range(mask.shape[0]):
        counted = mask[b].nonzero().flatten().tolist()
        for t in range(mask.shape[1]):
            d = (new[b, t] - ref[b, t]).item()
            estimate = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d, "abs": abs(d)}[kind]
            want = -coef * estimate if t in counted else 0.0
            if counted and t == counted[-1]:
                want += max(-3.0, min(3.0, scores[b].item()))
            assert got[b, t].item() == pytest.approx(want, rel=1e-9, abs=1e-12)


@SETTINGS
@given(batch=batches(), reduction=st.sampled_from(["token-mean", "token-sum", "seq-mean-token-sum"]))
def test_policy_loss(batch: tuple[list[Tensor], Tensor], reduction: str) -> None:
    (new, old, advantages), mask = batch
    rows = []
    for b in range(mask.shape[0]):
        row = []
        for t in mask[b].nonzero().flatten().tolist():
            ratio, a = math.exp((new[b, t] - old[b, t]).item()), advantages[b, t].item()
            term = max(-a * ratio, -a * min(max(ratio, 0.9), 1.3))
            row.append(min(term, -3 * a) if a < 0 else term)
        rows.append(row)
    total, tokens = math.fsum(map(math.fsum, rows)), sum(map(len, rows))
    filled = sum(1 for row in rows if row)
    divisor = {"token-mean": tokens, "token-sum": 1, "seq-mean-token-sum": filled}[reduction]
    out = reference.policy_loss(
        new, old, advantages, mask, clip_low=0.1, clip_high=0.3, dual_clip=3.0, reduction=reduction
    )
    assert out.loss.item() == pytest.approx(total / max(divisor, 1), rel=1e-9, abs=1e-12)
    assert torch.equal(out.logprobs, new.masked_fill(~mask, 0.0))


@SETTINGS
@given(batch=batches(count=1), unbiased=st.booleans())
def test_whitening_has_mean_zero_and_variance_one(batch: tuple[list[Tensor], Tensor], unbiased: bool) -> None:
    (x,), mask = batch
    whitened = reference.masked_whiten(x, mask, unbiased=unbiased)
    assert torch.equal(whitened[~mask], torch.zeros_like(whitened[~mask]))
    kept = x[mask]
    if len(kept) < 2:
        assert torch.equal(whitened, torch.zeros_like(x))
        return
    assert_close(reference.masked_mean(x, mask), kept.mean())
    assert_close(reference.masked_var(x, mask, unbiased=unbiased), kept.var(unbiased=unbiased))
    spread = kept.var(unbiased=unbiased).item()
    got = whitened[mask]
    assert abs(got.mean().item()) < 1e-6
    assert got.var(unbiased=unbiased).item() == pytest.approx(spread / (spread + 1e-8), abs=1e-9)
    rescaled = reference.masked_rescale(x, mask, unbiased=unbiased)
    assert_close(rescaled[mask], got + kept.mean())


@SETTINGS
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 9),
    seed=st.integers(0, 99),
    tau=st.floats(0.1, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_rows_are_distributions(rows: int, vocab: int, seed: int, tau: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(seed)
    z = (4 * torch.randn(rows, vocab, generator=random)).to(dtype)
    ref = torch.randn(rows, vocab, generator=random).to(dtype)
    every = torch.arange(vocab).expand(rows, vocab)
    logp = reference.logprobs_from_logits(z.unsqueeze(1).expand(rows, vocab, vocab), every, temperature=tau)
    p = logp.exp()
    assert_close(p.sum(-1), torch.ones(rows, dtype=p.dtype))
    entropy = reference.entropy_from_logits(z, temperature=tau)
    assert_close(entropy, -(p * logp).sum(-1))
    assert (entropy >= -1e-6).all()
    assert (entropy <= math.log(vocab) + 1e-5).all()
    kl = reference.kl_from_logits(z, ref, temperature=tau)
    assert (kl >= -1e-5).all()
    assert_close(reference.kl_from_logits(z, z, temperature=tau), torch.zeros_like(kl), rtol=0, atol=1e-6)
