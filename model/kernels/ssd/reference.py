"""Mamba2's state-space duality (SSD) in plain torch: chunks by matrix products, states from chunk to chunk.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 and listing 1. Decays are exponentials of sums
over the steps between two positions, never differences of two long sums: more exact, and what lies in one document
then does not reach another one even by rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.precision import accumulation_dtype


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    chunk_size: int,
    dt_min: float = 0.0,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """h_t = exp(A dt_t) h_{t-1} + dt_t x_t B_t^T;  y_t = h_t C_t + D x_t;  dt = max(softplus(dt + dt_bias), dt_min).

    Args:
        x: (batch, time, heads, headdim), any strides, as are the others.
        dt: (batch, time, heads), before bias and softplus.
        A: (heads,), negative.
        B, C: (batch, time, groups, d_state); head i uses group i * groups // heads.
        D, dt_bias: (heads,).
        chunk_size: does not change the function.
        seq_idx: (batch, time) int32, the document of each position, not falling; states start at zero in each.

    Returns:
        (batch, time, heads, headdim) in x's type; everything inside in float32.
    """
    wide, dtype = accumulation_dtype(x.dtype), x.dtype
    batch, time, heads, headdim = x.shape
    groups = B.shape[2]
    length = min(chunk_size, time)
    padding = -time % length

    def chunks(value: Tensor) -> Tensor:
        """(batch, time, ...) -> (batch, chunk, position, ...), padded with zeros."""
        value = F.pad(value.to(wide), (0, 0) * (value.ndim - 2) + (0, padding))
        return value.unflatten(1, (-1, length))

    dt = F.softplus(dt.to(wide) + dt_bias.to(wide))
    if dt_min > 0.0:
        dt = dt.clamp(min=dt_min)
    x = x.to(wide)
    u = chunks(x * dt[..., None]).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)  # b c g r l p
    step = chunks(dt * A.to(wide)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # b c g r l
    Bc, Cc = (chunks(value).transpose(2, 3) for value in (B, C))  # b c g l n

    decay, decay_in = _decays(step)
    if seq_idx is not None:
        document = F.pad(seq_idx, (0, padding), value=-1).unflatten(1, (-1, length))  # b c l
        same = document[:, :, :, None] == document[:, :, None, :]
        before = F.pad(document[:, :-1, -1:], (0, 0, 1, 0), value=-2)  # the document that the state came from
        decay = decay.masked_fill(~same[:, :, None, None], 0.0)
        decay_in = decay_in.masked_fill((document != before)[:, :, None, None], 0.0)

    scores = (Cc @ Bc.mT)[:, :, :, None] * decay  # b c g r l s
    y = scores @ u
    # What each chunk adds to the state at its end, then the state at each chunk's start.
    added = (u * decay[..., -1, :, None]).mT @ Bc[:, :, :, None]  # b c g r p n
    state, starts = torch.zeros_like(added[:, 0]), []
    for chunk in range(added.shape[1]):
        starts.append(state)
        state = state * decay_in[:, chunk, ..., -1, None, None] + added[:, chunk]
    y = y + (Cc[:, :, :, None] @ torch.stack(starts, 1).mT) * decay_in[..., None]

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, time + padding, heads, headdim)[:, :time]
    return (y + x * D.to(wide)[:, None]).to(dtype)


def _decays(step: Tensor) -> tuple[Tensor, Tensor]:
    """Decay from position s to l (..., l, s), zero above the diagonal, and from the chunk's start to l (..., l)."""
    length = step.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=step.device).tril(-1)
    sums = _running_sums(step[..., :, None].expand(*step.shape, length).masked_fill(~later, 0.0))
    above = torch.ones_like(later).triu(1)
    return sums.masked_fill(above, -torch.inf).exp(), _running_sums(step[..., None])[..., 0].exp()


def _running_sums(x: Tensor) -> Tensor:
    """Over the last dimension but one. On a GPU torch's own do not repeat bit for bit."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return torch.ones(x.shape[-2], x.shape[-2], dtype=x.dtype, device=x.device).tril() @ x
    return x.cumsum(-2)
