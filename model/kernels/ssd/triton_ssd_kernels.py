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
               the decay gradients, softplus, dA, dD, ddt_bias), reduce (dB, dC: partial sums over head blocks, and
               the products of B and C with the gradient of B C^T)

Limits for 112 heads x 64, N 64, 2 groups, s 4096, b 1 (x is 58.7 MB; states, bf16, one per 64 tokens, as much):
    forward   x twice, y once, states written and read: 295 MB, 69 us at 4.3 TB/s (H200), 98 us at 3.0 TB/s (H100)
    backward  x twice, dy twice, dx once, two kinds of states written and read, sums: 600 MB, 140 us, 200 us
    matmuls   10 + 34 GFLOP: 15 + 50 us at 690 TFLOP/s; exp: 29 M each way, 8 us

`grads` in numbers, for one head and chunk (7,168 of them above; 56 KB at N 128, and 16,384 for 64 heads, batch 4):
    bytes     x, dy, dx 24 KB, S and dS 16 KB, sums 5 KB: 2.0 us a multiprocessor at 3.0 TB/s
    before    one program with all sums spilled some 100 values a thread, to a cache of which shared memory leaves less
              than they take: 4.8 us at N 64, 10.6 us at N 128 (measured on an H100)
    now       870 instructions a warp from token to token, 590 from and to 64 columns of the states, none spilled: in
              2,490 and 1,570 cycles by their own latencies, two programs a multiprocessor: 1.2 us, 1.7 us at N 128,
              so that bytes bind again. Predicted: 0.125 ms for the shape above, 0.40 ms at N 128. All of the scan
              went from 0.54 to 0.42 ms, at N 128 from 1.96 to 1.31 ms (H100)
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
    return tl.where(v <= 20.0, tl.where(u < 0.03, series, tl.log(1.0 + u)), v)  # NaN stays NaN


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
    dt = _softplus(v)
    dt = tl.where(mask, tl.where(dt < dt_min, dt_min, dt), 0.0)
    A = tl.load(A_ptr + h, mask=h < heads, other=0.0).to(tl.float32) * LOG2E
    cum = _sums(dt * A[None, :], seg_ptr + b * s, l, s, HAS_SEG)
    out = (b * heads + h[None, :]).to(tl.int64) * s_pad + l[:, None]
    tl.store(cum_out + out, cum, mask=(h < heads)[None, :])
    tl.store(cdt_out + out, cum - tl.log2(dt), mask=(h < heads)[None, :])


