"""Mamba2's state space scan (SSD) in Triton, forward and backward, without atomics.

Recurrence, for each batch b and head h of group g (state S: N x P, zero at the start and at every document border):

    dt_t = max(softplus(dt_raw_t + dt_bias), dt_min)
    S_t  = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T          y_t = C_t^T S_t + D x_t

Chunked form of Dao and Gu 2024 (arXiv 2405.21060, section 6), chunks of L = 64 tokens, in three and five launches:

    forward    prep    cum = in-chunk running sum of dt A (in log2 units) and cdt = cum - log2 dt, as (b, heads, s): the
                       decay from s to l times dt_s is 2^(cum_l - cdt_s), so dt is not needed again
               states  one program per (head, slice of P) walks the chunks with the state in registers: the state on
                       entry of each chunk goes to memory once, and no separate inter-chunk pass is needed
               out     one program per (chunk, some heads of one group): C B^T once, then per head
                       y = (C B^T . decay . dt) x + exp(cum) C S + D x
    backward   prep, states (the forward states again and, in the same launch, their gradients from the last chunk to
               the first), grads (all L x L matrices live in registers and are recomputed), finish (running sums of
               the decay gradients, softplus, dA, dD, ddt_bias), reduce (dB, dC: partial sums over head blocks)

Limits for 112 heads x 64, N 64, 2 groups, s 4096, b 1 (x is 58.7 MB; states, bf16, one per 64 tokens, as much):
    forward   x twice, y once, states written and read: 295 MB, 69 us at 4.3 TB/s (H200), 98 us at 3.0 TB/s (H100)
    backward  x twice, dy twice, dx once, two kinds of states written and read, sums: 580 MB, 135 us (H200)
    matmuls   10 + 34 GFLOP: 15 + 50 us at 690 TFLOP/s; exp: 29 M each way, 8 us
Prediction before the first run: 0.12 ms forward, 0.30 ms backward on an H200. Measured there, GPU time of both
(benchmarks/kernels.py): 0.43 ms: states 0.13 in both, out 0.05, grads 0.21, the rest 0.04. `grads` is held by the
registers of its three sums (255 a thread, some spilled), not by bytes. By events a call costs more: ten launches.
"""

# fmt: off
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(v):
    """log(1 + exp(v)), to fp32 rounding for small results too."""
    u = tl.exp(tl.minimum(v, 20.0))
    series = u * (1.0 - u * (0.5 - u * (0.33333334 - u * 0.25)))
    return tl.where(v > 20.0, v, tl.where(u < 0.03, series, tl.log(1.0 + u)))


@triton.jit
def _add(a, a_starts, b, b_starts):
    return tl.where(b_starts > 0, b, a + b), tl.maximum(a_starts, b_starts)


@triton.jit
def _sums(v, seg_ptr, l, s, HAS_SEG: tl.constexpr):
    """Running sums over axis 0. They begin anew with each document: what lies in one reaches no other by rounding."""
    if HAS_SEG:
        here = tl.load(seg_ptr + l, mask=l < s, other=-1)
        starts = (here != tl.load(seg_ptr + l - 1, mask=(l > 0) & (l < s), other=-1)).to(tl.int32)
        total, _ = tl.associative_scan((v, tl.zeros_like(v).to(tl.int32) + starts[:, None]), 0, _add)
    else:
        total = tl.cumsum(v, 0)
    return total


@triton.jit
def ssd_prep(dt_ptr, bias_ptr, A_ptr, seg_ptr, cum_out, cdt_out, s, heads, s_pad, stride_b, stride_s, stride_h, dt_min,
             HAS_BIAS: tl.constexpr, HAS_SEG: tl.constexpr, L: tl.constexpr, HB: tl.constexpr):
    chunk, b = tl.program_id(0), tl.program_id(2)
    l = chunk * L + tl.arange(0, L)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    mask = (l < s)[:, None] & (h < heads)[None, :]
    v = tl.load(
        dt_ptr + b.to(tl.int64) * stride_b + l[:, None].to(tl.int64) * stride_s + h[None, :] * stride_h,
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias_ptr + h, mask=h < heads, other=0.0).to(tl.float32)[None, :]
    dt = tl.where(mask, tl.maximum(_softplus(v), dt_min), 0.0)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0).to(tl.float32) * LOG2E
    cum = _sums(dt * A[None, :], seg_ptr + b * s, l, s, HAS_SEG)
    out = (b * heads + h[None, :]).to(tl.int64) * s_pad + l[:, None]
    tl.store(cum_out + out, cum, mask=(h < heads)[None, :])
    tl.store(cdt_out + out, cum - tl.log2(dt), mask=(h < heads)[None, :])


