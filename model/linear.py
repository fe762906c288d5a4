"""Products with weights whose gradients the products themselves add up in float32.

Megatron's convention: where a parameter has a `main_grad`, a float32 tensor of its shape (train/engine.py sets it), the
product that computes the weight's gradient adds to it, and autograd gets none. So a gradient is neither rounded to the
compute type nor written, read and added in passes of their own, and those of a weight with many uses do not wait for
each other. Without it a gradient goes the usual way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """(..., inputs) -> (..., outputs), without a bias; weight: (outputs, inputs)."""
    if main_grads([weight])[0] is None:
        return F.linear(x, weight)
    out = _Linear.apply(x, weight)
    assert isinstance(out, Tensor)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        ctx.save_for_backward(rows, weight)
        # Not looked up in backward: recomputation hands back other tensors of the same memory.
        ctx.sums, ctx.shape = main_grads([weight]), x.shape
        return (rows @ weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grads = grad.flatten(0, -2)
        return (grads @ weight).view(ctx.shape), *weight_gradients(grads, rows, [weight], ctx.sums)


def main_grads(weights: Iterable[Tensor]) -> list[Tensor | None]:
    """Where the gradient of each weight is summed in float32; None: nowhere, it is autograd's."""
    return [getattr(weight, "main_grad", None) for weight in weights]


def weight_gradients(
    grads: Tensor, rows: Tensor, weights: Sequence[Tensor], sums: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of weights that were multiplied as one: None for those added to their sum.

    Args:
        grads: (rows, outputs of all weights), of the product's output. rows: (rows, inputs), its input.
        sums: `main_grads` of the weights.
    """
    found: list[Tensor | None] = []
    place = 0
    for total, heights in _runs(weights, sums):
        columns = grads[:, place : place + sum(heights)]
        place += sum(heights)
        if total is None:
            found += (columns.T @ rows).split(heights)
        else:
            _add_product(total, columns.T, rows)
            found += [None] * len(heights)
    return found


def _runs(weights: Sequence[Tensor], sums: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, list[int]]]:
    """Cuts the weights into as few runs as one product each can serve: (their sum or None, their heights)."""
    first = 0
    while first < len(weights):
        last, total = first + 1, sums[first]
        while last < len(weights) and (total is None) == (sums[last] is None):
            if total is not None:
                whole = neighbours([part for part in sums[first : last + 1] if part is not None])
                if whole is None:
                    break
                total = whole
            last += 1
        yield total, [weight.shape[0] for weight in weights[first:last]]
        first = last


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place."""
    if not total.is_cuda:
        total.add_(a @ b)
    elif total.dtype == a.dtype:
        total.addmm_(a, b)
    else:  # operands in bfloat16, float32 from the first product to the sum
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def neighbours(parts: Sequence[Tensor]) -> Tensor | None:
    """The matrices on top of each other as a view; None where they are not neighbours in memory."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.is_contiguous() and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != end:
            return None
        end += part.numel()
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), (first.shape[1], 1))
