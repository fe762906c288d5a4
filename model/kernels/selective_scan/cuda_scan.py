"""Mamba1's selective scan, forward and backward, in CUDA C++ without atomics (forward.cu, backward.cu).

    dt_t = softplus(dt_raw_t + bias)     h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t     y_t = (C_t h_t + D x_t) silu(z_t)

for each channel, 16 states; the state is zero at the start and at every document border. A block has 32 channels and
walks the sequence; common.cuh says which thread has what.

    forward    tiles of 32 steps. A state stays in a register, y's sum over the states meets in shared memory. For the
               backward pass the states before every 8 steps are written too, in bfloat16
    backward   one walk from the last tile of 8 steps to the first: back through its steps with the gradient of the
               state, and beside it the states of the next tile again, from those kept. Sums over channels (dB, dC) meet
               in shared memory, those over states (the gradients of dt x and dt) are products of the tensor cores,
               their operands cut to TF32. The gradient of z comes of the result, which the projection after the scan
               keeps too. Blocks write their shares of dB and dC, torch.sum adds them

Limits for 7424 channels, 16 states, s 4096 (486 M state updates; a channel tensor is 60.8 MB, the states kept two):
    special functions   one exp2 each: 0.13 ms a pass at 16 a clock and multiprocessor (132, 1.75 GHz), two passes
    fp32                4 a step forward, 12 backward: 0.07 and 0.20 ms at 128 a clock
    bytes               forward 6 x 61 MB: 0.12 ms; backward 10 x 61 MB and 122 MB of shares twice: 0.28 ms at 3.0 TB/s
What holds it is latency: the channels give each scheduler two warps, which issue in 60 % of the cycles
(docs/performance.md has what was tried). Four times fewer channels (tensor-parallel ranks) take two thirds of the time.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.kernels.launch import empty_like_layout, segments
from model.kernels.nvrtc import Kernel

STATES = 16
WARPS = 4
CHANNELS = 8 * WARPS
"""Of a block."""
FORWARD_TILE = 32
KEPT_EVERY = 8
"""Steps between the states kept for the backward pass, whose tile this is."""
_SHARED = {
    "forward": FORWARD_TILE * (CHANNELS // 16 * 36 + 2 * STATES + 8 * (CHANNELS + 8) + 1)
    + (FORWARD_TILE // 2 + 2) * 32 * WARPS,
    "backward": 2 * KEPT_EVERY * (CHANNELS // 16 * (36 + 18) + 2 * STATES + 1)
    + KEPT_EVERY * (WARPS * 144 + 2 * 84)
    + 2 * (8 + 2) * 32 * WARPS,
}
"""Floats of shared memory of a block: the kernels, which name the parts, do not compile with less or more."""


class Rows(ctypes.Structure):
    """A (batch, time, ...) tensor of the kernels: address, strides of batch and time in bytes."""

    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_longlong), ("row", ctypes.c_int)]


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class Forward(ctypes.Structure):
    """The struct of this name in forward.cu."""

    _fields_ = [
        *_fields(Rows, "x", "dt", "z", "B", "C"),
        *_fields(ctypes.c_longlong, "B_head", "C_head"),
        *_fields(ctypes.c_void_p, "A", "D", "bias", "document"),
        *_fields(Rows, "y"),
        *_fields(ctypes.c_void_p, "kept"),
        *_fields(ctypes.c_int, "time", "heads", "head_channels", "blocks"),
    ]


class Backward(ctypes.Structure):
    """The struct of this name in backward.cu."""

    _fields_ = [
        *_fields(Rows, "x", "dt", "z", "B", "C", "y", "dy"),
        *_fields(ctypes.c_longlong, "B_head", "C_head"),
        *_fields(ctypes.c_void_p, "A", "D", "bias", "document", "kept"),
        *_fields(Rows, "dx", "ddt", "dz"),
        *_fields(ctypes.c_void_p, "shares", "dA", "dD", "dbias"),
        *_fields(ctypes.c_int, "time", "heads", "head_channels", "blocks"),
    ]


@functools.cache
def kernel(name: str, documents: bool) -> Kernel:
    """`forward` or `backward`."""
    sizes = {"WARPS": WARPS, "FORWARD_TILE": FORWARD_TILE, "KEPT_EVERY": KEPT_EVERY, "SHARED_FLOATS": _SHARED[name]}
    return Kernel(Path(__file__).parent / f"{name}.cu", f"scan_{name}", {**sizes, "DOCUMENTS": int(documents)})


def _rows(x: Tensor) -> Rows:
    """Raises ValueError where neighbouring channels are no word of 4 bytes."""
    batch, row, *heads = (x.element_size() * stride for stride in x.stride()[:-1])
    if x.stride(-1) != 1 or any(place % 4 for place in (x.data_ptr(), batch, row, *heads)):
        raise ValueError(f"selective scan: strides {x.stride()}, offset {x.storage_offset()}: rows of whole words only")
    return Rows(x.data_ptr(), batch, row)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, seg: Tensor | None
) -> dict[str, Any]:
    """The fields that both structures have; A, D and dt_bias: float32, contiguous."""
    heads, own = B.shape[2], x.shape[2] // B.shape[2]
    fields: dict[str, Any] = {name: _rows(t) for name, t in (("x", x), ("dt", dt), ("z", z))}
    fields |= {name: _rows(t) for name, t in (("B", B), ("C", C))}
    fields |= {"B_head": B.element_size() * B.stride(2), "C_head": C.element_size() * C.stride(2)}
    fields |= {name: _address(t) for name, t in (("A", A), ("D", D), ("bias", dt_bias), ("document", seg))}
    return fields | {"time": x.shape[1], "heads": heads, "head_channels": own, "blocks": -(-own // CHANNELS)}


def _launch(name: str, arguments: Any, batch: int, documents: bool, device: torch.device) -> None:
    grid = (arguments.heads * arguments.blocks, batch)
    kernel(name, documents)(grid, 32 * WARPS, 4 * _SHARED[name], arguments, device)


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    seg: Tensor | None,
    keep_states: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y, and the states before each backward tile or None.

    Arguments: as of `selective_scan_cuda`, with unit stride along the last dimension; A: float32, contiguous; seg:
    `segments`. Raises ValueError where a row does not begin at a multiple of 4 bytes.
    """
    b, s, _ = x.shape
    y = empty_like_layout(x)
    D, dt_bias = D.float(), dt_bias.float()
    fields = _inputs(x, dt, A, B, C, D, z, dt_bias, seg)
    groups = fields["heads"] * -(-fields["head_channels"] // 16)
    shape = (b, -(-s // KEPT_EVERY), groups, 2, 32, 4)  # as kept_at in common.cuh
    kept = torch.empty(shape, dtype=x.dtype, device=x.device) if keep_states else None
    _launch("forward", Forward(y=_rows(y), kept=_address(kept), **fields), b, seg is not None, x.device)
    return y, kept


def backward(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    seg: Tensor | None,
    kept: Tensor,
    dx: Tensor,
    ddt: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Writes dx, ddt and dz; returns dA, dB, dC, dD, ddt_bias in fp32. y, kept: what `forward` gave, unchanged."""
    b, s, channels = x.shape
    D, dt_bias = D.float(), dt_bias.float()
    fields = _inputs(x, dt, A, B, C, D, z, dt_bias, seg)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    whole = -(-s // KEPT_EVERY) * KEPT_EVERY
    shares, dA = new(2, b, fields["heads"], fields["blocks"], whole, STATES), new(b, channels, STATES)
    dD, d_bias = new(2, b, channels)
    fields |= {name: _rows(t) for name, t in (("y", y), ("dy", dy), ("dx", dx), ("ddt", ddt), ("dz", dz))}
    written = (("kept", kept), ("shares", shares), ("dA", dA), ("dD", dD), ("dbias", d_bias))
    fields |= {name: _address(t) for name, t in written}
    _launch("backward", Backward(**fields), b, seg is not None, x.device)
    dB, dC = shares.sum(3)[:, :, :, :s].transpose(2, 3)
    dA, dD, d_bias = (each[0] if b == 1 else each.sum(0) for each in (dA, dD, d_bias))
    return dA, dB, dC, dD, d_bias


def words(x: Tensor) -> Tensor:
    """x, or a copy whose rows begin at multiples of 4 bytes."""
    try:
        _rows(x)
    except ValueError:
        return x.clone(memory_format=torch.contiguous_format)
    return x


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        seq_idx: Tensor | None,
    ) -> Tensor:
        x, dt, B, C, z = (words(t) for t in (x, dt, B, C, z))
        A, seg = A.contiguous(), segments(seq_idx)
        y, kept = forward(x, dt, A, B, C, D, z, dt_bias, seg)
        ctx.save_for_backward(y, x, dt, A, B, C, D, z, dt_bias, seg, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        y, x, dt, A, B, C, D, z, dt_bias, seg, kept = ctx.saved_tensors
        dx, ddt, dz = (empty_like_layout(t) for t in (x, x, z))
        found = backward(words(dy), y, x, dt, A, B, C, D, z, dt_bias, seg, kept, dx, ddt, dz)
        dA, dB, dC, dD, d_bias = (d.to(t.dtype) for d, t in zip(found, (A, B, C, D, dt_bias), strict=True))
        return dx, ddt, dA, dB, dC, dD, dz, d_bias, None


def selective_scan_cuda(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """(b, s, channels) in x's type, bfloat16, and batch/time memory order.

    x, dt (raw), z: (b, s, channels); A: (channels, 16), negative, fp32; B, C: (b, s, heads, 16), each head has
    channels / heads neighbouring channels, an even number; D, dt_bias: (channels,); seq_idx: (b, s) integers, the state
    restarts wherever a value differs from the one before it. Leading strides are free. Everything inside is fp32, but
    for the operands of the backward pass's products and for y, which the gradient of z takes from the bfloat16 result.
    No atomics: the result and every gradient repeat bit for bit.
    Raises ValueError for shapes the kernels do not know.
    """
    if A.shape[1] != STATES or x.shape[2] % (2 * B.shape[2]):
        raise ValueError(
            f"selective scan: A {tuple(A.shape)}, B {tuple(B.shape)}, {x.shape[2]} channels: needs 16 "
            "states and an even number of channels a head; use the reference path"
        )
    return _SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, seq_idx)