@triton.jit
def _scan_states(v_ptr, k_ptr, out_ptr, cum_ptr, cdt_ptr, seg_ptr, s, n_chunks, p, stride_vs, stride_ks,
                 REVERSE: tl.constexpr, HAS_SEG: tl.constexpr, L: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
                 BP: tl.constexpr):
    """States on entry of each chunk (from x, B) or gradients of the states at each chunk's end (from dy, C)."""
    r = tl.arange(0, L)
    n = tl.arange(0, N)
    acc = tl.zeros((N, BP), dtype=tl.float32)
    for i in range(n_chunks):
        chunk = n_chunks - 1 - i if REVERSE else i
        l = chunk * L + r
        rows = (l < s)[:, None]
        v = tl.load(v_ptr + l[:, None].to(tl.int64) * stride_vs + p[None, :], mask=rows, other=0.0)
        k = tl.load(k_ptr + l[:, None].to(tl.int64) * stride_ks + n[None, :], mask=rows, other=0.0)
        last = tl.load(cum_ptr + chunk * L + L - 1)
        decay = tl.exp2(last)
        if REVERSE:
            w = tl.exp2(tl.load(cum_ptr + l))
        else:
            w = tl.exp2(last - tl.load(cdt_ptr + l))
        if HAS_SEG:
            seg = tl.load(seg_ptr + l, mask=l < s, other=-1)
            seg_in = tl.load(seg_ptr + tl.maximum(chunk * L - 1, 0))
            seg_out = tl.load(seg_ptr + tl.minimum(chunk * L + L, s) - 1)
            w = tl.where(seg == (seg_in if REVERSE else seg_out), w, 0.0)
            decay = tl.where(seg_in == seg_out, decay, 0.0)
        tl.store(out_ptr + chunk * (N * P) + n[:, None] * P + p[None, :], acc.to(out_ptr.dtype.element_ty))
        acc = tl.dot(tl.trans(k), (v * w[:, None]).to(k.dtype), acc * decay)