@triton.jit
def ssd_states(x_ptr, B_ptr, S_ptr, dy_ptr, C_ptr, dS_ptr, cum_ptr, cdt_ptr, seg_ptr, s, s_pad, n_chunks, stride_xb,
               stride_xs, stride_xh, stride_Bb, stride_Bs, stride_Bg, stride_yb, stride_ys, stride_yh, stride_Cb,
               stride_Cs, stride_Cg, heads, heads_per_group, HAS_SEG: tl.constexpr, L: tl.constexpr, N: tl.constexpr,
               P: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr):
    """States on entry of each chunk, from x and B; the second half of the programs: gradients of the states at each
    chunk's end, from dy and C, the last chunk first. One loop for both: two would take more shared memory."""
    h, b = tl.program_id(0) // (P // BP), tl.program_id(1).to(tl.int64)
    p = (tl.program_id(0) % (P // BP)) * BP + tl.arange(0, BP)
    g = h // heads_per_group
    bh = b * heads + h
    reverse = tl.program_id(2) == 1
    v_ptr = tl.where(reverse, dy_ptr + b * stride_yb + h * stride_yh, x_ptr + b * stride_xb + h * stride_xh)
    k_ptr = tl.where(reverse, C_ptr + b * stride_Cb + g * stride_Cg, B_ptr + b * stride_Bb + g * stride_Bg)
    stride_vs, stride_ks = tl.where(reverse, stride_ys, stride_xs), tl.where(reverse, stride_Cs, stride_Bs)
    out_ptr = tl.where(reverse, dS_ptr, S_ptr) + bh * n_chunks * (N * P)
    w_ptr = tl.where(reverse, cum_ptr, cdt_ptr) + bh * s_pad
    cum_ptr += bh * s_pad
    r = tl.arange(0, L)
    n = tl.arange(0, N)
    acc = tl.zeros((N, BP), dtype=tl.float32)
    for i in tl.range(n_chunks, num_stages=STAGES):  # said here, so that what feeds no product is loaded ahead too
        chunk = tl.where(reverse, n_chunks - 1 - i, i)
        l = chunk * L + r
        rows = (l < s)[:, None]
        v = tl.load(v_ptr + l[:, None].to(tl.int64) * stride_vs + p[None, :], mask=rows, other=0.0)
        k = tl.load(k_ptr + l[:, None].to(tl.int64) * stride_ks + n[None, :], mask=rows, other=0.0)
        last = tl.load(cum_ptr + chunk * L + L - 1)
        w = tl.load(w_ptr + l)
        w = tl.exp2(tl.where(reverse, w, last - w))
        decay = tl.exp2(last)
        if HAS_SEG:
            seg = tl.load(seg_ptr + b * s + l, mask=l < s, other=-1)
            seg_in = tl.load(seg_ptr + b * s + tl.maximum(chunk * L - 1, 0))
            seg_out = tl.load(seg_ptr + b * s + tl.minimum(chunk * L + L, s) - 1)
            w = tl.where(seg == tl.where(reverse, seg_in, seg_out), w, 0.0)
            decay = tl.where(seg_in == seg_out, decay, 0.0)
        tl.store(out_ptr + chunk * (N * P) + n[:, None] * P + p[None, :], acc.to(out_ptr.dtype.element_ty))
        acc = tl.dot(tl.trans(k), (v * w[:, None]).to(k.dtype), acc * decay)


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
def _token_grads(x_ptr, B_ptr, C_ptr, dS_ptr, D_ptr, dy_ptr, dx_ptr, dG_ptr, vec_ptr, cum_ptr, cdt_ptr, seg_ptr, s_pad,
                 n_chunks, count, left, stride_xs, stride_xh, stride_Bs, stride_Cs, stride_ys,
                 stride_yh, stride_dxs, stride_dxh, vec_size, HAS_D: tl.constexpr, HAS_SEG: tl.constexpr,
                 L: tl.constexpr, N: tl.constexpr, P: tl.constexpr, STAGES: tl.constexpr):
    """From token to token: dx, the sums over pairs of tokens, and dG, the gradient of B C^T summed over `count` heads.

    Pointers are those of the first of these heads in the chunk; left: tokens from here to the end.
    """
    r, n, p = tl.arange(0, L), tl.arange(0, N), tl.arange(0, P)
    rows = (r < left)[:, None]
    Bm = tl.load(B_ptr + r[:, None] * stride_Bs + n[None, :], mask=rows, other=0.0)
    Cm = tl.load(C_ptr + r[:, None] * stride_Cs + n[None, :], mask=rows, other=0.0)
    mask = r[:, None] <= r[None, :]
    if HAS_SEG:
        seg = tl.load(seg_ptr + r, mask=r < left, other=-1)
        mask = mask & (seg[:, None] == seg[None, :])
        leaves = seg == tl.load(seg_ptr + tl.minimum(L, left) - 1)
    G = tl.where(mask, tl.dot(Bm, tl.trans(Cm)), 0.0)
    dG = tl.zeros((L, L), dtype=tl.float32)
    for h in tl.range(count, num_stages=STAGES):
        x = tl.load(x_ptr + h * stride_xh + (r[:, None] * stride_xs + p[None, :]), mask=rows, other=0.0)
        dy = tl.load(dy_ptr + h * stride_yh + (r[:, None] * stride_ys + p[None, :]), mask=rows, other=0.0)
        dS = tl.load(dS_ptr + h * (n_chunks * N * P) + (n[:, None] * P + p[None, :]))
        if HAS_D:  # here, since no load moves ahead over a store
            D = tl.load(D_ptr + h).to(tl.float32)
        at = h * s_pad
        cum = tl.load(cum_ptr + at + r)
        cdt = tl.load(cdt_ptr + at + r)
        out = tl.exp2(tl.load(cum_ptr + at + L - 1) - cdt)
        if HAS_SEG:
            out = tl.where(leaves, out, 0.0)
        vec = vec_ptr + at + r
        dM = tl.dot(x, tl.trans(dy))
        E = tl.exp2(tl.minimum(cum[None, :] - cdt[:, None], 30.0))
        M = G * E
        dG += E * dM
        Z = M * dM
        tl.store(vec, tl.sum(Z, 0))
        tl.store(vec + vec_size, tl.sum(Z, 1))
        if HAS_D:
            diagonal = r[:, None] == r[None, :]
            tl.store(vec + 2 * vec_size, tl.sum(tl.where(diagonal, dM, 0.0), 1))
            M = tl.where(diagonal, M + D, M)
        dx = tl.dot(M.to(dy.dtype), dy, tl.dot(Bm, dS) * out[:, None])
        tl.store(dx_ptr + h * stride_dxh + (r[:, None] * stride_dxs + p[None, :]), dx.to(dx_ptr.dtype.element_ty),
                 mask=rows)
    tl.store(dG_ptr + r[:, None] * L + r[None, :], tl.where(mask, dG, 0.0))


@triton.jit
def _state_grads(x_ptr, B_ptr, C_ptr, S_ptr, dS_ptr, dy_ptr, dB_ptr, dC_ptr, vec_ptr, sds_ptr, cum_ptr, cdt_ptr,
                 seg_ptr, s_pad, n_chunks, chunk, count, left, stride_xs, stride_xh, stride_Bs, stride_Cs, stride_ys,
                 stride_yh, vec_size, HAS_SEG: tl.constexpr, L: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
                 BN: tl.constexpr, STAGES: tl.constexpr):
    """From and to the chunk's states, for BN of their N columns: dB, dC, and the sums e, f and <S, dS>."""
    r, n, p = tl.arange(0, L), tl.arange(0, BN), tl.arange(0, P)
    rows = (r < left)[:, None]
    Bm = tl.load(B_ptr + r[:, None] * stride_Bs + n[None, :], mask=rows, other=0.0)
    Cm = tl.load(C_ptr + r[:, None] * stride_Cs + n[None, :], mask=rows, other=0.0)
    if HAS_SEG:
        seg = tl.load(seg_ptr + r, mask=r < left, other=-1)
        carried = seg == tl.load(seg_ptr - tl.minimum(chunk, 1))
        leaves = seg == tl.load(seg_ptr + tl.minimum(L, left) - 1)
    dB = tl.zeros((L, BN), dtype=tl.float32)
    dC = tl.zeros((L, BN), dtype=tl.float32)
    for h in tl.range(count, num_stages=STAGES):
        x = tl.load(x_ptr + h * stride_xh + (r[:, None] * stride_xs + p[None, :]), mask=rows, other=0.0)
        dy = tl.load(dy_ptr + h * stride_yh + (r[:, None] * stride_ys + p[None, :]), mask=rows, other=0.0)
        state = h * (n_chunks * N * P) + (n[:, None] * P + p[None, :])
        S = tl.load(S_ptr + state)
        dS = tl.load(dS_ptr + state)
        at = h * s_pad
        into = tl.exp2(tl.load(cum_ptr + at + r))
        out = tl.exp2(tl.load(cum_ptr + at + L - 1) - tl.load(cdt_ptr + at + r))
        if HAS_SEG:
            into = tl.where(carried, into, 0.0)
            out = tl.where(leaves, out, 0.0)
        vec = vec_ptr + at + r
        tl.store(sds_ptr + h * (n_chunks * N) + n, tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1))
        T = tl.dot(dy, tl.trans(S)) * into[:, None]
        dC += T
        tl.store(vec, tl.sum(T * Cm.to(tl.float32), 1))
        V = tl.dot(x, tl.trans(dS)) * out[:, None]
        dB += V
        tl.store(vec + vec_size, tl.sum(V * Bm.to(tl.float32), 1))
    tl.store(dB_ptr + r[:, None] * N + n[None, :], dB, mask=rows)
    tl.store(dC_ptr + r[:, None] * N + n[None, :], dC, mask=rows)


@triton.jit
def ssd_grads(x_ptr, B_ptr, C_ptr, S_ptr, dS_ptr, D_ptr, dy_ptr, dx_ptr, dG_ptr, dB_ptr, dC_ptr, vec_ptr, sds_ptr,
              cum_ptr, cdt_ptr, seg_ptr, s, s_pad, n_chunks, stride_xb, stride_xs, stride_xh, stride_Bb, stride_Bs,
              stride_Bg, stride_Cb, stride_Cs, stride_Cg, stride_yb, stride_ys, stride_yh, stride_dxb, stride_dxs,
              stride_dxh, heads, heads_per_group, heads_per_block, vec_size, HAS_D: tl.constexpr, HAS_SEG: tl.constexpr,
              L: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, TOKEN_STAGES: tl.constexpr,
              STATE_STAGES: tl.constexpr):
    """Gradients of one chunk for some heads of one group. Matrices are [s, l] (input token by output token), so that
    each product that feeds another one is a left operand and stays in registers.

    1 + N / BN programs share a (chunk, heads) pair, neighbours in the grid, so that they run at the same time and read
    the same x, dy and dS, of which all but the first find them in the cache: one program for all of it has more sums
    than registers.

    vec_ptr: (3 + 2 N / BN, b, heads, s_pad) and sds_ptr: (b, heads, n_chunks, N): sums that `ssd_finish` turns into
    ddt, dA, dD; dG_ptr: (b, groups, blocks, n_chunks, L, L); dB_ptr, dC_ptr: (b, groups, blocks, s, N).
    """
    blocks = tl.cdiv(heads_per_group, heads_per_block)
    kinds: tl.constexpr = 1 + N // BN
    chunk, kind = tl.program_id(0) // kinds, tl.program_id(0) % kinds
    g, block, b = tl.program_id(1) // blocks, tl.program_id(1) % blocks, tl.program_id(2).to(tl.int64)
    h0 = g * heads_per_group + block * heads_per_block
    count = tl.minimum(heads_per_block, heads_per_group - block * heads_per_block)
    start = (chunk * L).to(tl.int64)
    part = (b * (heads // heads_per_group) + g) * blocks + block
    bh = b * heads + h0
    x_ptr += b * stride_xb + start * stride_xs + h0 * stride_xh
    dy_ptr += b * stride_yb + start * stride_ys + h0 * stride_yh
    B_ptr += b * stride_Bb + start * stride_Bs + g * stride_Bg
    C_ptr += b * stride_Cb + start * stride_Cs + g * stride_Cg
    S_ptr += (bh * n_chunks + chunk) * (N * P)
    dS_ptr += (bh * n_chunks + chunk) * (N * P)
    cum_ptr += bh * s_pad + start
    cdt_ptr += bh * s_pad + start
    vec_ptr += bh * s_pad + start
    if HAS_SEG:
        seg_ptr += b * s + start
    if HAS_D:
        D_ptr += h0
    if kind == 0:
        _token_grads(x_ptr, B_ptr, C_ptr, dS_ptr, D_ptr, dy_ptr,
                     dx_ptr + b * stride_dxb + start * stride_dxs + h0 * stride_dxh,
                     dG_ptr + (part * n_chunks + chunk) * (L * L), vec_ptr, cum_ptr, cdt_ptr, seg_ptr, s_pad, n_chunks,
                     count, s - chunk * L, stride_xs, stride_xh, stride_Bs, stride_Cs, stride_ys, stride_yh, stride_dxs,
                     stride_dxh, vec_size, HAS_D, HAS_SEG, L, N, P, TOKEN_STAGES)
    else:
        n0 = (kind - 1) * BN
        _state_grads(x_ptr, B_ptr + n0, C_ptr + n0, S_ptr + n0 * P, dS_ptr + n0 * P, dy_ptr,
                     dB_ptr + (part * s + start) * N + n0, dC_ptr + (part * s + start) * N + n0,
                     vec_ptr + (1 + 2 * kind) * vec_size, sds_ptr + (bh * n_chunks + chunk) * N + n0, cum_ptr, cdt_ptr,
                     seg_ptr, s_pad, n_chunks, chunk, count, s - chunk * L, stride_xs, stride_xh, stride_Bs, stride_Cs,
                     stride_ys, stride_yh, vec_size, HAS_SEG, L, N, P, BN, STATE_STAGES)


@triton.jit
def ssd_finish(dt_ptr, bias_ptr, A_ptr, seg_ptr, vec_ptr, sds_ptr, ddt_ptr, part_ptr, s, heads, s_pad, n_chunks,
               vec_size, stride_b, stride_s, stride_h, stride_db, stride_ds, stride_dh, dt_min, HAS_BIAS: tl.constexpr,
               HAS_D: tl.constexpr, HAS_SEG: tl.constexpr, L: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
               HB: tl.constexpr):
    """ddt_raw, and per chunk the sums for dA, ddt_bias, dD: part_ptr (3, b, n_chunks, heads).

    The gradient of a_t = dt_t A sums M dM over all pairs (input s < t <= output l). From the vectors of `ssd_grads` -
    rows_l and e_l (outputs: inside the chunk, from the state on entry), q_s (inputs: inside the chunk and, f_s, to its
    end) - it is  sum(e) + <S, dS> decay + sum over j < t of (q - e - rows)_j, within t's document.  Sums of M dM that
    must cancel come from the same fp32 values, so they do. In memory: rows, q - f, those for D, and e and f of each BN.
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
    dt = tl.where(mask, tl.where(dt < dt_min, dt_min, dt), 0.0)
    A = tl.load(A_ptr + h, mask=hm, other=0.0).to(tl.float32)
    vec = vec_ptr + (b * heads + h[None, :]) * s_pad + l[:, None]
    q = tl.load(vec + vec_size, mask=mask, other=0.0)
    e = tl.zeros((L, HB), dtype=tl.float32)
    for i in tl.static_range(N // BN):
        e += tl.load(vec + (3 + 2 * i) * vec_size, mask=mask, other=0.0)
        q += tl.load(vec + (4 + 2 * i) * vec_size, mask=mask, other=0.0)
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
        tl.store(part + 2 * size, tl.sum(tl.load(vec + 2 * vec_size, mask=mask, other=0.0), 0), mask=hm)


@triton.jit
def ssd_reduce(dB_ptr, dC_ptr, dG_ptr, B_ptr, C_ptr, dB_out, dC_out, s, blocks, groups, n_chunks, stride_Bb, stride_Bs,
               stride_Bg, stride_Cb, stride_Cs, stride_Cg, stride_b, stride_s, stride_g, L: tl.constexpr,
               N: tl.constexpr, BN: tl.constexpr):
    """Sums over the blocks of heads, and dB += dG C, dC += dG^T B: (b, s, groups, N) for one chunk and BN of N."""
    chunk, b, g = tl.program_id(0), tl.program_id(2).to(tl.int64) // groups, tl.program_id(2) % groups
    r, n = tl.arange(0, L), tl.program_id(1) * BN + tl.arange(0, BN)
    l = (chunk * L + r)[:, None].to(tl.int64)
    mask = l < s
    part = tl.program_id(2).to(tl.int64) * blocks
    source = part * s * N + l * N + n[None, :]
    dB = tl.zeros((L, BN), dtype=tl.float32)
    dC = tl.zeros((L, BN), dtype=tl.float32)
    dG = tl.zeros((L, L), dtype=tl.float32)
    pairs = (part * n_chunks + chunk) * (L * L) + r[:, None] * L + r[None, :]
    for _ in range(blocks):
        dB += tl.load(dB_ptr + source, mask=mask, other=0.0)
        dC += tl.load(dC_ptr + source, mask=mask, other=0.0)
        dG += tl.load(dG_ptr + pairs)
        source += s * N
        pairs += n_chunks * (L * L)
    Bm = tl.load(B_ptr + b * stride_Bb + g * stride_Bg + l * stride_Bs + n[None, :], mask=mask, other=0.0)
    Cm = tl.load(C_ptr + b * stride_Cb + g * stride_Cg + l * stride_Cs + n[None, :], mask=mask, other=0.0)
    # in two parts, or its rounding would be the error of dB and dC where a document has few tokens
    high = dG.to(Bm.dtype)
    low = (dG - high.to(tl.float32)).to(Bm.dtype)
    dB = tl.dot(low, Cm, tl.dot(high, Cm, dB))
    dC = tl.dot(tl.trans(low), Bm, tl.dot(tl.trans(high), Bm, dC))
    to = b * stride_b + l * stride_s + g * stride_g + n[None, :]
    tl.store(dB_out + to, dB.to(dB_out.dtype.element_ty), mask=mask)
    tl.store(dC_out + to, dC.to(dC_out.dtype.element_ty), mask=mask)
