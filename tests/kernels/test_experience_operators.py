"""The experience stage as torch operators, and at sizes where offsets, grids and threads could go wrong."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import ppo_fast
from ppo_fast.ops import experience_gradient, fused_estimate, fused_experience

CPU = [] if torch.cuda.is_available() else ["cpu"]
IMPLS = [*CPU, "triton"]
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]])


def inputs(**changed: Tensor) -> dict[str, Tensor]:
    tokens = {name: torch.randn(3, 4) for name in ("logprobs", "ref_logprobs", "values")}
    return {**tokens, "mask": MASK, "scores": torch.randn(3), **changed}


def coefficients(impl: str) -> Tensor:
    return fused_estimate.packed((0.1, 5.0, 0.9, 0.8), torch.device("cpu"), impl)


@pytest.mark.parametrize("whitening", ["none", "parts", "biased", "unbiased"])
@pytest.mark.parametrize("impl", CPU and IMPLS)
def test_the_operator_is_well_formed(impl: str, whitening: str) -> None:
    learns = whitening == "none"
    given = {name: x.requires_grad_(learns and x.is_floating_point()) for name, x in inputs().items()}
    given["ref_logprobs"] = given["ref_logprobs"].detach()
    given["bootstrap"] = torch.randn(3, requires_grad=learns)
    arguments = (given.pop("mask"), coefficients(impl), "k3", "carry", whitening, impl)
    torch.library.opcheck(fused_experience.experience, arguments, given)


@pytest.mark.parametrize("impl", CPU and IMPLS)
def test_the_packed_operator_is_well_formed(impl: str) -> None:
    x = torch.randn(6, requires_grad=True)
    arguments = (torch.tensor([1, 1, 0, 1, 1, 1]), coefficients(impl), "k1", "multiply", "none", impl)
    given = {"cu_seqlens": torch.tensor([0, 2, 2, 6]), "token_rewards": x, "values": torch.randn(6)}
    own = {"gamma": torch.rand(3), "lam": torch.rand(3)}
    torch.library.opcheck(fused_experience.experience, arguments, given | own)


@pytest.mark.parametrize("impl", CPU and IMPLS)
def test_its_parts_are_well_formed(impl: str) -> None:
    x, down = torch.randn(3, 4), torch.randn(3, 4)
    scan = (down, x, MASK, coefficients(impl), "carry", impl, None, None, torch.rand(3))
    torch.library.opcheck(experience_gradient.gae_backward, scan)
    clamps = fused_estimate.packed((1.0, 2.0), torch.device("cpu"), impl)
    torch.library.opcheck(fused_estimate.sampled_kl, (x.requires_grad_(), down, clamps, "k3", impl))
    x = x.detach()
    torch.library.opcheck(fused_estimate.sampled_kl_backward, (down, x, x + 1, clamps, "abs", impl))
    parts = torch.rand(3, 3).double() if impl == "cpu" else torch.rand(4, 3)
    torch.library.opcheck(fused_experience.merge_parts, (parts, impl))
    torch.library.opcheck(fused_experience.whiten_by_parts, (x, MASK, parts, False, impl))


@pytest.mark.parametrize("impl", CPU and IMPLS)
def test_one_graph_for_any_coefficient(impl: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(values: Tensor, given: dict[str, Tensor], x: float) -> Tensor:
        options: dict[str, Any] = {"kl_coef": x, "clip_score": 4 * x, "gamma": x / 2, "lam": 1 - x / 2}
        out = ppo_fast.shaped_gae(**given, values=values, impl=impl, **options)
        kl = ppo_fast.kl_estimate(out.returns, values, input_clamp=x, output_clamp=2 * x, impl=impl)
        return (out.rewards + out.advantages + out.returns + kl).sum()

    given = inputs()
    values = given.pop("values").requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for x in (0.1, 0.2, 0.5, 1.0, 1.5):
        a, b = (torch.autograd.grad(f(values, given, x), values)[0] for f in (compiled, function))
        assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(values, given, 0.3), function(values, given, 0.3))
    assert counter.frame_count == 3  # the first value, any other, and without gradients


@pytest.mark.skipif(not CPU, reason="the native kernel runs on the CPU")
@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("shape", [(70, 1500), (2000, 40), (1, 70_000)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int], threads: int) -> None:
    tokens = {name: torch.randn(shape) for name in ("logprobs", "ref_logprobs", "values")}
    given = {**tokens, "mask": torch.rand(shape) < 0.9, "scores": torch.randn(shape[0])}
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        results.append(ppo_fast.shaped_gae(**given, impl="cpu"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def recurrence(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE of rows in which every token counts, in Python's floats."""
    rows = []
    for r, v in zip(rewards.tolist(), values.tolist(), strict=True):
        advantage, following, row = 0.0, 0.0, []
        for reward, value in zip(reversed(r), reversed(v), strict=True):
            advantage = reward + gamma * following - value + gamma * lam * advantage
            following = value
            row.append(advantage)
        rows.append(row[::-1])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.skipif(not CPU, reason="the native kernel runs on the CPU")
@pytest.mark.parametrize("shape", [(1, 131_072), (65_536, 3)])
def test_long_responses_and_many_of_them(shape: tuple[int, int]) -> None:
    rewards, values = torch.randn(shape), torch.randn(shape)
    advantages, returns = ppo_fast.gae(rewards, values, torch.ones(shape), gamma=0.999, impl="cpu")
    truth = recurrence(rewards.double(), values.double(), 0.999, 0.95)
    torch.testing.assert_close(advantages.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns.double(), truth + values, rtol=1e-5, atol=1e-5)


def test_a_program_for_every_sequence_on_the_axis_that_takes_2_31_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ppo_fast.kernels import experience, gae_backward

    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda **_: None

    monkeypatch.setattr(experience, "experience_kernel", Recorder())
    monkeypatch.setattr(gae_backward, "gae_backward_kernel", Recorder())
    x = torch.zeros(70_000, 2, requires_grad=True)
    ppo_fast.gae(x, x, torch.ones(70_000, 2), impl="triton")[0].sum().backward()
    assert grids == [(70_000,), (70_000,)]


@pytest.mark.skipif(not CPU, reason="untouched pages of the CPU's memory cost nothing")
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_past_2_31_elements(impl: str) -> None:
    """Three rows 2^30 + 64 elements apart: an offset in 32 bits would wrap at the third."""
    far = 2**30 + 64
    storage = torch.empty(2 * far + 8, dtype=torch.bfloat16)
    given = inputs(mask=torch.ones(3, 4, dtype=torch.bool))
    near = {name: x.bfloat16() for name, x in given.items() if x.shape == (3, 4) and name != "mask"}
    expected = ppo_fast.shaped_gae(**given | near, impl=impl)
    for name, x in near.items():
        view = storage.as_strided((3, 4), (far, 1))
        view.copy_(x)
        got = ppo_fast.shaped_gae(**given | near | {name: view}, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), name
