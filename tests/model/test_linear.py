"""Gradients that the products add to float32 sums themselves: the same as autograd's, wherever they are computed."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import linear as linear_module
from model.column_linear import column_linear
from model.linear import linear, main_grads, neighbours
from model.parallel import Layout
from model.recompute import _recomputation
from model.row_linear import row_linear
from model.zamba import Zamba
from tests.model import tiny
from tests.model.processes import run

F64 = torch.float64
EVERYTHING = ["mamba", "attention", "mlp"]


def with_sums(model, dtype):
    """Gives each parameter a part of one flat tensor, as the engine does; name -> part."""
    flat = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=dtype)
    parts = flat.split([p.numel() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.main_grad = part.view(parameter.shape)
    return {name: parameter.main_grad for name, parameter in model.named_parameters()}


def summed(config, recompute=(), sequence=False, micro_batches=2, dtype=F64, sums=True, like=None):
    """name -> (the sum of all gradients in float64 or float32, whether autograd brought a part of it)."""
    model = Zamba(config, recompute=recompute, sequence_parallel=sequence, dtype=dtype)
    tiny.randomize(model)
    wide = F64 if dtype == F64 else torch.float32
    totals = with_sums(model, wide)
    if not sums:
        for parameter in model.parameters():
            del parameter.main_grad
    brought = set()
    for seed in range(micro_batches):
        model(*tiny.tokens(2, 40, seed)).mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                brought.add(name)
                totals[name] += parameter.grad
                parameter.grad = None
    return {name: (total, name in brought) for name, total in totals.items()}


def is_product(name):
    """Whether a parameter is a weight that only `linear` and `column_linear` multiply by."""
    inside_kernels = ("x_proj", "dt_proj", "conv", "norm")
    small = name.endswith(("dt_bias", "A_log", ".D")) or ("mlp.adapters" in name and ".b." in name)
    return name != "embedding.weight" and not small and not any(part in name for part in inside_kernels)


def products_of_a_step(sums):
    """FLOPs of all matrix products of a step in which everything is computed again."""
    model = tiny.randomize(Zamba(tiny.zamba2(), recompute=EVERYTHING))
    if sums:
        with_sums(model, torch.float32)
    with FlopCounterMode(display=False) as counter:
        model(*tiny.tokens(2, 40)).mean().backward()
    return counter.get_total_flops()


def test_the_last_product_of_a_sublayer_is_not_computed_again():
    """torch stops a recomputation before a product of its own whose inputs are all that is missing."""
    assert products_of_a_step(sums=True) == products_of_a_step(sums=False)


@pytest.mark.parametrize("sums", [False, True], ids=["autograd", "sums"])
def test_the_product_that_ends_a_sublayer(sums):
    x, weight = torch.randn(4, 2, 6, dtype=F64, requires_grad=True), torch.randn(5, 6, dtype=F64, requires_grad=True)
    direction, expected = torch.randn(4, 2, 5, dtype=F64), F.linear(x, weight)
    wanted = torch.autograd.grad(expected, [x, weight], direction)
    if sums:
        weight.main_grad = torch.zeros(5, 6, dtype=F64)
    out = row_linear(x, Layout(), weight)
    assert tiny.relative(out, expected) < 1e-14
    out.backward(direction)
    found = weight.main_grad if sums else weight.grad
    assert (weight.grad is None) == sums
    assert tiny.relative(x.grad, wanted[0]) < 1e-14 and tiny.relative(found, wanted[1]) < 1e-14
    with _recomputation():
        again = row_linear(x, Layout(), weight)
    assert again.shape == out.shape and again.isnan().all()


def assert_same_sums(found, wanted, sliced=()):
    assert found.keys() == wanted.keys()
    for name, (total, brought) in found.items():
        assert tiny.relative(total, wanted[name][0]) < 1e-12, name
        assert wanted[name][1], name
        assert brought == (not is_product(name) or any(part in name for part in sliced)), name


@pytest.mark.parametrize("recompute", [[], EVERYTHING], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", [tiny.zamba, tiny.zamba2])
def test_sums_are_those_of_autograds_gradients(family, recompute):
    assert_same_sums(summed(family(), recompute), summed(family(), recompute, sums=False))


# With fewer groups than ranks a rank multiplies by slices of the weights of B and C: their gradients are autograd's.
CASES = {
    "zamba": (tiny.zamba(), ()),
    "zamba2": (tiny.zamba2(), ()),
    "zamba2-one-group": (tiny.zamba2(mamba={"ngroups": 1}), ("in_proj.B", "in_proj.C")),
}


@pytest.mark.parametrize("sequence", [False, True], ids=["tp", "tp+sp"])
@pytest.mark.parametrize("case", CASES)
def test_sums_under_tensor_parallelism(case, sequence):
    config, sliced = CASES[case]
    found = run(2, 2, summed, config, EVERYTHING, sequence)
    wanted = run(2, 2, summed, config, EVERYTHING, sequence, 2, F64, False)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_same_sums(ours, theirs, sliced)


def test_a_shared_weights_sum_is_nearer_to_float64_in_bfloat16():
    """Autograd adds the gradients of a weight's uses in bfloat16; a sum has each in float32."""
    config = tiny.zamba2(num_layers=12, hybrid_layers=list(range(1, 12)), num_shared_blocks=1, adapters=[])
    exact = summed(config)
    ours, theirs = summed(config, dtype=torch.bfloat16), summed(config, dtype=torch.bfloat16, sums=False)
    shared = [name for name in exact if name.startswith("blocks.") and is_product(name)]
    error = lambda found: sum(float((found[n][0].double() - exact[n][0]).square().sum()) for n in shared) ** 0.5
    assert error(ours) < error(theirs)


