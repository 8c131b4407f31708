"""Masked mean and variance over one axis, and the normalisations by them: deterministic, no atomics.

x and mask are [outer, length, inner], reduced over length to outer * inner columns. Stage 1 is one program a chunk of
a column, stage 2 merges a column's chunks at once; how a column is cut depends on its length alone.

x is read wherever the tile lies inside, and dropped where the mask does not count: a load under a mask of data is
made element by element, one bounded by the shape is made in vectors.
"""

import torch
import triton
import triton.language as tl
from ppo_fast.kernels.launch import TOKEN_OPTIONS, on_device_of
from ppo_fast.kernels.partial_moments import PARTIALS, add_tile, degrees_of_freedom, merged
from torch import Tensor

STATS = 4  # float32 numbers kept for each column: count, mean, what rounding took from the mean, variance
MOST_CHUNKS = 1024  # what one program of stage 2 merges in one tile
LONGEST_CHUNK = 2**24  # a count is exact in float32
WHITEN_EPS: tl.constexpr = tl.constexpr(1e-8)
OPTIONS: dict[str, int | bool] = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def chunk_of(program, length, inner, chunks, chunk, COLUMNS: tl.constexpr):
    """(chunk's number, outer index, inner columns, first row, row after the last) of `program` (int64)."""
    part = program % chunks
    slab = program // chunks
    tiles = tl.cdiv(inner, COLUMNS)
    columns = (slab % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    first = part * chunk
    return part, slab // tiles, columns, first, tl.minimum(first + chunk, length)


@triton.jit
def partial_moments_kernel(
    x_ptr,
    mask_ptr,
    partials_ptr,
    length,
    inner,
    chunks,
    chunk,
    columns_total,
    plane,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write count, pivot, mean - pivot and M2 = sum (x - mean)^2 of the counted rows of one chunk."""
    program = tl.program_id(0).to(tl.int64)
    part, outer, columns, first, last = chunk_of(program, length, inner, chunks, chunk, COLUMNS)
    origin = outer * length * inner + columns[None, :]

    n = tl.zeros((COLUMNS,), tl.float32)
    pivot = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < last)[:, None] & (columns < inner)[None, :]
        at = origin + rows[:, None] * inner
        counted = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(counted, x, 0.0)
        n, pivot, total, squares = add_tile(n, pivot, total, squares, x, counted)

    out = partials_ptr + part * columns_total + outer * inner + columns
    tl.store(out, n, mask=columns < inner)
    tl.store(out + plane, pivot, mask=columns < inner)
    tl.store(out + 2 * plane, total / tl.maximum(n, 1.0), mask=columns < inner)
    tl.store(out + 3 * plane, squares, mask=columns < inner)


@triton.jit
def merge_moments_kernel(
    partials_ptr,
    result_ptr,
    stats_ptr,
    chunks,
    columns_total,
    plane,
    bessel,
    ORDER: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge the chunks of each column; write its stats and, if there is a result, mean (order 1) or variance (2)."""
    program = tl.program_id(0).to(tl.int64)
    columns = program * COLUMNS + tl.arange(0, COLUMNS)
    parts = tl.arange(0, CHUNKS)
    inside = (parts < chunks)[:, None] & (columns < columns_total)[None, :]
    at = partials_ptr + parts[:, None] * columns_total + columns[None, :]
    n = tl.load(at, mask=inside, other=0.0)
    pivot = tl.load(at + plane, mask=inside, other=0.0)
    shift = tl.load(at + 2 * plane, mask=inside, other=0.0)
    squares = tl.load(at + 3 * plane, mask=inside, other=0.0)

    count, mean, rest, squares = merged(n, pivot, shift, squares)
    variance = squares / degrees_of_freedom(count, bessel)

    out = stats_ptr + columns
    tl.store(out, count, mask=columns < columns_total)
    tl.store(out + columns_total, mean, mask=columns < columns_total)
    tl.store(out + 2 * columns_total, rest, mask=columns < columns_total)
    tl.store(out + 3 * columns_total, variance, mask=columns < columns_total)
    if ORDER == 1:
        tl.store(result_ptr + columns, mean, mask=columns < columns_total)
    elif ORDER == 2:
        tl.store(result_ptr + columns, variance, mask=columns < columns_total)


@triton.jit
def moment_backward_kernel(
    grad_ptr,
    x_ptr,
    mask_ptr,
    stats_ptr,
    grad_x_ptr,
    length,
    inner,
    chunks,
    chunk,
    columns_total,
    bessel,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write g / n (order 1) or 2 g (x - mean) / (n - bessel) (order 2) where the mask counts, 0 elsewhere."""
    program = tl.program_id(0).to(tl.int64)
    _, outer, columns, first, last = chunk_of(program, length, inner, chunks, chunk, COLUMNS)
    origin = outer * length * inner + columns[None, :]
    of_column = outer * inner + columns
    g = tl.load(grad_ptr + of_column, mask=columns < inner, other=0.0)
    count = tl.load(stats_ptr + of_column, mask=columns < inner, other=0.0)
    mean = tl.load(stats_ptr + columns_total + of_column, mask=columns < inner, other=0.0)
    rest = tl.load(stats_ptr + 2 * columns_total + of_column, mask=columns < inner, other=0.0)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows < last)[:, None] & (columns < inner)[None, :]
        at = origin + rows[:, None] * inner
        counted = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        if ORDER == 1:
            slope = (g / tl.maximum(count, 1.0))[None, :]
        else:
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
            weight = 2.0 * g / degrees_of_freedom(count, bessel)
            slope = weight[None, :] * ((x - mean[None, :]) - rest[None, :])
        grad = tl.where(counted, slope, 0.0).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + at, grad, mask=inside)


@triton.jit
def normalize_kernel(x_ptr, mask_ptr, stats_ptr, out_ptr, size, KEEP_MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Write (x - mean) / sqrt(var + 1e-8), with the mean added back on request; 0 where the mask does not count."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mean = tl.load(stats_ptr + 1)
    scale = tl.rsqrt(tl.load(stats_ptr + 3) + WHITEN_EPS)
    counted = tl.load(mask_ptr + at, mask=at < size, other=0) != 0
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    rest = tl.load(stats_ptr + 2)
    y = ((x - mean) - rest) * scale
    if KEEP_MEAN:
        y = mean + (y + rest)
    tl.store(out_ptr + at, tl.where(counted, y, 0.0), mask=at < size)


@triton.jit
def gradient_sums_kernel(
    grad_ptr, x_ptr, mask_ptr, stats_ptr, sums_ptr, size, chunks, chunk, BLOCK: tl.constexpr
):
    """Write sum g and sum g (x - mean) over the counted elements of one chunk, as a column of [2, chunks]."""
    part = tl.program_id(0).to(tl.int64)
    first = part * chunk
    last = tl.minimum(first + chunk, size)
    mean = tl.load(stats_ptr + 1)
    rest = tl.load(stats_ptr + 2)
    grads = tl.zeros((BLOCK,), tl.float32)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counted = tl.load(mask_ptr + at, mask=at < last, other=0) != 0
        x = tl.load(x_ptr + at, mask=at < last, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=at < last, other=0.0)
        grads += tl.where(counted, g, 0.0)
        products += tl.where(counted, g * ((x - mean) - rest), 0.0)
    tl.store(sums_ptr + part, tl.sum(grads, axis=0))
    tl.store(sums_ptr + chunks + part, tl.sum(products, axis=0))


@triton.jit
def add_sums_kernel(sums_ptr, totals_ptr, chunks, CHUNKS: tl.constexpr):
    """Write the sums of the two rows of [2, chunks]."""
    parts = tl.arange(0, CHUNKS)
    tl.store(totals_ptr, tl.sum(tl.load(sums_ptr + parts, mask=parts < chunks, other=0.0), axis=0))
    tl.store(
        totals_ptr + 1, tl.sum(tl.load(sums_ptr + chunks + parts, mask=parts < chunks, other=0.0), axis=0)
    )


@triton.jit
def normalize_backward_kernel(
    grad_ptr,
    x_ptr,
    mask_ptr,
    stats_ptr,
    totals_ptr,
    grad_x_ptr,
    size,
    bessel,
    KEEP_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write r (g - mean g - r^2 (x - mean) sum(g (x - mean)) / (n - bessel)) [+ mean g], r = 1 / sqrt(var + 1e-8)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(stats_ptr)
    r = tl.rsqrt(tl.load(stats_ptr + 3) + WHITEN_EPS)
    mean_g = tl.load(totals_ptr) / tl.maximum(count, 1.0)
    slope = r * r * tl.load(totals_ptr + 1) / degrees_of_freedom(count, bessel)
    counted = tl.load(mask_ptr + at, mask=at < size, other=0) != 0
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + at, mask=at < size, other=0.0)
    centred = (x - tl.load(stats_ptr + 1)) - tl.load(stats_ptr + 2)
    grad = r * ((g - mean_g) - slope * centred)
    if KEEP_MEAN:
        grad += mean_g
    tl.store(grad_x_ptr + at, tl.where(counted, grad, 0.0).to(grad_x_ptr.dtype.element_ty), mask=at < size)


def _tile(length: int, inner: int) -> dict[str, int]:
    """Rows and columns of a tile: along the reduced axis where that is contiguous, else one line of columns."""
    if inner == 1:
        return {"ROWS": min(2048, max(128, triton.next_power_of_2(length))), "COLUMNS": 1}
    return {"ROWS": 32, "COLUMNS": 32}


def _cut(length: int, rows: int) -> tuple[int, int]:
    """(number of chunks, rows of a chunk): whole tiles of `rows`, at most MOST_CHUNKS chunks."""
    chunk = rows * triton.cdiv(length, rows * MOST_CHUNKS)
    assert chunk <= LONGEST_CHUNK, f"{length} elements in one column are too many to count in float32"
    return triton.cdiv(length, chunk), chunk


def _assert_layout(x: Tensor, mask: Tensor) -> None:
    for name, tensor in (("x", x), ("mask", mask)):
        assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"
        assert tensor.shape == x.shape, f"{name} has shape {tuple(tensor.shape)}, x {tuple(x.shape)}"
    assert x.dim() == 3, f"x has shape {tuple(x.shape)}"


def _assert_float32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    assert tensor.dtype == torch.float32, f"{name} is {tensor.dtype}"
    assert tensor.is_contiguous(), f"{name} has strides {tensor.stride()}"
    assert tensor.shape == shape, f"{name} has shape {tuple(tensor.shape)}"


def moments_forward(
    x: Tensor, mask: Tensor, *, unbiased: bool, order: int | None
) -> tuple[Tensor | None, Tensor]:
    """Return mean (order 1), variance (order 2) or None, float32 [columns], and stats [4, columns]; two launches.

    x [outer, length, inner] float32, bfloat16 or float16, contiguous; mask likewise, bool or numeric, nonzero counts.
    """
    _assert_layout(x, mask)
    outer, length, inner = x.shape
    columns = outer * inner
    if x.numel() == 0:
        empty = torch.zeros((STATS, columns), dtype=torch.float32, device=x.device)
        return None if order is None else torch.zeros_like(empty[0]), empty
    tile = _tile(length, inner)
    chunks, chunk = _cut(length, tile["ROWS"])
    partials = torch.empty((PARTIALS, chunks, columns), dtype=torch.float32, device=x.device)
    stats = torch.empty((STATS, columns), dtype=torch.float32, device=x.device)
    result = None if order is None else torch.empty(columns, dtype=torch.float32, device=x.device)
    merged_chunks = triton.next_power_of_2(chunks)
    merged_columns = MOST_CHUNKS // merged_chunks
    with on_device_of(x):
        partial_moments_kernel[(outer * triton.cdiv(inner, tile["COLUMNS"]) * chunks,)](
            x_ptr=x,
            mask_ptr=mask,
            partials_ptr=partials,
            length=length,
            inner=inner,
            chunks=chunks,
            chunk=chunk,
            columns_total=columns,
            plane=chunks * columns,
            **tile,
            **OPTIONS,
        )
        merge_moments_kernel[(triton.cdiv(columns, merged_columns),)](
            partials_ptr=partials,
            result_ptr=result,
            stats_ptr=stats,
            chunks=chunks,
            columns_total=columns,
            plane=chunks * columns,
            bessel=int(unbiased),
            ORDER=order or 0,
            CHUNKS=merged_chunks,
            COLUMNS=merged_columns,
            **OPTIONS,
        )
    return result, stats


def moment_backward(
    grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, *, unbiased: bool, order: int
) -> Tensor:
    """Return the gradient of x, contiguous, in its dtype, from `grad`, float32 [columns]; one launch."""
    _assert_layout(x, mask)
    outer, length, inner = x.shape
    columns = outer * inner
    _assert_float32("grad", grad, (columns,))
    _assert_float32("stats", stats, (STATS, columns))
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return grad_x
    tile = _tile(length, inner)
    chunks, chunk = _cut(length, tile["ROWS"])
    with on_device_of(x):
        moment_backward_kernel[(outer * triton.cdiv(inner, tile["COLUMNS"]) * chunks,)](
            grad_ptr=grad,
            x_ptr=x,
            mask_ptr=mask,
            stats_ptr=stats,
            grad_x_ptr=grad_x,
            length=length,
            inner=inner,
            chunks=chunks,
            chunk=chunk,
            columns_total=columns,
            bessel=int(unbiased),
            ORDER=order,
            **tile,
            **OPTIONS,
        )
    return grad_x


def normalize_forward(x: Tensor, mask: Tensor, *, unbiased: bool, keep_mean: bool) -> tuple[Tensor, Tensor]:
    """Return x normalised over all that counts, float32, and stats [4, 1]; x and mask are [1, size, 1]."""
    _, stats = moments_forward(x, mask, unbiased=unbiased, order=None)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out, stats
    with on_device_of(x):
        normalize_kernel[(triton.cdiv(x.numel(), TOKEN_OPTIONS["BLOCK"]),)](
            x_ptr=x,
            mask_ptr=mask,
            stats_ptr=stats,
            out_ptr=out,
            size=x.numel(),
            KEEP_MEAN=keep_mean,
            **TOKEN_OPTIONS,
        )
    return out, stats


def normalize_backward(
    grad: Tensor, x: Tensor, mask: Tensor, stats: Tensor, *, unbiased: bool, keep_mean: bool
) -> Tensor:
    """Return the gradient of x, contiguous, in its dtype, from `grad`, float32 [1, size, 1]; three launches."""
    _assert_layout(x, mask)
    _assert_float32("grad", grad, tuple(x.shape))
    _assert_float32("stats", stats, (STATS, 1))
    size = x.numel()
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if size == 0:
        return grad_x
    chunks, chunk = _cut(size, int(TOKEN_OPTIONS["BLOCK"]))
    sums = torch.empty((2, chunks), dtype=torch.float32, device=x.device)
    totals = torch.empty(2, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        gradient_sums_kernel[(chunks,)](
            grad_ptr=grad,
            x_ptr=x,
            mask_ptr=mask,
            stats_ptr=stats,
            sums_ptr=sums,
            size=size,
            chunks=chunks,
            chunk=chunk,
            **TOKEN_OPTIONS,
        )
        add_sums_kernel[(1,)](
            sums_ptr=sums,
            totals_ptr=totals,
            chunks=chunks,
            CHUNKS=triton.next_power_of_2(chunks),
            **OPTIONS,
        )
        normalize_backward_kernel[(triton.cdiv(size, TOKEN_OPTIONS["BLOCK"]),)](
            grad_ptr=grad,
            x_ptr=x,
            mask_ptr=mask,
            stats_ptr=stats,
            totals_ptr=totals,
            grad_x_ptr=grad_x,
            size=size,
            bessel=int(unbiased),
            KEEP_MEAN=keep_mean,
            **TOKEN_OPTIONS,
        )
    return grad_x
