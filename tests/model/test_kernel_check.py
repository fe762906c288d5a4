"""The check of a run's kernels before it begins: at the model's own widths, against float64, NaN included."""

import pytest
import torch

from common.errors import ConfigError
from model.kernels import check
from model.kernels.registry import OPERATIONS, Operation
from model.kernels.rms_norm import rms_norm
from tests.model import tiny


@pytest.mark.parametrize("taps", [3, 4])
@pytest.mark.parametrize(("family", "scan"), [("zamba", "selective_scan"), ("zamba2", "ssd")])
def test_what_a_run_needs_is_asked_of_the_model_s_own_widths(monkeypatch, family, scan, taps):
    """With other than four taps a mixer is taken apart on a GPU: shown as such, and its scan is tried in its place."""
    even = {"dt_rank": 4} if family == "zamba" else {}
    config = getattr(tiny, family)(mamba={"num_heads": 2, "d_state": 16, "d_conv": taps, **even})
    tried = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(Operation, "available", lambda self, name: True)
    monkeypatch.setattr(check.torch, "device", lambda _: type("device", (), {"type": "cuda"}))
    monkeypatch.setattr(
        check, "compare", lambda operation, name, _: tried.append(operation.name) or check.Comparison(name, 0, 0, 0, "")
    )
    chosen = check.check_kernels(config, device="cpu", dtype=torch.bfloat16)
    mixer = {"zamba": "mamba1", "zamba2": "mamba2"}[family]
    fast = {"mamba1": "fused", "mamba2": "triton", "selective_scan": "cuda", "ssd": "triton"}
    assert chosen[mixer] == (fast[mixer] if taps == 4 else "reference") and chosen[scan] == fast[scan]
    assert tried == ["attention", mixer if taps == 4 else scan]


@pytest.mark.parametrize("spoil", [torch.mul, torch.add], ids=["everything", "only the output"])
def test_a_kernel_that_gives_nan_is_refused(monkeypatch, spoil):
    operation, right = OPERATIONS["attention"], OPERATIONS["attention"].reference
    monkeypatch.setitem(operation._loaded, "spoilt", lambda *a, **k: spoil(right(*a, **k), torch.nan))
    monkeypatch.setattr(operation, "chosen", lambda *_, **__: "spoilt")
    monkeypatch.setattr(check.torch, "device", lambda _: type("device", (), {"type": "cuda"}))
    with pytest.raises(ConfigError, match=r"kernels\.attention: spoilt: \w+ is off by nan"):
        check.check_kernels(tiny.zamba2(), device="cpu", dtype=torch.bfloat16)


def test_a_comparison_is_with_float64():
    arguments = rms_norm.example("cpu", torch.bfloat16)
    found = check.compare(rms_norm, "reference", arguments)
    assert 1e-3 < found.error == found.reference_error < 5e-3 and found.ratio < 1


@pytest.mark.parametrize(("tensor", "packed", "groups", "heads"), [(1, 168, 2, 2), (2, 84, 1, 1), (4, 50, 1, 1)])
def test_examples_have_a_rank_s_widths(tensor, packed, groups, heads):
    """z, x, its own groups' B and C, dt; with fewer groups or heads than ranks a rank has one, or a part of one."""
    at = (tensor, "cpu", torch.float32)
    two, one = ({op.name: a for op, a in check.examples(c, *at)} for c in (tiny.zamba2(), tiny.zamba()))
    assert two["mamba2"]["packed"].shape[-1] == packed and two["mamba2"]["groups"] == groups
    assert two["gated_norm"]["groups"] == two["ssd"]["B"].shape[2] == groups and two["ssd"]["x"].shape[2] == 8 // tensor
    assert one["mamba1"]["packed"].shape[-1] == 128 // tensor and one["mamba1"]["heads"] == heads
    assert one["selective_scan"]["B"].shape[2] == heads and one["attention"]["q"].shape[2] == 4 // tensor
    assert two["cross_entropy"]["logits"].shape[-1] == 64 // tensor
    assert two["geglu"]["packed"].shape[-1] == 96 // tensor + 4
