"""Mamba1's selective scan with Triton (Gluon) kernels: the public function and its autograd node. The method, its
limits and the kernels are in `triton_scan_kernels.py`."""

import torch
import triton
from triton.experimental.gluon import language as gl

from model.kernels.selective_scan import triton_scan_kernels as kernels

STATES = 16


def _segments(seq_idx):
    """(b, s) document ids -> int32 counts of borders so far: equal only within one run of equal ids."""
    seg = torch.zeros(seq_idx.shape, dtype=torch.int32, device=seq_idx.device)
    torch.cumsum(seq_idx[:, 1:] != seq_idx[:, :-1], 1, dtype=torch.int32, out=seg[:, 1:])
    return seg


def _like(t, like):
    """An empty tensor of t's shape in like's batch/time memory order."""
    if t.shape[0] > 1 and like.stride(0) < like.stride(1):
        return torch.empty((t.shape[1], t.shape[0], *t.shape[2:]), dtype=t.dtype, device=t.device).transpose(0, 1)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


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


class _SelectiveScan(torch.autograd.Function):
    # (T, lanes, warps, channels) of `_layouts`, chosen by measurement on an H200 (benchmarks/kernels.py).
    forward_config = (16, 4, 4, 1)
    backward_config = (16, 4, 4, 1)

    @staticmethod
    def _run_forward(x, dt, z, B, C, A, D, dt_bias, seg, out, config, write_y):
        b, s, channels = x.shape
        heads = B.shape[2]
        T, _, warps, _ = config
        BD, steps, flat, flat_lanes, small = _layouts(*config)[:5]
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
            out,
            out,
            s,
            channels,
            channels // heads,
            triton.cdiv(s, T),
            *x.stride()[:2],
            *dt.stride()[:2],
            *z.stride()[:2],
            *B.stride()[:3],
            *C.stride()[:3],
            *out.stride()[:2],
            WRITE_Y=write_y,
            HAS_SEG=seg is not None,
            T=T,
            BD=BD,
            N=STATES,
            steps=steps,
            flat=flat,
            flat_lanes=flat_lanes,
            small=small,
            lanes=config[1],
            num_warps=warps,
        )

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, seq_idx):
        x, dt, B, C, z = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dt, B, C, z))
        A = A.contiguous()
        seg = None if seq_idx is None else _segments(seq_idx)
        y = _like(x, x)
        _SelectiveScan._run_forward(x, dt, z, B, C, A, D, dt_bias, seg, y, _SelectiveScan.forward_config, True)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, seg)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, dt, A, B, C, D, z, dt_bias, seg = ctx.saved_tensors
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        b, s, channels = x.shape
        heads = B.shape[2]
        config = _SelectiveScan.backward_config
        T, _, warps, _ = config
        n_tiles = triton.cdiv(s, T)
        BD, _, flat, _, small, pairs, turned = _layouts(*config)
        blocks = triton.cdiv(channels // heads, BD)
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
        states, parts = new(b, n_tiles, channels, STATES), new(2, b, heads, blocks, s, STATES)
        _SelectiveScan._run_forward(x, dt, z, B, C, A, D, dt_bias, seg, states, config, False)
        dA, sums = new(b, channels, STATES), new(b, 2, channels)
        dx, ddt, dz = _like(x, x), _like(dt, x), _like(z, x)
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
            *x.stride()[:2],
            *dt.stride()[:2],
            *z.stride()[:2],
            *B.stride()[:3],
            *C.stride()[:3],
            *dy.stride()[:2],
            *dx.stride()[:2],
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
        dD, dbias = sums.sum(0)
        return (
            dx,
            ddt,
            dA.sum(0).to(A.dtype),
            dB.to(B.dtype),
            dC.to(C.dtype),
            dD.to(D.dtype),
            dz,
            dbias.to(dt_bias.dtype),
            None,
        )


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
