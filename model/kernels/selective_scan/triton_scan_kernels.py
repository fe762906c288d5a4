"""Mamba1's selective scan, forward and backward, without atomics (Gluon, the layer of Triton with explicit layouts).

    dt_t = softplus(dt_raw_t + bias)     h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t     y_t = (C_t h_t + D x_t) silu(z_t)

for each channel, 16 states; the state is zero at the start and at every document border. The recurrence of a state is a
chain in time, so a thread keeps T steps of a few states of one channel in registers and steps through them (lanes:
states x channels; warps: channels). Forward, a tile is one (T, BD, N) tensor whose layout `steps` has the time axis
inside the thread: `associative_scan` is then a plain loop in order, and its combine function needs no product of
decays. Backward, the steps are unrolled over (BD, N) tensors. Programs own BD channels and walk the sequence; loads of
the next tile are in flight during a tile. softplus, silu and products per channel are done once per element, in the
layout `flat`, and spread over the threads through shared memory.

    forward    states at the tile borders stay in registers; for the backward pass those on entry of each tile are
               written too, in x's type
    backward   one pass from the last tile to the first, which recomputes the states of a tile from the one on its
               entry and carries the gradient of the state; dB, dC: sums over the channels of a program, then over
               programs (torch.sum)

Limits for 7424 channels, 16 states, s 4096, b 1 (486 M state updates; a channel tensor is 60.8 MB, as are the states):
    special functions   one exp2 each: 0.13 ms a pass at 16 a clock and multiprocessor (132, 1.75 GHz), two passes
    fp32                4 a step forward, 13 backward: 0.07 and 0.21 ms at 128 a clock
    bytes               forward 5 x 61 MB: 0.07 ms; backward 9 x 61 MB: 0.13 ms at 4.3 TB/s
The channels give each scheduler two warps, which issue in under half of the cycles: waits for shared memory, not
arithmetic, are what is left (docs/performance.md has the measurements). Fewer channels (tensor-parallel ranks) take
almost as long. More warps need the sequence cut and one more pass.
"""

# fmt: off
# ruff: noqa: RUF005 (tuples grow by concatenation: what compiles these functions has no unpacking)
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _forward_step(decay_before, h, decay, b):
    """In-order step: only right where the scan's whole axis lies in one thread."""
    return decay, b + decay * h


@gluon.jit
def _last(a, b):
    return b


@gluon.jit
def _halve(rows, half: gl.constexpr):
    pairs = ()
    for t in gl.static_range(half):
        pairs = pairs + (gl.join(rows[t], rows[t + half]),)
    return pairs


@gluon.jit
def _stack(rows, group: gl.constexpr):
    """group (4 or 8) equal tensors -> one with a new first dimension of that size; no data moves."""
    shape: gl.constexpr = rows[0].shape
    if group == 8:
        rows = _halve(rows, 4)
    x = _halve(_halve(rows, 2), 1)[0]
    if len(shape) == 1:
        return gl.permute(gl.reshape(x, [shape[0], group]), [1, 0])
    else:
        return gl.permute(gl.reshape(x, [shape[0], shape[1], group]), [2, 0, 1])


