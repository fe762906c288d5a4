"""The selective scan's CUDA kernels without a GPU: a C++ compiler builds them for a CPU, with emulated_cuda.h in place
of the device; threads take turns. It shows that arithmetic and indexing are right, not that they are fast.
"""

import ctypes
import functools
import importlib
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from model.kernels.causal_conv1d.reference import causal_conv1d
from model.kernels.check import compare
from model.kernels.launch import empty_like_layout
from model.kernels.mamba1 import mamba1
from model.kernels.registry import Fast
from model.kernels.selective_scan import cuda_scan, selective_scan

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
HERE = Path(__file__).parent

MAIN = """
#include "{header}"
#include "{source}"
extern "C" void launch(const {structure}* in, int x, int y, int threads, long bytes) {{
  emulated::run([in] {{ {kernel}(*in); }}, x, y, threads, bytes);
}}
"""


class Emulated:
    """Takes the place of `nvrtc.Kernel`."""

    def __init__(self, folder, source, name, defines):
        text = MAIN.format(
            header=HERE / "emulated_cuda.h", source=source, structure=source.stem.capitalize(), kernel=name
        )
        program = folder / f"{source.stem}-{defines['DOCUMENTS']}-{defines.get('BACKWARDS', 0)}.cpp"
        program.write_text(text)
        macros = [f"-D{key}={value}" for key, value in {"BACKWARDS": 0, **defines}.items()]
        options = ["-std=c++17", "-O1", "-Werror=return-type", "-shared", "-fPIC"]
        library = program.with_suffix(".so")
        subprocess.run(["g++", *options, *macros, "-o", library, program], check=True)
        self._launch = ctypes.CDLL(str(library)).launch

    def __call__(self, grid, threads, shared_bytes, argument, device):
        self._launch(ctypes.byref(argument), *grid, threads, ctypes.c_long(shared_bytes))


@pytest.fixture(scope="module", autouse=True)
def _emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_scan, "Kernel", functools.partial(Emulated, folder))
        cuda_scan.kernel.cache_clear()
        yield
    cuda_scan.kernel.cache_clear()


def arguments(time, channels, heads, documents):
    torch.manual_seed(0)
    return selective_scan.example("cpu", torch.bfloat16, time, channels, heads, documents=documents)


# Whole tiles and parts of one, a step; blocks of 32 channels, parts of one and of a group of 16.
SIZES = [(37, 96, 2), (16, 200, 1), (1, 32, 1), (50, 34, 1)]


CASES = [(*size, documents) for size in SIZES for documents in (False, True) if size[0] > 1 or not documents]


@pytest.mark.parametrize(("time", "channels", "heads", "documents"), CASES)
def test_as_exact_as_plain_torch(time, channels, heads, documents, monkeypatch):
    monkeypatch.setitem(selective_scan._loaded, "cuda", cuda_scan.selective_scan_cuda)
    assert [type(fast) for fast in selective_scan.fast] == [Fast]
    result = compare(selective_scan, "cuda", arguments(time, channels, heads, documents))
    assert 0 < result.ratio <= 1, result


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("time", [1, 8, 9, 17, 33, 66])
def test_the_order_of_threads_does_not_matter(time, documents, tmp_path, monkeypatch):
    """Between two barriers; with one to nine tiles backward, one to three forward."""
    found = []
    for order in (0, 1):
        kernel = lambda source, name, defines, order=order: Emulated(
            tmp_path, source, name, {**defines, "BACKWARDS": order}
        )
        monkeypatch.setattr(cuda_scan, "Kernel", kernel)
        cuda_scan.kernel.cache_clear()
        given = arguments(time, 68, 2, documents and time > 1)
        out = cuda_scan.selective_scan_cuda(**given)
        leaves = [value for value in given.values() if value is not None and value.requires_grad]
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    cuda_scan.kernel.cache_clear()
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found, strict=True))