@triton.jit
def ssd_states(x_ptr, B_ptr, S_ptr, dy_ptr, C_ptr, dS_ptr, cum_ptr, cdt_ptr, seg_ptr, s, s_pad, n_chunks, stride_xb,
               stride_xs, stride_xh, stride_Bb, stride_Bs, stride_Bg, stride_yb, stride_ys, stride_yh, stride_Cb,
               stride_Cs, stride_Cg, heads, heads_per_group, HAS_SEG: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
               P: tl.constexpr, BP: tl.constexpr):
    h, b = tl.program_id(0) // (P // BP), tl.program_id(1).to(tl.int64)
    p = (tl.program_id(0) % (P // BP)) * BP + tl.arange(0, BP)
    g = h // heads_per_group
    bh = b * heads + h
    if tl.program_id(2) == 0:
        _scan_states(x_ptr + b * stride_xb + h * stride_xh, B_ptr + b * stride_Bb + g * stride_Bg,
                     S_ptr + bh * n_chunks * (N * P), cum_ptr + bh * s_pad, cdt_ptr + bh * s_pad, seg_ptr + b * s, s,
                     n_chunks, p, stride_xs, stride_Bs, False, HAS_SEG, L, N, P, BP)
    else:
        _scan_states(dy_ptr + b * stride_yb + h * stride_yh, C_ptr + b * stride_Cb + g * stride_Cg,
                     dS_ptr + bh * n_chunks * (N * P), cum_ptr + bh * s_pad, cdt_ptr + bh * s_pad, seg_ptr + b * s, s,
                     n_chunks, p, stride_ys, stride_Cs, True, HAS_SEG, L, N, P, BP)


@triton.jit
def ssd_out(x_ptr, B_ptr, C_ptr, S_ptr, D_ptr, y_ptr, cum_ptr, cdt_ptr, seg_ptr, s, s_pad, n_chunks, stride_xb,
            stride_xs, stride_xh, stride_Bb, stride_Bs, stride_Bg, stride_Cb, stride_Cs, stride_Cg, stride_yb,
            stride_ys, stride_yh, heads, heads_per_group, heads_per_block, HAS_D: tl.constexpr, HAS_SEG: tl.constexpr,
            L: tl.constexpr, N: tl.constexpr, P: tl.constexpr, STAGES: tl.constexpr):
    blocks = tl.cdiv(heads_per_group, heads_per_block)
    chunk, g, b = tl.program_id(0), tl.program_id(1) // blocks, tl.program_id(2).to(tl.int64)
    h0 = g * heads_per_group + (tl.program_id(1) % blocks) * heads_per_block
    h1 = tl.minimum(h0 + heads_per_block, (g + 1) * heads_per_group)
    r, n, p = tl.arange(0, L), tl.arange(0, N), tl.arange(0, P)
    l = chunk * L + r
    l64 = l.to(tl.int64)
    rows = (l < s)[:, None]
    Bm = tl.load(B_ptr + b * stride_Bb + g * stride_Bg + l64[:, None] * stride_Bs + n[None, :], mask=rows, other=0.0)
    Cm = tl.load(C_ptr + b * stride_Cb + g * stride_Cg + l64[:, None] * stride_Cs + n[None, :], mask=rows, other=0.0)
    mask = r[:, None] >= r[None, :]
    if HAS_SEG:
        seg = tl.load(seg_ptr + b * s + l, mask=l < s, other=-1)
        mask = mask & (seg[:, None] == seg[None, :])
        carried = seg == tl.load(seg_ptr + b * s + tl.maximum(chunk * L - 1, 0))
    G = tl.where(mask, tl.dot(Cm, tl.trans(Bm)), 0.0)
    for h in tl.range(h0, h1, num_stages=STAGES):
        bh = b * heads + h
        x = tl.load(x_ptr + b * stride_xb + h * stride_xh + l64[:, None] * stride_xs + p[None, :], mask=rows, other=0.0)
        S = tl.load(S_ptr + (bh * n_chunks + chunk) * (N * P) + n[:, None] * P + p[None, :])
        cum = tl.load(cum_ptr + bh * s_pad + l)
        cdt = tl.load(cdt_ptr + bh * s_pad + l)
        M = G * tl.exp2(tl.minimum(cum[:, None] - cdt[None, :], 30.0))
        scale = tl.exp2(cum)
        if HAS_SEG:
            scale = tl.where(carried, scale, 0.0)
        y = tl.dot(Cm, S) * scale[:, None]
        y = tl.dot(M.to(x.dtype), x, y)
        if HAS_D:
            y += x.to(tl.float32) * tl.load(D_ptr + h).to(tl.float32)
        tl.store(
            y_ptr + b * stride_yb + h * stride_yh + l64[:, None] * stride_ys + p[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=rows,
        )


@triton.jit
def ssd_grads(x_ptr, B_ptr, C_ptr, S_ptr, dS_ptr, D_ptr, dy_ptr, dx_ptr, dB_ptr, dC_ptr, vec_ptr, sds_ptr, cum_ptr,
              cdt_ptr, seg_ptr, s, s_pad, n_chunks, stride_xb, stride_xs, stride_xh, stride_Bb, stride_Bs, stride_Bg,
              stride_Cb, stride_Cs, stride_Cg, stride_yb, stride_ys, stride_yh, stride_dxb, stride_dxs, stride_dxh,
              heads, heads_per_group, heads_per_block, vec_size, HAS_D: tl.constexpr, HAS_SEG: tl.constexpr,
              L: tl.constexpr, N: tl.constexpr, P: tl.constexpr, STAGES: tl.constexpr):
    """Gradients of one chunk for some heads of one group. Matrices are [s, l] (input token by output token), so that
    each product that feeds another one is a left operand and stays in registers.

    vec_ptr: (4, b, heads, s_pad) sums that `_finish` turns into ddt, dA, dD; sds_ptr: (b, heads, n_chunks, N).
    """
    blocks = tl.cdiv(heads_per_group, heads_per_block)
    chunk, g, b = tl.program_id(0), tl.program_id(1) // blocks, tl.program_id(2).to(tl.int64)
    block = tl.program_id(1) % blocks
    h0 = g * heads_per_group + block * heads_per_block
    h1 = tl.minimum(h0 + heads_per_block, (g + 1) * heads_per_group)
    r, n, p = tl.arange(0, L), tl.arange(0, N), tl.arange(0, P)
    start = (chunk * L).to(tl.int64)
    rows = (chunk * L + r < s)[:, None]
    x_ptr += b * stride_xb + start * stride_xs
    dy_ptr += b * stride_yb + start * stride_ys
    dx_ptr += b * stride_dxb + start * stride_dxs
    state = n[:, None] * P + p[None, :]
    Bm = tl.load(
        B_ptr + b * stride_Bb + g * stride_Bg + start * stride_Bs + r[:, None] * stride_Bs + n[None, :],
        mask=rows,
        other=0.0,
    )
    C_ptrs = C_ptr + b * stride_Cb + g * stride_Cg + start * stride_Cs + r[:, None] * stride_Cs + n[None, :]
    mask = r[:, None] <= r[None, :]
    if HAS_SEG:
        seg = tl.load(seg_ptr + b * s + chunk * L + r, mask=chunk * L + r < s, other=-1)
        mask = mask & (seg[:, None] == seg[None, :])
        carried = seg == tl.load(seg_ptr + b * s + tl.maximum(chunk * L - 1, 0))
        leaves = seg == tl.load(seg_ptr + b * s + tl.minimum(chunk * L + L, s) - 1)
    dG = tl.zeros((L, L), dtype=tl.float32)
    dB = tl.zeros((L, N), dtype=tl.float32)
    dC = tl.zeros((L, N), dtype=tl.float32)
    for h in tl.range(h0, h1, num_stages=STAGES):
        bh = b * heads + h
        x = tl.load(x_ptr + h * stride_xh + (r[:, None] * stride_xs + p[None, :]), mask=rows, other=0.0)
        dy = tl.load(dy_ptr + h * stride_yh + (r[:, None] * stride_ys + p[None, :]), mask=rows, other=0.0)
        S = tl.load(S_ptr + (bh * n_chunks + chunk) * (N * P) + state)
        dS = tl.load(dS_ptr + (bh * n_chunks + chunk) * (N * P) + state)
        Cm = tl.load(C_ptrs, mask=rows, other=0.0)  # again for each head: kept, it would cost 64 registers
        at = bh * s_pad + chunk * L
        cum = tl.load(cum_ptr + at + r)
        cdt = tl.load(cdt_ptr + at + r)
        into = tl.exp2(cum)
        out = tl.exp2(tl.load(cum_ptr + at + L - 1) - cdt)
        if HAS_SEG:
            into = tl.where(carried, into, 0.0)
            out = tl.where(leaves, out, 0.0)
        vec = vec_ptr + at + r

        tl.store(sds_ptr + (bh * n_chunks + chunk) * N + n, tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1))
        T = tl.dot(dy, tl.trans(S)) * into[:, None]
        dC += T
        tl.store(vec + vec_size, tl.sum(T * Cm.to(tl.float32), 1))
        dB += tl.dot(x, tl.trans(dS)) * out[:, None]
        u = tl.dot(Bm, dS) * out[:, None]
        f = tl.sum(u * x.to(tl.float32), 1)

        dM = tl.dot(x, tl.trans(dy))
        E = tl.exp2(tl.minimum(cum[None, :] - cdt[:, None], 30.0))
        M = tl.where(mask, tl.dot(Bm, tl.trans(Cm)) * E, 0.0)
        dG += E * dM
        Z = M * dM
        tl.store(vec + 2 * vec_size, f + tl.sum(Z, 1))
        tl.store(vec, tl.sum(Z, 0))
        if HAS_D:
            diagonal = r[:, None] == r[None, :]
            tl.store(vec + 3 * vec_size, tl.sum(tl.where(diagonal, dM, 0.0), 1))
            M = tl.where(diagonal, M + tl.load(D_ptr + h).to(tl.float32), M)
        u = tl.dot(M.to(dy.dtype), dy, u)
        tl.store(dx_ptr + h * stride_dxh + (r[:, None] * stride_dxs + p[None, :]),
                 u.to(dx_ptr.dtype.element_ty), mask=rows)
    Cm = tl.load(C_ptrs, mask=rows, other=0.0)
    # in two parts, or its rounding would be the error of dB and dC where a document has few tokens
    dG = tl.where(mask, dG, 0.0)
    high = dG.to(Bm.dtype)
    low = (dG - high.to(tl.float32)).to(Bm.dtype)
    dB = tl.dot(low, Cm, tl.dot(high, Cm, dB))
    dC = tl.dot(tl.trans(low), Bm, tl.dot(tl.trans(high), Bm, dC))
    # partial sums (b, groups, blocks, s, N)
    part = (((b * (heads // heads_per_group) + g) * blocks + block) * s + start + r[:, None]) * N + n[None, :]
    tl.store(dB_ptr + part, dB, mask=rows)
    tl.store(dC_ptr + part, dC, mask=rows)


@triton.jit
def ssd_finish(dt_ptr, bias_ptr, A_ptr, seg_ptr, vec_ptr, sds_ptr, ddt_ptr, part_ptr, s, heads, s_pad, n_chunks,
               vec_size, stride_b, stride_s, stride_h, stride_db, stride_ds, stride_dh, dt_min, HAS_BIAS: tl.constexpr,
               HAS_D: tl.constexpr, HAS_SEG: tl.constexpr, L: tl.constexpr, N: tl.constexpr, HB: tl.constexpr):
    """ddt_raw, and per chunk the sums for dA, ddt_bias, dD: part_ptr (3, b, n_chunks, heads).

    The gradient of a_t = dt_t A sums M dM over all pairs (input s < t <= output l). From the vectors of `_grads` -
    rows_l and e_l (outputs: inside the chunk, from the state on entry), q_s (inputs: inside the chunk and to its end) -
    it is  sum(e) + <S, dS> decay + sum over j < t of (q - e - rows)_j, within t's document.  Sums of M dM that must
    cancel come from the same fp32 values, so they do.
    """
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    l = chunk * L + tl.arange(0, L)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    n = tl.arange(0, N)
    hm = h < heads
    mask = (l < s)[:, None] & hm[None, :]
    raw = tl.load(
        dt_ptr + b * stride_b + l[:, None].to(tl.int64) * stride_s + h[None, :] * stride_h, mask=mask, other=0.0
    ).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + h, mask=hm, other=0.0).to(tl.float32)[None, :]
    dt = _softplus(raw)
    slope = tl.where(dt < dt_min, 0.0, 1.0 / (1.0 + tl.exp(-raw)))
    dt = tl.where(mask, tl.maximum(dt, dt_min), 0.0)
    A = tl.load(A_ptr + h, mask=hm, other=0.0).to(tl.float32)
    vec = vec_ptr + (b * heads + h[None, :]) * s_pad + l[:, None]
    e = tl.load(vec + vec_size, mask=mask, other=0.0)
    q = tl.load(vec + 2 * vec_size, mask=mask, other=0.0)
    k = q - e - tl.load(vec, mask=mask, other=0.0)
    sds = tl.load(sds_ptr + ((b * heads + h[None, :]) * n_chunks + chunk) * N + n[:, None], mask=hm[None, :], other=0.0)
    total = tl.sum(sds, 0) * tl.exp(tl.sum(dt, 0) * A)
    carried = tl.sum(e, 0)[None, :]
    if HAS_SEG:
        seg_in = tl.load(seg_ptr + b * s + tl.maximum(chunk * L - 1, 0))
        total = tl.where(seg_in == tl.load(seg_ptr + b * s + tl.minimum(chunk * L + L, s) - 1), total, 0.0)
        carried = tl.where((tl.load(seg_ptr + b * s + l, mask=l < s, other=-1) == seg_in)[:, None], carried, 0.0)
    da = carried + total[None, :] + (_sums(k, seg_ptr + b * s, l, s, HAS_SEG) - k)
    da = tl.where(mask, da, 0.0)
    ddt = (da * A[None, :] + tl.where(dt > 0.0, q / dt, 0.0)) * slope
    ddt = tl.where(mask, ddt, 0.0)
    tl.store(
        ddt_ptr + b * stride_db + l[:, None].to(tl.int64) * stride_ds + h[None, :] * stride_dh,
        ddt.to(ddt_ptr.dtype.element_ty),
        mask=mask,
    )
    part = part_ptr + (b * n_chunks + chunk) * heads + h
    size = tl.num_programs(2).to(tl.int64) * n_chunks * heads
    tl.store(part, tl.sum(da * dt, 0), mask=hm)
    tl.store(part + size, tl.sum(ddt, 0), mask=hm)
    if HAS_D:
        tl.store(part + 2 * size, tl.sum(tl.load(vec + 3 * vec_size, mask=mask, other=0.0), 0), mask=hm)


@triton.jit
def ssd_reduce(dB_ptr, dC_ptr, dB_out, dC_out, s, blocks, groups, stride_b, stride_s, stride_g, N: tl.constexpr,
               R: tl.constexpr):
    """(b, groups, blocks, s, N) -> (b, s, groups, N), dB and dC in one launch."""
    b, g = tl.program_id(1).to(tl.int64) // groups, tl.program_id(1) % groups
    l = tl.program_id(0) * R + tl.arange(0, R)
    n = tl.arange(0, N)
    src = ((tl.program_id(1).to(tl.int64) * blocks) * s + l[:, None]) * N + n[None, :]
    mask = (l < s)[:, None]
    B = tl.zeros((R, N), dtype=tl.float32)
    C = tl.zeros((R, N), dtype=tl.float32)
    for _ in range(blocks):
        B += tl.load(dB_ptr + src, mask=mask, other=0.0)
        C += tl.load(dC_ptr + src, mask=mask, other=0.0)
        src += s * N
    dst = b * stride_b + l[:, None].to(tl.int64) * stride_s + g * stride_g + n[None, :]
    tl.store(dB_out + dst, B.to(dB_out.dtype.element_ty), mask=mask)
    tl.store(dC_out + dst, C.to(dC_out.dtype.element_ty), mask=mask)
