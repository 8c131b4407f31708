"""Count, mean and sum of squares about the mean (M2) of a part, and how parts add up to a whole.

Every mean is kept in two parts, a value near it and a small rest, so that a large common offset costs the variance
nothing: differences from the first part are exact where the offset dominates.
"""

import triton
import triton.language as tl

PARTIALS = 4  # float32 planes of a part: count, pivot, mean less the pivot, sum of squares about the mean


@triton.jit
def finite_or_zero(x):
    """x, or 0 in place of an infinity or NaN: a pivot may be any number, but infinity would turn into NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def degrees_of_freedom(count, bessel):
    """What divides the sum of squares: count - bessel, at least 1."""
    return tl.maximum(count - bessel, 1.0)


@triton.jit
def add_tile(n, pivot, total, squares, x, counted):
    """Add a tile [rows, columns], 0 where it does not count, to the columns' count, sum less the pivot, and M2.

    The pivot is the mean of the first tile that counts, rounded. Tiles are merged by Chan, Golub and LeVeque 1983:
    M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b).
    """
    tile_n = tl.sum(counted.to(tl.float32), axis=0)
    at_least_one = tl.maximum(tile_n, 1.0)
    pivot = tl.where(n == 0.0, finite_or_zero(tl.sum(x, axis=0) / at_least_one), pivot)
    d = tl.where(counted, x - pivot[None, :], 0.0)
    tile_total = tl.sum(d, axis=0)
    tile_mean = tile_total / at_least_one
    deviation = tl.where(counted, d - tile_mean[None, :], 0.0)

    gap = tile_mean - total / tl.maximum(n, 1.0)
    weight = n * (tile_n / tl.maximum(n + tile_n, 1.0))
    # In this order, here and below: where nothing counts, 0 times a square that overflows would be NaN.
    squares += tl.sum(deviation * deviation, axis=0) + weight * gap * gap
    return n + tile_n, pivot, total + tile_total, squares


@triton.jit
def merged(n, pivot, shift, squares):
    """(count, mean, what rounding took from it, M2) of each column of [chunks, columns] of partial moments."""
    count = tl.sum(n.to(tl.int64), axis=0).to(tl.float32)
    at_least_one = tl.maximum(count, 1.0)
    centre = finite_or_zero(tl.sum(n * pivot, axis=0) / at_least_one)
    d = (pivot - centre[None, :]) + shift
    mean_d = tl.sum(n * d, axis=0) / at_least_one
    deviation = d - mean_d[None, :]
    mean = centre + mean_d
    return count, mean, mean_d - (mean - centre), tl.sum(squares + n * deviation * deviation, axis=0)
