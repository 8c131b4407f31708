"""Shared vocabulary of the row kernels: one row of logits, a tile at a time, in float32.

All of it speaks of the distance d = (x - top) / T <= 0 with top the row's maximum, never of x / T: a common offset
of the logits then cancels, and every exponential lies in [0, 1].
"""

import triton
import triton.language as tl


@triton.jit
def row_origin(row, inner_rows, outer_stride, inner_stride):
    """Offset in elements of `row` (int64) in a tensor with two levels of row stride."""
    return (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride


@triton.jit
def distance(x, top, inverse_temperature):
    """(x - top) / T, held at -1000, where exp is 0 already, so that a logit of -inf gives 0 * d = 0; NaN stays."""
    d = (x - top) * inverse_temperature
    return tl.where(d < -1000.0, -1000.0, d)


@triton.jit
def online_softmax_update(top, total, weighted, x, inverse_temperature):
    """Take a tile into (max x, sum exp(d), sum exp(d) d); Milakov and Gimelshein 2018, with a third sum beside.

    Where the maximum rises, s = (old - new) / T, total -> e^s total and weighted -> e^s (weighted + s total).
    """
    raised = tl.maximum(top, tl.max(x, axis=0))
    # While every logit so far is -inf, measure from 0: they then weigh nothing instead of being inf - inf.
    origin = tl.where(raised == float("-inf"), 0.0, raised)
    step = distance(top, origin, inverse_temperature)
    factor = tl.exp(step)
    d = distance(x, origin, inverse_temperature)
    e = tl.exp(d)
    weighted = factor * (weighted + step * total) + tl.sum(e * d, axis=0)
    total = factor * total + tl.sum(e, axis=0)
    return raised, total, weighted


@triton.jit
def row_gradient(x, columns, label, top, inverse_total, inverse_temperature, a, b, c):
    """dx_j = (p_j (a + b d_j) + c [j = label]) / T, the target's term added in float32 before any rounding."""
    d = distance(x, top, inverse_temperature)
    p = tl.exp(d) * inverse_total
    return (p * (a + b * d) + tl.where(columns == label, c, 0.0)) * inverse_temperature
