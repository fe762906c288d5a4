"""SSD (Mamba2's scan) with Triton kernels: what launches them, the public function and its autograd node. The kernels,
their limits and their source are in `triton_ssd_kernels.py`."""

import torch
import triton

from model.kernels.launch import empty_like_layout, segments
from model.kernels.ssd import triton_ssd_kernels as kernels

CHUNK = 64
STATES = (16, 32, 64, 128)

# Launch settings, chosen by measurement on an H100 at the released models' shapes; wide: a state of 128.
_STATES = {"BP": 64, "STAGES": 4, "num_warps": 4}
_OUT = {"STAGES": 3, "num_warps": 4}
_GRADS = {"TOKEN_STAGES": 3, "STATE_STAGES": 3, "num_warps": 4}
_GRADS_WIDE = {"TOKEN_STAGES": 2, "STATE_STAGES": 2, "num_warps": 4}
# Columns of the states that a program of `grads` has.
_COLUMNS = 64
# Heads of a program, at most, and programs to aim at, of `out` and of each kind in `grads`.
_HEADS, _PROGRAMS = 32, 256


def _unit(t):
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _heads_per_block(b, n_chunks, heads, groups):
    """Largest even split of a group's heads that still gives about _PROGRAMS programs."""
    per_group = heads // groups
    blocks = min(per_group, max(triton.cdiv(per_group, _HEADS), _PROGRAMS // max(1, b * n_chunks * groups)))
    return triton.cdiv(per_group, blocks)


def _prepare(dt, A, dt_bias, seg, dt_min):
    b, s, heads = dt.shape
    n_chunks = triton.cdiv(s, CHUNK)
    sums = torch.empty((2, b, heads, n_chunks * CHUNK), dtype=torch.float32, device=dt.device)
    kernels.ssd_prep[(n_chunks, triton.cdiv(heads, 32), b)](
        dt,
        dt_bias,
        A,
        sums if seg is None else seg,
        sums[0],
        sums[1],
        s,
        heads,
        n_chunks * CHUNK,
        *dt.stride(),
        dt_min,
        HAS_BIAS=dt_bias is not None,
        HAS_SEG=seg is not None,
        L=CHUNK,
        HB=32,
        num_warps=4,
    )
    return sums[0], sums[1]


def _states(x, B, dy, C, cum, cdt, seg, both):
    b, s, heads, P = x.shape
    groups, N = B.shape[2:]
    n_chunks = triton.cdiv(s, CHUNK)
    states = torch.empty((2 if both else 1, b, heads, n_chunks, N, P), dtype=x.dtype, device=x.device)
    config = dict(_STATES)
    bp = min(config.pop("BP"), P)
    kernels.ssd_states[(heads * (P // bp), b, states.shape[0])](
        x,
        B,
        states[0],
        dy,
        C,
        states[-1],
        cum,
        cdt,
        cum if seg is None else seg,
        s,
        cum.shape[-1],
        n_chunks,
        *x.stride()[:3],
        *B.stride()[:3],
        *dy.stride()[:3],
        *C.stride()[:3],
        heads,
        heads // groups,
        HAS_SEG=seg is not None,
        L=CHUNK,
        N=N,
        P=P,
        BP=bp,
        **config,
    )
    return states


def forward(x, dt, A, B, C, D, dt_bias, seg, dt_min):
    """y, for arguments as those of `ssd_triton`; x, B, C with unit stride along the last dimension; seg: `segments`."""
    b, s, heads, P = x.shape
    groups, N = B.shape[2:]
    n_chunks = triton.cdiv(s, CHUNK)
    cum, cdt = _prepare(dt, A, dt_bias, seg, dt_min)
    states = _states(x, B, x, C, cum, cdt, seg, both=False)
    y = empty_like_layout(x)
    hpb = _heads_per_block(b, n_chunks, heads, groups)
    kernels.ssd_out[(n_chunks, groups * triton.cdiv(heads // groups, hpb), b)](
        x,
        B,
        C,
        states,
        D,
        y,
        cum,
        cdt,
        seg,
        s,
        cum.shape[-1],
        n_chunks,
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *y.stride()[:3],
        heads,
        heads // groups,
        hpb,
        HAS_D=D is not None,
        HAS_SEG=seg is not None,
        L=CHUNK,
        N=N,
        P=P,
        **_OUT,
    )
    return y


def backward(dy, x, dt, A, B, C, D, dt_bias, seg, dt_min, dx, ddt, dB, dC):
    """Writes the gradients dx, ddt, dB, dC (any leading strides, B and C the same); returns dA, dD, ddt_bias, fp32."""
    b, s, heads, P = x.shape
    groups, N = B.shape[2:]
    n_chunks = triton.cdiv(s, CHUNK)
    cum, cdt = _prepare(dt, A, dt_bias, seg, dt_min)
    s_pad = cum.shape[-1]
    states = _states(x, B, dy, C, cum, cdt, seg, both=True)
    hpb = _heads_per_block(b, n_chunks, heads, groups)
    blocks, bn = triton.cdiv(heads // groups, hpb), min(N, _COLUMNS)
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    partial, pairs = new(2, b, groups, blocks, s, N), new(b, groups, blocks, n_chunks, CHUNK, CHUNK)
    vec, sds = new(3 + 2 * N // bn, b, heads, s_pad), new(b, heads, n_chunks, N)
    kernels.ssd_grads[(n_chunks * (1 + N // bn), groups * blocks, b)](
        x,
        B,
        C,
        states[0],
        states[1],
        D,
        dy,
        dx,
        pairs,
        partial[0],
        partial[1],
        vec,
        sds,
        cum,
        cdt,
        seg,
        s,
        s_pad,
        n_chunks,
        *x.stride()[:3],
        *B.stride()[:3],
        *C.stride()[:3],
        *dy.stride()[:3],
        *dx.stride()[:3],
        heads,
        heads // groups,
        hpb,
        b * heads * s_pad,
        HAS_D=D is not None,
        HAS_SEG=seg is not None,
        L=CHUNK,
        N=N,
        P=P,
        BN=bn,
        **(_GRADS_WIDE if N == 128 else _GRADS),
    )
    sums = new(3, b * n_chunks, heads)
    kernels.ssd_finish[(n_chunks, triton.cdiv(heads, 16), b)](
        dt,
        dt_bias,
        A,
        sums if seg is None else seg,
        vec,
        sds,
        ddt,
        sums,
        s,
        heads,
        s_pad,
        n_chunks,
        b * heads * s_pad,
        *dt.stride(),
        *ddt.stride(),
        dt_min,
        HAS_BIAS=dt_bias is not None,
        HAS_D=D is not None,
        HAS_SEG=seg is not None,
        L=CHUNK,
        N=N,
        BN=bn,
        HB=16,
        num_warps=4,
    )
    columns = min(N, 64)
    kernels.ssd_reduce[(n_chunks, N // columns, b * groups)](
        partial[0],
        partial[1],
        pairs,
        B,
        C,
        dB,
        dC,
        s,
        blocks,
        groups,
        n_chunks,
        *B.stride()[:3],
        *C.stride()[:3],
        *dB.stride()[:3],
        L=CHUNK,
        N=N,
        BN=columns,
        num_warps=4,
    )
    dA, dbias, dD = sums.sum(1)
    return dA, dD, dbias


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, dt_bias, seq_idx, dt_min):
        x, B, C = _unit(x), _unit(B), _unit(C)
        seg = segments(seq_idx)
        ctx.save_for_backward(x, dt, A, B, C, D, dt_bias, seg)
        ctx.dt_min = dt_min
        return forward(x, dt, A, B, C, D, dt_bias, seg, dt_min)

    @staticmethod
    def backward(ctx, dy):
        x, dt, A, B, C, D, dt_bias, seg = ctx.saved_tensors
        dx, ddt, dB, dC = (empty_like_layout(t) for t in (x, dt, B, B))
        dA, dD, dbias = backward(_unit(dy), x, dt, A, B, C, D, dt_bias, seg, ctx.dt_min, dx, ddt, dB, dC)
        dD = None if D is None else dD.to(D.dtype)
        dbias = None if dt_bias is None else dbias.to(dt_bias.dtype)
        return dx, ddt, dA.to(A.dtype), dB, dC, dD, dbias, None, None


def ssd_triton(x, dt, A, B, C, D=None, dt_bias=None, seq_idx=None, dt_min=0.0):
    """y (b, s, heads, P), in x's dtype and batch/time memory order.

    x: (b, s, heads, P), P a power of two from 16; dt: (b, s, heads), raw; A: (heads,), negative, fp32;
    B, C: (b, s, groups, N), N 16, 32, 64 or 128, heads in order of groups; D, dt_bias: (heads,) or None;
    seq_idx: (b, s) integers, the state restarts wherever a value differs from the one before it; dt_min: lower limit
    of softplus(dt + dt_bias). Leading strides are free. State and sums are fp32, matmul operands bf16; no atomics:
    the result and every gradient repeat bit for bit.
    Raises ValueError for shapes the kernels do not know.
    """
    if B.shape != C.shape or x.shape[2] % B.shape[2] or B.shape[3] not in STATES:
        raise ValueError(
            f"ssd: B {tuple(B.shape)}, C {tuple(C.shape)} with {x.shape[2]} heads: needs equal shapes, "
            "heads divisible by groups, state size 16, 32, 64 or 128; use the reference path"
        )
    return _SSD.apply(x, dt, A, B, C, D, dt_bias, seq_idx, dt_min)
