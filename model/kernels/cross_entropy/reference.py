"""Cross entropy of logits whose vocabulary is split over tensor-parallel ranks, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.precision import accumulation_dtype


def cross_entropy(logits: Tensor, targets: Tensor, ranks: dist.ProcessGroup | None = None) -> Tensor:
    """-log softmax(logits)[target], the same on all ranks.

    Args:
        logits: (..., vocabulary / ranks), this rank's contiguous part of the vocabulary.
        targets: (...) int64, ids in the whole vocabulary.
        ranks: the process group that holds the vocabulary; None: all of it is here.

    Returns:
        (...) in float32 (float64 for float64 logits). The backward pass expects the same gradient on all ranks.
    """
    return _CrossEntropy.apply(logits, targets, ranks)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ranks: dist.ProcessGroup | None) -> Tensor:
        wide = logits.to(accumulation_dtype(logits.dtype))
        largest = wide.amax(-1, keepdim=True)
        if ranks is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=ranks)
        shifted = wide - largest
        width = logits.shape[-1]
        local = targets - (0 if ranks is None else ranks.rank()) * width
        here = (local >= 0) & (local < width)
        index = local.clamp(0, width - 1)[..., None]
        picked = shifted.gather(-1, index).squeeze(-1).masked_fill(~here, 0.0)
        exponentials = shifted.exp_()
        sums = torch.stack((exponentials.sum(-1), picked))
        if ranks is not None:
            dist.all_reduce(sums, group=ranks)
        ctx.save_for_backward(exponentials, sums[0], index, here)
        ctx.dtype = logits.dtype
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exponentials, total, index, here = ctx.saved_tensors
        out = exponentials * (grad / total)[..., None]
        out.scatter_add_(-1, index, -(grad * here)[..., None])
        return out.to(ctx.dtype), None, None
