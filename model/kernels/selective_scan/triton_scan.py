"""Mamba1's selective scan with Triton (Gluon) kernels: what launches them, the public function and its autograd node.
The method, its limits and the kernels are in `triton_scan_kernels.py`."""

import torch
import triton
from triton.experimental.gluon import language as gl

from model.kernels.launch import empty_like_layout, segments
from model.kernels.selective_scan import triton_scan_kernels as kernels

STATES = 16
# (T, lanes, warps, channels) of `_layouts`, chosen by measurement on an H200 (benchmarks/kernels.py).
_FORWARD = (16, 4, 4, 1)
_BACKWARD = (8, 4, 2, 1)
_BACKWARD_NARROW = (8, 4, 1, 1)  # below 4096 channels: more programs of one warp


def _layouts(T, lanes, warps, channels):
    """(BD, steps, flat, flat_lanes, small, pairs, turned) for tiles of T steps; `lanes` lanes share a channel's states,
    each thread has `channels` channels."""
    states = STATES // lanes
    BD = 32 // lanes * channels * warps
    steps = gl.BlockedLayout([T, channels, states], [1, 32 // lanes, lanes], [1, warps, 1], [2, 1, 0])
    wide = max(1, min(8, T * BD // (32 * warps), BD))
    across = min(32, BD // wide)
    flat = gl.BlockedLayout([1, wide], [32 // across, across], [warps, 1], [1, 0])
    flat_lanes = gl.BlockedLayout([1, wide, lanes], [32 // across, across, 1], [warps, 1, 1], [2, 1, 0])
    small = gl.BlockedLayout([1, 2], [4, 8], [warps, 1], [1, 0])
    pairs = gl.BlockedLayout([channels, states], [32 // lanes, lanes], [warps, 1], [1, 0])
    turned = gl.BlockedLayout([1, 1, 4], [4, 2, 4], [warps, 1, 1], [2, 1, 0])
    return BD, steps, flat, flat_lanes, small, pairs, turned


def _backward(channels):
    return _BACKWARD if channels >= 4096 else _BACKWARD_NARROW


def forward(x, dt, A, B, C, D, z, dt_bias, seg, keep_states=True):
    """y, and the states before each backward tile or None. Arguments: as of `selective_scan_triton`, with unit stride
    along the last dimension; seg: `segments`."""
    b, s, channels = x.shape
    heads = B.shape[2]
    T, lanes, warps, _ = _FORWARD
    n_tiles = triton.cdiv(s, T)
    BD, steps, flat, flat_lanes, small = _layouts(*_FORWARD)[:5]
    y = empty_like_layout(x)
    save = _backward(channels)[0] if keep_states else 0
    saved = (b, n_tiles * (T // save), channels, STATES) if save else (0,)
    states = torch.empty(saved, dtype=x.dtype, device=x.device) if save else None
    kernels._scan_forward[(heads * triton.cdiv(channels // heads, BD), b)](
        x,
        dt,
        z,
        B,
        C,
        A,
        D,
        dt_bias,
        D if seg is None else seg,
        y,
        y if states is None else states,
        s,
        channels,
        channels // heads,
        n_tiles,
        *x.stride()[:2],
        *dt.stride()[:2],
        *z.stride()[:2],
        *B.stride()[:3],
        *C.stride()[:3],
        *y.stride()[:2],
        SAVE=save,
        HAS_SEG=seg is not None,
        T=T,
        BD=BD,
        N=STATES,
        steps=steps,
        flat=flat,
        flat_lanes=flat_lanes,
        small=small,
        lanes=lanes,
        num_warps=warps,
    )
    return y, states


def backward(dy, x, dt, A, B, C, D, z, dt_bias, seg, states, dx, ddt, dz):
    """Writes dx, ddt (the same strides) and dz; returns dA, dB, dC, dD, ddt_bias in fp32."""
    b, s, channels = x.shape
    heads = B.shape[2]
    T, _, warps, _ = _backward(channels)
    n_tiles = triton.cdiv(s, T)
    BD, _, flat, _, small, pairs, turned = _layouts(*_backward(channels))
    blocks = triton.cdiv(channels // heads, BD)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    parts, dA, sums = new(2, b, heads, blocks, s, STATES), new(b, channels, STATES), new(b, 2, channels)
    assert dx.stride() == ddt.stride()
    kernels._scan_backward[(heads * blocks, b)](
        x,
        dt,
        z,
        B,
        C,
        A,
        D,
        dt_bias,
        D if seg is None else seg,
        dy,
        states,
        dx,
        ddt,
        dz,
        parts[0],
        parts[1],
        dA,
        sums,
        s,
        channels,
        channels // heads,
        n_tiles,
        states.shape[1],
        *x.stride()[:2],
        *dt.stride()[:2],
        *z.stride()[:2],
        *B.stride()[:3],
        *C.stride()[:3],
        *dy.stride()[:2],
        *dx.stride()[:2],
        *dz.stride()[:2],
        HAS_SEG=seg is not None,
        T=T,
        BD=BD,
        N=STATES,
        pairs=pairs,
        flat=flat,
        small=small,
        turned=turned,
        num_warps=warps,
    )
    dB, dC = parts.sum(3).transpose(2, 3)
    dD, d_bias = sums.sum(0)
    return dA.sum(0), dB, dC, dD, d_bias


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, seq_idx):
        x, dt, B, C, z = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dt, B, C, z))
        A, seg = A.contiguous(), segments(seq_idx)
        y, states = forward(x, dt, A, B, C, D, z, dt_bias, seg)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, seg, states)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, dt, A, B, C, D, z, dt_bias, seg, states = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        dx, ddt, dz = (empty_like_layout(t) for t in (x, x, z))
        saved = x, dt, A, B, C, D, z, dt_bias, seg, states
        dA, dB, dC, dD, d_bias = backward(dy, *saved, dx, ddt, dz)
        small = (d.to(t.dtype) for d, t in ((dA, A), (dB, B), (dC, C), (dD, D), (d_bias, dt_bias)))
        dA, dB, dC, dD, d_bias = small
        return dx, ddt, dA, dB, dC, dD, dz, d_bias, None


def selective_scan_triton(x, dt, A, B, C, D, z, dt_bias, seq_idx=None):
    """(b, s, channels) in x's type and batch/time memory order.

    x, dt (raw), z: (b, s, channels); A: (channels, 16), negative, fp32; B, C: (b, s, heads, 16), each head has
    channels / heads neighbouring channels; D, dt_bias: (channels,); seq_idx: (b, s) integers, the state restarts
    wherever a value differs from the one before it. Leading strides are free. Everything inside is fp32; no atomics:
    the result and every gradient repeat bit for bit. Raises ValueError for shapes the kernels do not know.
    """
    if A.shape[1] != STATES or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"selective scan: A {tuple(A.shape)}, B {tuple(B.shape)}, {x.shape[2]} channels: needs 16 "
            "states and channels divisible by heads; use the reference path"
        )
    return _SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, seq_idx)
