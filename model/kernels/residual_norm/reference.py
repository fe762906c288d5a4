"""RMSNorm where the residual stream goes on beside it, in plain torch."""

from __future__ import annotations

from torch import Tensor

from model.kernels.rms_norm.reference import rms_norm


def residual_norm(stream: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RMSNorm(stream + added), and the stream itself.

    Who takes the stream from here has its gradient added to the norm's by the norm's backward pass, not by one of its
    own.

    Args:
        stream, added: (..., width); added None: nothing.
        weight: (width,).

    Returns:
        The normed value and `stream`, neither of which may be written over.
    """
    return rms_norm(stream if added is None else stream + added, weight, eps), stream