PLACES = {"neighbours": (0, 5, 6, 1), "a gap": (0, 6, 7, 2), "the other order": (7, 3, 0, 3)}


@pytest.mark.parametrize("place", PLACES)
def test_one_product_serves_sums_that_are_neighbours(place, monkeypatch):
    products = []
    original = linear_module._add_product
    monkeypatch.setattr(linear_module, "_add_product", lambda *given: products.append(1) or original(*given))
    *starts, expected = PLACES[place]
    heights, buffer = (5, 1, 3), torch.zeros(12, 7, dtype=F64)
    weights = [torch.randn(height, 7, dtype=F64, requires_grad=True) for height in heights]
    stream = torch.randn(3, 2, 7, dtype=F64, requires_grad=True)
    direction = torch.randn(3, 2, sum(heights), dtype=F64)
    wanted = torch.autograd.grad(F.linear(stream, torch.cat(weights)), [stream, *weights], direction)
    for weight, start, height in zip(weights, starts, heights, strict=True):
        weight.main_grad = buffer[start : start + height]
    column_linear(stream, Layout(), weights).backward(direction)
    assert tiny.relative(stream.grad, wanted[0]) < 1e-14
    for weight, gradient in zip(weights, wanted[1:], strict=True):
        assert weight.grad is None and tiny.relative(weight.main_grad, gradient) < 1e-14
    assert len(products) == expected


def test_a_weight_without_a_sum_parts_its_neighbours():
    """Some of the weights that are multiplied as one have a sum, others are autograd's."""
    buffer = torch.zeros(9, 7, dtype=F64)
    weights = [torch.randn(height, 7, dtype=F64, requires_grad=True) for height in (2, 3, 1, 3)]
    weights[0].main_grad, weights[3].main_grad = buffer[:2], buffer[2:5]
    stream = torch.randn(3, 2, 7, dtype=F64, requires_grad=True)
    direction = torch.randn(3, 2, 9, dtype=F64)
    wanted = torch.autograd.grad(F.linear(stream, torch.cat(weights)), [stream, *weights], direction)
    column_linear(stream, Layout(), weights).backward(direction)
    found = [
        weight.grad if total is None else total for weight, total in zip(weights, main_grads(weights), strict=True)
    ]
    assert weights[0].grad is None is weights[3].grad
    for ours, theirs in zip(found, wanted[1:], strict=True):
        assert tiny.relative(ours, theirs) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strided", [False, True])
def test_linear_is_bit_equal_to_torchs(dtype, strided):
    """With a sum, on a CPU: output, the input's gradient and the weight's, of any leading shape and strides."""
    x = torch.randn(5, 3, 14, dtype=dtype)[..., :7] if strided else torch.randn(5, 3, 7, dtype=dtype)
    x.requires_grad_()
    weight = torch.randn(4, 7, dtype=dtype, requires_grad=True)
    direction = torch.randn(5, 3, 4, dtype=dtype)
    expected = F.linear(x, weight)
    wanted = torch.autograd.grad(expected, [x, weight], direction)
    weight.main_grad = torch.zeros(4, 7)
    out = linear(x, weight)
    out.backward(direction)
    assert torch.equal(out, expected) and torch.equal(x.grad, wanted[0])
    assert weight.grad is None and torch.equal(weight.main_grad, wanted[1].float())


def test_neighbours_is_none_across_storages():
    one, two = torch.zeros(2, 3), torch.zeros(2, 3)
    assert neighbours([one, two]) is None
    assert neighbours([one]).data_ptr() == one.data_ptr()
