"""What the GPU path decides in plain torch: which kernels take which arguments, and in which shape they are given."""

import pytest
import torch

import model.kernels.check  # noqa: F401 - makes every operation known
from model.kernels import launch
from model.kernels.registry import OPERATIONS, Operation

BF16, FP32 = torch.bfloat16, torch.float32

# operation, type, sizes of its example -> what runs it on a GPU
CHOICES = [
    ("attention", BF16, {"head_dim": 128}, "torch-sdpa"),
    ("attention", BF16, {"head_dim": 256}, "torch-sdpa"),
    ("attention", BF16, {"head_dim": 464}, "triton"),
    ("attention", BF16, {"head_dim": 128, "documents": True}, "triton"),
    ("attention", FP32, {"head_dim": 464, "documents": True}, "torch-sdpa"),
    ("causal_conv1d", BF16, {"width": 4}, "triton"),
    ("causal_conv1d", BF16, {"width": 3}, "reference"),
    ("selective_scan", BF16, {}, "cuda"),
    ("selective_scan", BF16, {"channels": 33, "heads": 1}, "reference"),
    ("selective_scan", BF16, {"d_state": 8}, "reference"),
    ("selective_scan", FP32, {}, "reference"),
    ("mamba1", BF16, {"channels": 250, "heads": 1}, "fused"),
    ("mamba1", BF16, {"channels": 250, "heads": 2}, "reference"),
    ("mamba1", BF16, {"dt_rank": 3}, "reference"),
    ("mamba1", BF16, {"d_state": 8}, "reference"),
    ("mamba1", BF16, {"width": 2}, "reference"),
    ("mamba1", FP32, {}, "reference"),
    ("ssd", BF16, {"headdim": 16, "d_state": 16}, "triton"),
    ("ssd", BF16, {"headdim": 48}, "reference"),
    ("ssd", BF16, {"headdim": 8}, "reference"),
    ("ssd", BF16, {"d_state": 48}, "reference"),
    ("ssd", FP32, {}, "reference"),
    ("mamba2", BF16, {"heads": 3, "groups": 1, "headdim": 32, "d_state": 128}, "triton"),
    ("mamba2", BF16, {"headdim": 48}, "reference"),
    ("mamba2", BF16, {"d_state": 256}, "reference"),
    ("mamba2", BF16, {"width": 3}, "reference"),
    ("mamba2", FP32, {}, "reference"),
    ("rms_norm", FP32, {}, "triton"),
]


@pytest.mark.parametrize(("name", "dtype", "sizes", "expected"), CHOICES)
def test_kernels_get_what_they_can_take(monkeypatch, name, dtype, sizes, expected):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(Operation, "available", lambda self, name: True)
    assert OPERATIONS[name].chosen(**OPERATIONS[name].example("cpu", dtype, **sizes)) == expected


def test_segments_count_borders():
    """Ids that fall or come again begin another document; equal neighbours do not."""
    ids = torch.tensor([[3, 3, 1, 3, 3, 0], [0, 1, 2, 2, 2, 3]])
    found = launch.segments(ids)
    assert found.dtype == torch.int32 and found.tolist() == [[0, 0, 1, 2, 2, 3], [0, 1, 2, 2, 2, 3]]
    assert launch.segments(ids[:, :1]).tolist() == [[0], [0]]
    assert launch.segments(None) is None


@pytest.mark.parametrize("view", ["dense", "gap", "time first", "expanded", "one column"])
def test_rows(view):
    x = {
        "dense": torch.randn(2, 3, 4),
        "gap": torch.randn(2, 3, 9)[..., 2:6],
        "time first": torch.randn(3, 2, 4).transpose(0, 1),
        "expanded": torch.randn(()).expand(2, 3, 4),
        "one column": torch.randn(2, 3, 1),
    }[view]
    rows = launch.as_rows(x)
    assert torch.equal(rows, x.reshape(6, -1)) and (rows.stride(1) == 1 or rows.shape[1] == 1)
    assert (rows.data_ptr() == x.data_ptr()) == (view in ("dense", "gap", "one column"))


def test_results_lie_as_what_they_are_made_of():
    for x in (torch.randn(3, 2, 4).transpose(0, 1), torch.randn(2, 3, 4), torch.randn(3, 1, 4).transpose(0, 1)):
        out = launch.empty_like_layout(x)
        assert out.shape == x.shape and out.dtype == x.dtype
        assert out.shape[0] == 1 or (out.stride(0) < out.stride(1)) == (x.stride(0) < x.stride(1))
    wide = launch.empty_like_layout(torch.randn(3, 2, 4).transpose(0, 1), (2, 3, 5, 6), torch.float64)
    assert wide.shape == (2, 3, 5, 6) and wide.stride() == (30, 60, 6, 1) and wide.dtype == torch.float64


def test_rows_are_held_in_few_equal_parts():
    """The released models' widths, whole, of a group and of a tensor-parallel rank."""
    held = {2048: (1, 2048), 2560: (5, 512), 3584: (7, 512), 3712: (1, 4096), 5120: (5, 1024), 7168: (7, 1024)}
    held |= {512: (1, 512), 640: (5, 128), 896: (7, 128), 100: (1, 128), 64: (1, 64), 1: (1, 1)}
    assert {width: launch.parts(width) for width in held} == held
    for width in range(1, 9000, 7):
        count, size = launch.parts(width)
        assert count <= 8 and size & (size - 1) == 0 and (count - 1) * size < width <= count * size
    assert [launch.warps(n) for n in (1, 512, 1023, 1024, 3584, 5120, 16384)] == [1, 1, 1, 2, 4, 8, 16]