def test_nothing_crosses_a_border():
    """Another first document leaves outputs and gradients of the second one bit-equal."""
    given = arguments(40, 64, 2, documents=True)
    second = given["seq_idx"] == 1
    other = {
        name: torch.where(second.view(2, 40, *[1] * (value.ndim - 2)), value, torch.randn_like(value)).detach()
        if name in ("x", "dt", "B", "C", "z")
        else value
        for name, value in given.items()
    }
    found = []
    for values in (given, other):
        leaves = {
            name: value.detach().clone().requires_grad_() if name in ("x", "dt", "B", "C", "z") else value
            for name, value in values.items()
        }
        out = cuda_scan.selective_scan_cuda(**leaves)
        wanted = [leaves[name] for name in ("x", "dt", "B", "C", "z")]
        found.append([out, *torch.autograd.grad(out.float().square().sum(), wanted)])
    assert all(torch.equal(a[second], b[second]) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(("name", "place"), [("dt", (1, 3, 7)), ("dt_bias", (7,))])
def test_nan_is_not_lost(name, place):
    """It reaches the output, so that a step with it is skipped: comparisons and minima of NaN give the other value."""
    given = arguments(20, 32, 1, documents=False)
    with torch.no_grad():
        given[name][place] = torch.nan
    assert cuda_scan.selective_scan_cuda(**given).isnan().any()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -1e-34, -200.0, 80.0])
def test_closed_and_open_gates(value, monkeypatch):
    """The gradient of z is computed from the gated output, which a gate of 0 would wipe out."""
    monkeypatch.setitem(selective_scan._loaded, "cuda", cuda_scan.selective_scan_cuda)
    given = arguments(20, 32, 1, documents=False)
    with torch.no_grad():
        given["z"][:, ::2, 3:29] = value
    result = compare(selective_scan, "cuda", given)
    assert 0 < result.ratio <= 1, result
    z = given["z"]
    grads = []
    for scale in (1.0, 2.0**-50):  # small gradients are no smaller than their factor makes them
        out = cuda_scan.selective_scan_cuda(**given)
        grads += torch.autograd.grad(out, z, scale * torch.ones_like(out))
    assert torch.equal(grads[0] * 2.0**-50, grads[1])
    (grad,) = torch.autograd.grad(cuda_scan.selective_scan_cuda(**given).float().sum(), z)
    assert (grad[:, ::2, 3:29].abs().max() > 1e-3) == (value > -1)


def test_rows_that_are_no_words_are_copied():
    """B and C behind an odd number of columns, x with an odd stride."""
    given = arguments(20, 32, 1, documents=False)
    expected = cuda_scan.selective_scan_cuda(**given)
    heads = torch.zeros(*given["B"].shape[:2], 2, 19, dtype=torch.bfloat16)[..., :16]  # the second one is misplaced
    one = torch.zeros(1, 1, 35, dtype=torch.bfloat16)[..., :34]  # which torch calls contiguous
    for value in (heads, one):
        with pytest.raises(ValueError, match="whole words"):
            cuda_scan._rows(value)
        cuda_scan._rows(cuda_scan.words(value))
    for name in ("x", "B"):
        value = given[name].detach()
        odd = torch.zeros(*value.shape[:-1], value.shape[-1] + 3, dtype=value.dtype)[..., 1 : value.shape[-1] + 1]
        odd.copy_(value)
        with pytest.raises(ValueError, match="whole words"):
            cuda_scan._rows(odd)
        assert torch.equal(cuda_scan.selective_scan_cuda(**{**given, name: odd}), expected)


@pytest.fixture
def fused_mamba1(monkeypatch):
    """The fused mixer with plain torch in place of the convolution's kernels."""

    def forward(x, weight, bias, seg):
        return empty_like_layout(x).copy_(causal_conv1d(x, weight, bias, seq_idx=seg))

    def backward(dy, x, weight, bias, seg, dx):
        leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
        with torch.enable_grad():
            out = causal_conv1d(*leaves, seq_idx=seg)
        of_x, of_weight, of_bias = torch.autograd.grad(out, leaves, dy)
        dx.copy_(of_x)
        return of_weight, of_bias

    package, name = "model.kernels.causal_conv1d", "triton_causal_conv1d"
    stand_in = types.SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setitem(sys.modules, f"{package}.{name}", stand_in)
    monkeypatch.setattr(importlib.import_module(package), name, stand_in, raising=False)
    monkeypatch.delitem(sys.modules, "model.kernels.mamba1.fused_mamba1", raising=False)
    return importlib.import_module("model.kernels.mamba1.fused_mamba1")


@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "borders"])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_mixer_is_as_exact_as_plain_torch(fused_mamba1, heads, documents, monkeypatch):
    monkeypatch.setitem(mamba1._loaded, "fused", fused_mamba1.mamba1)
    torch.manual_seed(0)
    given = mamba1.example("cpu", torch.bfloat16, time=40, channels=64, heads=heads, documents=documents)
    result = compare(mamba1, "fused", given)
    assert 0 < result.ratio <= 1, result
