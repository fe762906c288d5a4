"""Vocabulary-parallel cross entropy with Triton, without float32 logits in memory.

Limit: bytes. Forward reads the logits once, backward reads them again and writes their gradient over them: 262 and
524 MB for 4096 x 32000 in bfloat16, 61 and 122 us at 4.3 TB/s.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.distributed import ProcessGroup

_BLOCK = 4096


# fmt: off
@triton.jit
def cross_entropy_forward(logits_ptr, targets_ptr, out_ptr, rows, width, start, stride, BLOCK: tl.constexpr):
    """out: (3, rows): the largest logit, the sum of exponentials above it, the target's logit if it is here."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    largest, total = float("-inf"), 0.0
    for c0 in range(0, width, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + c, mask=c < width, other=float("-inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(x - above), 0)
        largest = above
    at = tl.load(targets_ptr + row) - start
    picked = tl.load(logits_ptr + at, mask=(at >= 0) & (at < width), other=0.0).to(tl.float32)
    tl.store(out_ptr + row, largest)
    tl.store(out_ptr + rows + row, total)
    tl.store(out_ptr + 2 * rows + row, picked)


@triton.jit
def cross_entropy_backward(logits_ptr, targets_ptr, log_sum_ptr, grad_ptr, width, start, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    grad = tl.load(grad_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    at = tl.load(targets_ptr + row) - start
    for c0 in range(0, width, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + c, mask=c < width, other=0.0).to(tl.float32)
        x = (tl.exp(x - log_sum) - tl.where(c == at, 1.0, 0.0)) * grad
        tl.store(logits_ptr + c, x.to(logits_ptr.dtype.element_ty), mask=c < width)
# fmt: on


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ranks: ProcessGroup | None) -> Tensor:
        width = logits.shape[-1]
        rows, ids = logits.detach().reshape(-1, width), targets.reshape(-1)
        start = 0 if ranks is None else ranks.rank() * width
        parts = torch.empty((3, rows.shape[0]), dtype=torch.float32, device=logits.device)
        cross_entropy_forward[(rows.shape[0],)](
            rows, ids, parts, rows.shape[0], width, start, rows.stride(0), BLOCK=_BLOCK
        )
        largest, sums = parts[0], parts[1:]
        if ranks is not None:
            largest = largest.clone()
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks)
            sums[0] *= (parts[0] - largest).exp()
            dist.all_reduce(sums, group=ranks)
        log_sum = sums[0].log() + largest
        # Not through save_for_backward, which would refuse what is written over.
        ctx.rows, ctx.ids, ctx.log_sum, ctx.start, ctx.shape = rows, ids, log_sum, start, logits.shape
        return (log_sum - sums[1]).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, ctx.rows = ctx.rows, None
        if rows is None:
            raise RuntimeError("cross entropy: a second backward pass; the first one has written over the logits")
        grad = grad.reshape(-1).float().contiguous()  # that of a sum is one number, expanded
        cross_entropy_backward[(rows.shape[0],)](
            rows, ctx.ids, ctx.log_sum, grad, rows.shape[1], ctx.start, rows.stride(0), BLOCK=_BLOCK
        )
        return rows.view(ctx.shape), None, None


def cross_entropy(logits: Tensor, targets: Tensor, ranks: ProcessGroup | None = None) -> Tensor:
    """As reference.cross_entropy. The backward pass writes the gradient over the logits, and works once."""
    return _CrossEntropy.apply(logits, targets, ranks)
