"""Shared vocabulary of the row kernels: one row of logits, a tile at a time, in float32.

All of it speaks of the distance d = (x - top) / T <= 0 with top the row's maximum, never of x / T: a common offset
of the logits then cancels, and every exponential lies in [0, 1].
"""

import triton
import triton.language as tl

# A compiler that knew that a stride divides by 16 would load rows in another layout, and sum them in another order.
ROW_STRIDES = (
    "inner_rows",
    "outer_stride",
    "inner_stride",
    "ref_inner_rows",
    "ref_outer_stride",
    "ref_inner_stride",
)


@triton.jit
def row_origin(row, inner_rows, outer_stride, inner_stride, ALIGNED: tl.constexpr):
    """Offset in elements of `row` (int64) in a tensor with two levels of row stride; ALIGNED: it divides by 16."""
    origin = (row // inner_rows) * outer_stride + (row % inner_rows) * inner_stride
    if ALIGNED:
        origin = tl.multiple_of(origin, 16)
    return origin


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


@triton.jit
def online_kl_update(top, total, ref_top, ref_total, gaps, x, r, inverse_temperature):
    """Take a tile of policy x and reference r into both online softmaxes and gaps = sum e (d - d_ref).

    KL = gaps / total - log(total / ref_total): the difference is taken column by column before anything is summed,
    so that two nearly equal rows do not cancel. A column with r = -inf and x > -inf makes gaps +inf; one whose
    weight is 0 adds nothing.
    """
    raised = tl.maximum(top, tl.max(x, axis=0))
    ref_raised = tl.maximum(ref_top, tl.max(r, axis=0))
    origin = tl.where(raised == float("-inf"), 0.0, raised)
    ref_origin = tl.where(ref_raised == float("-inf"), 0.0, ref_raised)
    step = distance(top, origin, inverse_temperature)
    factor = tl.exp(step)
    ref_factor = tl.exp(distance(ref_top, ref_origin, inverse_temperature))
    e = tl.exp(distance(x, origin, inverse_temperature))
    gap = column_gap(x, r, origin, ref_origin, inverse_temperature)
    lost = (r == float("-inf")) & (x > float("-inf"))
    added = tl.sum(tl.where(lost, float("inf"), tl.where(e == 0.0, 0.0, e * gap)), axis=0)
    # So far all r = -inf means that every counted column was lost: there is no finite step to take.
    ref_step = tl.where(ref_top == float("-inf"), 0.0, (ref_top - ref_origin) * inverse_temperature)
    carried = tl.where(factor == 0.0, 0.0, factor * (gaps + (step - ref_step) * total))
    gaps = tl.where(gaps == float("inf"), gaps, carried) + added
    total = factor * total + tl.sum(e, axis=0)
    ref_total = ref_factor * ref_total + tl.sum(tl.exp(distance(r, ref_origin, inverse_temperature)), axis=0)
    return raised, total, ref_raised, ref_total, gaps


@triton.jit
def column_gap(x, r, top, ref_top, inverse_temperature):
    """d_j - d_ref_j, which is log p_j - log q_j up to a constant of the row."""
    return (x - top) * inverse_temperature - (r - ref_top) * inverse_temperature
