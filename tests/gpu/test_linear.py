"""Weight gradients that the products add to float32 sums, on a GPU: exact to float32, in place, without a copy."""

import pytest
import torch

from model.column_linear import column_linear
from model.linear import linear
from model.parallel import Layout


def gradients(dtype):
    """A stream, three weights of 4096 + 1024 + 64 outputs, and the output's gradient, larger than one tile."""
    x = torch.randn(1024, 2, 2048, device="cuda", dtype=dtype, requires_grad=True)
    heights = (4096, 1024, 64)
    whole = (0.02 * torch.randn(sum(heights), 2048, device="cuda")).to(dtype)
    weights = [part.detach().requires_grad_() for part in whole.split(heights)]
    return x, weights, torch.randn(1024, 2, sum(heights), device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sums_are_float32(dtype):
    """Two backward passes; what the compute type would round off is there."""
    x, weights, direction = gradients(dtype)
    exact = 2 * direction.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()
    flat = torch.zeros(exact.shape, device="cuda")
    for weight, part in zip(weights, flat.split([len(w) for w in weights]), strict=True):
        weight.main_grad = part
    for _ in range(2):
        column_linear(x, Layout(), weights).backward(direction)
    assert all(weight.grad is None for weight in weights)
    assert (flat.double() - exact).norm() < 1e-5 * exact.norm()
    flat.zero_()
    linear(x, weights[0]).backward(direction[..., :4096])
    assert (2 * flat[:4096].double() - exact[:4096]).norm() < 1e-5 * exact[:4096].norm()
    assert not flat[4096:].any()


def test_nothing_is_allocated_for_a_sum():
    x, weights, direction = gradients(torch.bfloat16)
    flat = torch.zeros(direction.shape[-1], x.shape[-1], device="cuda")
    for weight, part in zip(weights, flat.split([len(w) for w in weights]), strict=True):
        weight.main_grad = part
    column_linear(x, Layout(), weights).backward(direction)
    x.grad = None
    out = column_linear(x, Layout(), weights)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out.backward(direction)
    assert torch.cuda.max_memory_allocated() - before < x.nbytes + flat.nbytes / 16


def test_products_repeat_bit_for_bit():
    found = []
    x, weights, direction = gradients(torch.bfloat16)
    for _ in range(3):
        flat = torch.full((direction.shape[-1], x.shape[-1]), 0.1, device="cuda")
        for weight, part in zip(weights, flat.split([len(w) for w in weights]), strict=True):
            weight.main_grad = part
        column_linear(x, Layout(), weights).backward(direction)
        found.append(flat)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