@gluon.jit
def _by_lane(x, lanes: gl.constexpr):
    """(T, BD, N) -> (T, BD, lanes): sums over the states that a thread holds; the lanes' sums meet in `flat_lanes`."""
    return gl.sum(gl.reshape(x, [x.shape[0], x.shape[1], lanes, x.shape[2] // lanes]), 3)


@gluon.jit
def _softplus(v):
    u = gl.exp2(gl.minimum(v, 20.0) * LOG2E)
    series = u * (1.0 - u * (0.5 - u * (0.33333334 - u * 0.25)))
    return gl.where(v > 20.0, v, gl.where(u < 0.03, series, gl.log2(1.0 + u) * 0.6931471805599453))


@gluon.jit
def _tile(ptr, stride_s, t0, s, T: gl.constexpr, BD: gl.constexpr, channels, flat: gl.constexpr):
    """(T, BD) of a (time, channel) tensor, zero from s on; ptr is at the program's first channel."""
    t = t0 + gl.arange(0, T, layout=gl.SliceLayout(1, flat))
    d = gl.arange(0, BD, layout=gl.SliceLayout(0, flat))
    return gl.load(ptr + t0.to(gl.int64) * stride_s + ((t - t0)[:, None] * stride_s + d[None, :]),
                   mask=((t >= 0) & (t < s))[:, None] & (d < channels)[None, :], other=0.0)


@gluon.jit
def _reset(seg_ptr, t0, s, T: gl.constexpr, layout: gl.constexpr):
    """(T,) 0, or -inf-like where a document begins: added to the exponent of the decay."""
    t = t0 + gl.arange(0, T, layout=layout)
    here = gl.load(seg_ptr + t, mask=(t >= 0) & (t < s), other=0)
    before = gl.load(seg_ptr + t - 1, mask=(t >= 1) & (t < s), other=0)
    return gl.where(here == before, 0.0, -1.0e30)


@gluon.jit(do_not_specialize=["s", "n_tiles"])
def _scan_forward(x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, A_ptr, D_ptr, bias_ptr, seg_ptr, y_ptr, state_ptr,
                  s, channels, head_channels, n_tiles,
                  stride_xb, stride_xs, stride_tb, stride_ts, stride_zb, stride_zs, stride_Bb, stride_Bs, stride_Bg,
                  stride_Cb, stride_Cs, stride_Cg, stride_yb, stride_ys,
                  SAVE: gl.constexpr, HAS_SEG: gl.constexpr, T: gl.constexpr, BD: gl.constexpr, N: gl.constexpr,
                  steps: gl.constexpr, flat: gl.constexpr, flat_lanes: gl.constexpr, small: gl.constexpr,
                  lanes: gl.constexpr):
    """y, and (SAVE > 0) the state before every SAVE steps: (b, n_tiles * T / SAVE, channels, N); SAVE divides T."""
    per_channel: gl.constexpr = gl.SliceLayout(2, steps)
    per_state: gl.constexpr = gl.SliceLayout(1, steps)
    blocks = (head_channels + BD - 1) // BD
    g, b = gl.program_id(0) // blocks, gl.program_id(1).to(gl.int64)
    d0 = g * head_channels + (gl.program_id(0) % blocks) * BD
    own = (g + 1) * head_channels - d0
    d = gl.arange(0, BD, layout=gl.SliceLayout(0, flat))
    ds = gl.arange(0, BD, layout=gl.SliceLayout(1, gl.SliceLayout(0, steps)))
    n = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(0, steps)))
    A = gl.load(A_ptr + (d0 + ds)[:, None] * N + n[None, :], mask=(ds < own)[:, None], other=0.0) * LOG2E
    bias = gl.load(bias_ptr + d0 + d, mask=d < own, other=0.0).to(gl.float32)
    D = gl.load(D_ptr + d0 + d, mask=d < own, other=0.0).to(gl.float32)
    x_ptr += b * stride_xb + d0
    dt_ptr += b * stride_tb + d0
    z_ptr += b * stride_zb + d0
    B_ptr += b * stride_Bb + g * stride_Bg
    C_ptr += b * stride_Cb + g * stride_Cg
    y_ptr += b * stride_yb + d0
    seg_ptr += b * s
    if SAVE > 0:
        state_ptr += (b * n_tiles * (T // SAVE) * channels + d0) * N + ds[:, None] * N + n[None, :]
    time = gl.arange(0, T, layout=gl.SliceLayout(1, per_channel))[:, None, None]
    tf = gl.arange(0, T, layout=gl.SliceLayout(1, flat))
    h = gl.full((BD, N), 0.0, gl.float32, layout=gl.SliceLayout(0, steps))
    zero = n_tiles * 0
    x = _tile(x_ptr, stride_xs, zero, s, T, BD, own, flat)
    v = _tile(dt_ptr, stride_ts, zero, s, T, BD, own, flat)
    B = _tile(B_ptr, stride_Bs, zero, s, T, N, N, small)
    z = _tile(z_ptr, stride_zs, zero, s, T, BD, own, flat)
    C = _tile(C_ptr, stride_Cs, zero, s, T, N, N, small)
    for i in range(n_tiles):
        t0 = i * T
        dt = gl.where((t0 + tf < s)[:, None], _softplus(v.to(gl.float32) + bias[None, :]), 0.0)
        xf = x.to(gl.float32)
        dts = gl.convert_layout(dt, per_channel)
        dtx = gl.convert_layout(dt * xf, per_channel)
        Bs = gl.convert_layout(B.to(gl.float32), per_state)
        gate = z.to(gl.float32)
        Cs = gl.convert_layout(C.to(gl.float32), per_state)
        z = _tile(z_ptr, stride_zs, t0 + T, s, T, BD, own, flat)
        C = _tile(C_ptr, stride_Cs, t0 + T, s, T, N, N, small)
        entry = h  # on entry of the tile
        x = _tile(x_ptr, stride_xs, t0 + T, s, T, BD, own, flat)
        v = _tile(dt_ptr, stride_ts, t0 + T, s, T, BD, own, flat)
        B = _tile(B_ptr, stride_Bs, t0 + T, s, T, N, N, small)
        power = dts[:, :, None] * A[None, :, :]
        if HAS_SEG:
            power += _reset(seg_ptr, t0, s, T, gl.SliceLayout(1, per_channel))[:, None, None]
        a = gl.exp2(power)
        u = dtx[:, :, None] * Bs[:, None, :]
        u = gl.where(time == 0, u + a * h[None, :, :], u)
        _, states = gl.associative_scan((a, u), 0, _forward_step)
        h = gl.reduce(states, 0, _last)
        if SAVE > 0:
            for k in gl.static_range(T // SAVE):
                if k > 0:  # the time axis lies in one thread, so this only names a register
                    entry = gl.sum(gl.where(time == k * SAVE - 1, states, 0.0), 0)
                to = state_ptr + (i * (T // SAVE) + k).to(gl.int64) * channels * N
                gl.store(to, entry.to(y_ptr.dtype.element_ty), mask=(ds < own)[:, None])
        y = gl.convert_layout(_by_lane(states * Cs[:, None, :], lanes), flat_lanes)
        y = gl.convert_layout(gl.sum(y, 2), flat) + D[None, :] * xf
        y = y * gate / (1.0 + gl.exp2(-LOG2E * gate))
        gl.store(y_ptr + t0.to(gl.int64) * stride_ys + (tf[:, None] * stride_ys + d[None, :]),
                 y.to(y_ptr.dtype.element_ty), mask=(t0 + tf < s)[:, None] & (d < own)[None, :])


@gluon.jit(do_not_specialize=["s", "n_tiles", "stored"])
def _scan_backward(x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, A_ptr, D_ptr, bias_ptr, seg_ptr, dy_ptr, state_ptr,
                   dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr, dA_ptr, sums_ptr, s, channels, head_channels, n_tiles,
                   stored,
                   stride_xb, stride_xs, stride_tb, stride_ts, stride_zb, stride_zs, stride_Bb, stride_Bs, stride_Bg,
                   stride_Cb, stride_Cs, stride_Cg, stride_yb, stride_ys, stride_ob, stride_os, stride_gb, stride_gs,
                   HAS_SEG: gl.constexpr, T: gl.constexpr, BD: gl.constexpr, N: gl.constexpr,
                   pairs: gl.constexpr, flat: gl.constexpr, small: gl.constexpr, turned: gl.constexpr):
    """dx and ddt share the strides stride_o*, dz has stride_g*; dB, dC: (b, programs, s, N); dA: (b, channels, N);
    sums: (b, 2, channels), dD and dbias. Steps of a tile are unrolled over (BD, N) tensors in the layout `pairs`; what
    they read and write per channel or per state passes through shared memory, one row a step."""
    group: gl.constexpr = 8  # steps between stores to shared memory: each brings a barrier
    of_channel: gl.constexpr = gl.SliceLayout(1, pairs)
    of_state: gl.constexpr = gl.SliceLayout(0, pairs)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plane: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    blocks = (head_channels + BD - 1) // BD
    g, b = gl.program_id(0) // blocks, gl.program_id(1).to(gl.int64)
    d0 = g * head_channels + (gl.program_id(0) % blocks) * BD
    own = (g + 1) * head_channels - d0
    d = gl.arange(0, BD, layout=gl.SliceLayout(0, flat))
    ds = gl.arange(0, BD, layout=of_channel)
    n = gl.arange(0, N, layout=of_state)
    A = gl.load(A_ptr + (d0 + ds)[:, None] * N + n[None, :], mask=(ds < own)[:, None], other=0.0)
    A2 = A * LOG2E
    bias = gl.load(bias_ptr + d0 + d, mask=d < own, other=0.0).to(gl.float32)
    D = gl.load(D_ptr + d0 + d, mask=d < own, other=0.0).to(gl.float32)
    x_ptr += b * stride_xb + d0
    dt_ptr += b * stride_tb + d0
    z_ptr += b * stride_zb + d0
    dy_ptr += b * stride_yb + d0
    B_ptr += b * stride_Bb + g * stride_Bg
    C_ptr += b * stride_Cb + g * stride_Cg
    seg_ptr += b * s
    state_ptr += (b * stored * channels + d0) * N + ds[:, None] * N + n[None, :]
    out = b * stride_ob + d0
    dz_ptr += b * stride_gb + d0
    part = (b * gl.num_programs(0) + gl.program_id(0)) * s * N
    tt = gl.arange(0, T, layout=gl.SliceLayout(1, gl.SliceLayout(1, turned)))
    nt = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, turned)))
    tf = gl.arange(0, T, layout=gl.SliceLayout(1, flat))
    dt_rows = gl.allocate_shared_memory(gl.float32, [T, BD], row)
    dtx_rows = gl.allocate_shared_memory(gl.float32, [T, BD], row)
    dy_rows = gl.allocate_shared_memory(gl.float32, [T, BD], row)
    B_rows = gl.allocate_shared_memory(gl.float32, [T, N], row)
    C_rows = gl.allocate_shared_memory(gl.float32, [T, N], row)
    y_plane = gl.allocate_shared_memory(gl.float32, [T, BD], plane)
    du_plane = gl.allocate_shared_memory(gl.float32, [T, BD], plane)
    da_plane = gl.allocate_shared_memory(gl.float32, [T, BD], plane)
    dB_cube = gl.allocate_shared_memory(gl.float32, [T, BD, N], cube)
    dC_cube = gl.allocate_shared_memory(gl.float32, [T, BD, N], cube)
    dh = gl.full((BD, N), 0.0, gl.float32, layout=pairs)  # a_t+1 times the gradient of h_t+1, between steps
    dA = gl.full((BD, N), 0.0, gl.float32, layout=pairs)
    dD = gl.full((BD,), 0.0, gl.float32, layout=gl.SliceLayout(0, flat))
    dbias = gl.full((BD,), 0.0, gl.float32, layout=gl.SliceLayout(0, flat))
    end = (n_tiles - 1) * T
    x = _tile(x_ptr, stride_xs, end, s, T, BD, own, flat)
    v = _tile(dt_ptr, stride_ts, end, s, T, BD, own, flat)
    z = _tile(z_ptr, stride_zs, end, s, T, BD, own, flat)
    dy = _tile(dy_ptr, stride_ys, end, s, T, BD, own, flat)
    B = _tile(B_ptr, stride_Bs, end, s, T, N, N, small)
    C = _tile(C_ptr, stride_Cs, end, s, T, N, N, small)
    h_next = gl.load(state_ptr + (n_tiles - 1).to(gl.int64) * channels * N, mask=(ds < own)[:, None], other=0.0)
    for k in range(n_tiles):
        i = n_tiles - 1 - k
        t0 = i * T
        raw = v.to(gl.float32) + bias[None, :]
        live = (t0 + tf < s)[:, None]
        dt = gl.where(live, _softplus(raw), 0.0)
        xf, zf, dout = x.to(gl.float32), z.to(gl.float32), dy.to(gl.float32)
        gate = 1.0 / (1.0 + gl.exp2(-LOG2E * zf))
        dyf = dout * zf * gate
        dt_rows._reinterpret(gl.float32, [T, BD], plane).store(dt)
        dtx_rows._reinterpret(gl.float32, [T, BD], plane).store(dt * xf)
        dy_rows._reinterpret(gl.float32, [T, BD], plane).store(dyf)
        B_rows._reinterpret(gl.float32, [T, N], plane).store(B.to(gl.float32))
        C_rows._reinterpret(gl.float32, [T, N], plane).store(C.to(gl.float32))
        h = h_next.to(gl.float32)
        before = t0 - T
        x = _tile(x_ptr, stride_xs, before, s, T, BD, own, flat)
        v = _tile(dt_ptr, stride_ts, before, s, T, BD, own, flat)
        z = _tile(z_ptr, stride_zs, before, s, T, BD, own, flat)
        dy = _tile(dy_ptr, stride_ys, before, s, T, BD, own, flat)
        B = _tile(B_ptr, stride_Bs, before, s, T, N, N, small)
        C = _tile(C_ptr, stride_Cs, before, s, T, N, N, small)
        h_next = gl.load(state_ptr + gl.maximum(i - 1, 0).to(gl.int64) * channels * N, mask=(ds < own)[:, None],
                         other=0.0)
        decays, carried, y_rows, dC_rows = (), (), (), ()
        for t in gl.static_range(T):
            power = dt_rows.index(t).load(of_channel)[:, None] * A2
            if HAS_SEG:
                at = gl.minimum(t0 + t, s - 1)
                power += gl.where(gl.load(seg_ptr + at) == gl.load(seg_ptr + gl.maximum(at - 1, 0)), 0.0, -1.0e30)
            a = gl.exp2(power)
            h = a * h
            decays = decays + (a,)
            carried = carried + (h,)
            h += dtx_rows.index(t).load(of_channel)[:, None] * B_rows.index(t).load(of_state)[None, :]
            y_rows = y_rows + (gl.sum(h * C_rows.index(t).load(of_state)[None, :], 1),)
            dC_rows = dC_rows + (h * dy_rows.index(t).load(of_channel)[:, None],)
            if t % group == group - 1:
                y_plane.slice(t + 1 - group, group).store(_stack(y_rows, group))
                dC_cube.slice(t + 1 - group, group).store(_stack(dC_rows, group))
                y_rows, dC_rows = (), ()
        dB_rows, du_rows, da_rows = (), (), ()
        for t in gl.static_range(T - 1, -1, -1):
            Bt = B_rows.index(t).load(of_state)[None, :]
            dtx = dtx_rows.index(t).load(of_channel)[:, None]
            dh += dy_rows.index(t).load(of_channel)[:, None] * C_rows.index(t).load(of_state)[None, :]
            q = dh * carried[t]
            dA += q * dt_rows.index(t).load(of_channel)[:, None]
            du_rows = (gl.sum(dh * Bt, 1),) + du_rows
            da_rows = (gl.sum(q * A, 1),) + da_rows
            dB_rows = (dh * dtx,) + dB_rows
            dh = dh * decays[t]
            if t % group == 0:
                du_plane.slice(t, group).store(_stack(du_rows, group))
                da_plane.slice(t, group).store(_stack(da_rows, group))
                dB_cube.slice(t, group).store(_stack(dB_rows, group))
                dB_rows, du_rows, da_rows = (), (), ()
        y = y_plane.load(flat) + D[None, :] * xf
        du = du_plane.load(flat)
        ddt = da_plane.load(flat) + du * xf
        at = part + (t0 + tt)[:, None] * N + nt[None, :]
        keep = (t0 + tt < s)[:, None]
        gl.store(dB_ptr + at, gl.sum(dB_cube.load(turned), 1), mask=keep)
        gl.store(dC_ptr + at, gl.sum(dC_cube.load(turned), 1), mask=keep)

        ddt = gl.where(live, ddt / (1.0 + gl.exp2(-LOG2E * raw)), 0.0)
        dbias += gl.sum(ddt, 0)
        dD += gl.sum(dyf * xf, 0)
        to = out + t0.to(gl.int64) * stride_os + (tf[:, None] * stride_os + d[None, :])
        mask = live & (d < own)[None, :]
        gl.store(dx_ptr + to, (du * dt + D[None, :] * dyf).to(dx_ptr.dtype.element_ty), mask=mask)
        gl.store(ddt_ptr + to, ddt.to(ddt_ptr.dtype.element_ty), mask=mask)
        to = t0.to(gl.int64) * stride_gs + (tf[:, None] * stride_gs + d[None, :])
        gl.store(dz_ptr + to, (dout * y * gate * (1.0 + zf * (1.0 - gate))).to(dz_ptr.dtype.element_ty), mask=mask)
    gl.store(dA_ptr + (b * channels + d0 + ds)[:, None] * N + n[None, :], dA, mask=(ds < own)[:, None])
    gl.store(sums_ptr + 2 * b * channels + d0 + d, dD, mask=d < own)
    gl.store(sums_ptr + (2 * b + 1) * channels + d0 + d, dbias, mask=d < own)
