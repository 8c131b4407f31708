"""The operators of the masked moments: well formed, traceable, of any size."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import ppo_fast
from ppo_fast.ops import fused_moments

CPU = [] if torch.cuda.is_available() else ["cpu"]
IMPLS = [*CPU, "triton"]
WELL_FORMED = [
    *(("cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    *(("triton", dtype) for dtype in (torch.float32, torch.bfloat16)),
]


@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("impl", "dtype"), CPU and WELL_FORMED)
def test_moment_is_well_formed(impl: str, dtype: torch.dtype, axis: int | None, order: int) -> None:
    x = torch.randn(3, 7).to(dtype).requires_grad_()
    mask = torch.rand(3, 7) > 0.3
    arguments = (x, mask, axis, True, order, impl)
    torch.library.opcheck(fused_moments.masked_moment, arguments)
    value, stats = (y.detach() for y in fused_moments.masked_moment(*arguments))
    torch.library.opcheck(
        fused_moments.masked_moment_backward, (value, x.detach(), mask, stats, axis, True, order, impl)
    )


@pytest.mark.parametrize("impl", CPU and IMPLS)
def test_a_mean_is_never_over_one_less(impl: str) -> None:
    x, mask = torch.randn(3, 7), torch.rand(3, 7) > 0.3
    results = []
    for unbiased in (False, True):
        leaf = x.clone().requires_grad_()
        mean, _ = fused_moments.masked_moment(leaf, mask, 0, unbiased, 1, impl)
        results.append((mean, *torch.autograd.grad(mean.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("keep_mean", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), CPU and WELL_FORMED)
def test_normalize_is_well_formed(impl: str, dtype: torch.dtype, keep_mean: bool) -> None:
    x, mask = torch.randn(3, 7).to(dtype).requires_grad_(), torch.rand(3, 7) > 0.3
    arguments = (x, mask, False, keep_mean, impl)
    torch.library.opcheck(fused_moments.masked_normalize, arguments)
    value, stats = (y.detach() for y in fused_moments.masked_normalize(*arguments))
    torch.library.opcheck(
        fused_moments.masked_normalize_backward, (value, x.detach(), mask, stats, False, keep_mean, impl)
    )


LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "mean": lambda x, mask, impl: ppo_fast.masked_mean(x, mask, impl=impl).square(),
    "var": lambda x, mask, impl: ppo_fast.masked_var(x, mask, -1, unbiased=True, impl=impl).square().sum(),
    "whiten": lambda x, mask, impl: ppo_fast.masked_whiten(x, mask, impl=impl).exp().sum(),
    "rescale": lambda x, mask, impl: ppo_fast.masked_rescale(x, mask, impl=impl).exp().sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("impl", CPU and IMPLS)
def test_public_op_compiles_to_one_graph(impl: str, loss: Callable[[Tensor, Tensor, str], Tensor]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for shape in ((3, 7), (4, 9), (5, 11)):
        x, mask = torch.randn(shape, requires_grad=True), torch.rand(shape) > 0.3
        gradients = [torch.autograd.grad(f(x, mask, impl), x)[0] for f in (compiled, loss)]
        assert torch.equal(*gradients)
    assert counter.frame_count <= 2  # the second shape teaches that shapes vary


def test_float64_has_no_kernel() -> None:
    x = torch.randn(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"impl='triton' is not available for masked_mean.*float64"):
        ppo_fast.masked_mean(x, torch.ones(3), impl="triton")


@pytest.mark.parametrize("length", [1, 63, 64, 65, 2**16, 2**16 + 1, 2**27 + 1, 65536 * 131072])
@pytest.mark.parametrize("rows", [64, 128, 2048])
def test_chunks_cover_a_column_and_stay_few(length: int, rows: int) -> None:
    from ppo_fast.kernels import moments

    chunks, chunk = moments._cut(length, rows)
    assert chunks <= moments.MOST_CHUNKS
    assert chunk % rows == 0
    assert (chunks - 1) * chunk < length <= chunks * chunk


def test_too_long_a_column_is_refused() -> None:
    from ppo_fast.kernels import moments

    with pytest.raises(AssertionError, match="too many to count"):
        moments._cut(2**34 + 1, 2048)


def test_offsets_past_two_to_the_31_elements() -> None:
    """One tile of a matrix whose row stride fits in 32 bits and whose third row's offset does not.

    The launchers need a contiguous x, so a kernel is launched here on one program; of the gigabytes of each tensor no
    other page is touched.
    """
    from ppo_fast.kernels import moments

    inner, columns = 2**30 + 8, 32
    size = 3 * inner
    x = torch.empty(size, dtype=torch.bfloat16)
    mask = torch.empty(size, dtype=torch.bool)
    near_x, near_mask = torch.randn(3, columns).bfloat16(), torch.rand(3, columns) > 0.3
    x.as_strided((3, columns), (inner, 1)).copy_(near_x)
    mask.as_strided((3, columns), (inner, 1)).copy_(near_mask)
    partials = torch.full((moments.PARTIALS, columns), torch.nan)
    shared = {"length": 3, "inner": inner, "chunks": 1, "chunk": 64, "ROWS": 64, "COLUMNS": columns}
    moments.partial_moments_kernel[(1,)](
        x_ptr=x, mask_ptr=mask, partials_ptr=partials, columns_total=inner, plane=columns, **shared
    )
    assert torch.equal(partials[0], near_mask.sum(0).float())
    expected = ppo_fast.masked_mean(near_x, near_mask, 0)
    torch.testing.assert_close(partials[1] + partials[2], expected)

    grad, grad_x = torch.randn(columns), torch.empty(size, dtype=torch.bfloat16)
    moments.moment_backward_kernel[(1,)](
        grad_ptr=grad,
        x_ptr=x,
        mask_ptr=mask,
        stats_ptr=partials,
        grad_x_ptr=grad_x,
        columns_total=columns,
        bessel=0,
        ORDER=1,
        **shared,
    )
    got = grad_x.as_strided((3, columns), (inner, 1)).float()
    torch.testing.assert_close(got, near_mask * grad / near_mask.sum(0).clamp(min=1), rtol=1e-2, atol=0)


def test_every_grid_lies_on_its_first_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first axis of a GPU's grid takes more than 65535 programs."""
    from ppo_fast.kernels import moments

    launched: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            launched.append(grid)
            return lambda **_: None

    for name in ("partial_moments_kernel", "merge_moments_kernel", "moment_backward_kernel"):
        monkeypatch.setattr(moments, name, Recorder())
    x = torch.zeros(70_000, 2, requires_grad=True)
    ppo_fast.masked_mean(x, torch.ones(70_000, 2), -1, impl="triton").sum().backward()
    assert [len(grid) for grid in launched] == [1, 1, 1]
    assert launched[0] == launched[2] == (70_000,)


def test_the_epsilon_is_the_references() -> None:
    from ppo_fast.kernels import moments

    from ppo_fast.reference.moments import WHITEN_EPS

    assert moments.WHITEN_EPS.value == WHITEN_EPS


@pytest.mark.parametrize(("impl", "numbers"), [(impl, (1, 3) if impl == "cpu" else (4, 1)) for impl in IMPLS])
def test_kept_for_the_backward_are_the_inputs_and_few_numbers_a_column(
    impl: str, numbers: tuple[int, int]
) -> None:
    x, mask = torch.randn(50, 20, requires_grad=True), torch.ones(50, 20, dtype=torch.bool)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for f in (ppo_fast.masked_mean, ppo_fast.masked_whiten):
            f(x, mask, impl=impl)
    assert [tuple(tensor.shape) for tensor in kept] == 2 * [(50, 20), (50, 20), numbers]
    inputs = {x.data_ptr(), mask.data_ptr()}
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 4} == inputs
