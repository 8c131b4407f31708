"""What only the Triton backend does, in its interpreter."""

import pytest
import torch

from ppo_fast.ops import backends, fused_logprob


def test_label_out_of_range_is_nan_in_its_row_only() -> None:
    logits = torch.randn(4, 33, requires_grad=True)
    labels = torch.tensor([0, -100, 33, 32])
    logprobs, entropy = fused_logprob.logprobs_and_entropy(logits, labels, 1.0, "triton")
    assert logprobs.isnan().tolist() == [False, True, True, False]
    assert bool(entropy.isfinite().all())
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.isnan().all(-1).tolist() == [False, True, True, False]


def test_label_out_of_range_harms_nothing_where_it_is_masked() -> None:
    logits = torch.randn(2, 33, requires_grad=True)
    logprobs, entropy = fused_logprob.logprobs_and_entropy(logits, torch.tensor([-100, 1]), 1.0, "triton")
    gate = torch.tensor([0.0, 1.0])
    (gradient,) = torch.autograd.grad([logprobs, entropy], logits, [gate, torch.ones(2)])
    assert bool(gradient.isfinite().all())
    assert gradient[0].abs().sum() > 0  # the entropy's part is there


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_TRITON_INTERPRETED", False)
    with pytest.raises(ValueError, match=r"impl='triton' is not available.*TRITON_INTERPRET=1"):
        fused_logprob.logprobs_and_entropy(torch.randn(1, 3), torch.tensor([0]), 1.0, "triton")


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_TRITON_INSTALLED", False)
    reason = backends.unavailable("triton", torch.randn(1, 3))
    assert reason is not None
    assert "ppo-fast[triton]" in reason


def test_unknown_name_and_device() -> None:
    assert "'tpu'" in str(backends.unavailable("tpu", torch.randn(1, 3)))
    assert "on a GPU" in str(backends.unavailable("triton", torch.empty(1, 3, device="meta")))
    assert "on the cpu" in str(backends.unavailable("cpu", torch.empty(1, 3, device="meta")))
    assert "torch.int64" in str(backends.unavailable("cpu", torch.ones(1, 3, dtype=torch.int64)))


def test_grid_past_65535_rows() -> None:
    """Only the first axis of a GPU's grid is that long; a launcher on another axis would fail there."""
    from ppo_fast.kernels import logprob

    launched: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]):
            launched.append(grid)
            return lambda **_: None

    rows = 70_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob, "logprob_forward_kernel", Recorder())
        fused_logprob.logprobs_and_entropy(
            torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.int64), 1.0, "triton"
        )
    assert launched == [(rows,)]
