"""Kernels of `triton_attention.py`: causal attention for head dims that fused attention cannot hold (Zamba-7B: 464).

A fused kernel keeps an output row block of the whole head dim in registers. At 464 that leaves 64 rows (half of the
register file), two key/value tiles that fill shared memory, and a backward whose dK and dV do not fit at all. Here the
lower triangle of each head's score matrix goes through memory instead, as 128 x 256 bf16 tiles, so that every product
is a plain matrix product with large tiles, and the backward needs five of them and recomputes nothing twice:

    forward   scores: E = exp2(S - m), m the row's maximum in the tile rounded up, row sums   stats: lse, 2^(m - max)
              product: O = (2^(m - max) E) V / sum       (powers of two: the second scaling is exact in bf16)
    backward  delta = sum(dO O)   scores: P and dS       product: dV = P^T dO, dK = dS^T Q, dQ = dS K

Limits for 16 heads x 464, s 4096, causal (one product is 129 GFLOP with the tiles on the diagonal, 142 where 464 is
padded to 512), at 690 TFLOP/s: forward 271 GFLOP, 0.39 ms; backward 684 GFLOP, 0.99 ms. Score tiles: 277 MB each of
E, P, dS, written once and read once (dS twice): 0.13 ms forward, 0.32 ms backward at 4.3 TB/s, beside the products.
Prediction before the first run (H200): 0.6 ms forward, 1.5 ms backward. Measured there (benchmarks/kernels.py): 0.75
and 1.65 ms. Tiles of 128 x 128 took 0.45 ms for the forward `scores`, 128 x 256 take 0.40: its limit is reading shared
tiles from the L2 cache, then the stores of E, P, dS.
"""

# fmt: off
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEGATIVE = tl.constexpr(-1.0e30)


@triton.jit
def _row_start(i):
    """Pairs of tiles before row block i: row blocks 0, 1 have one pair each, 2, 3 two, ..."""
    h = i // 2
    return (h + i % 2) * (h + 1)


@triton.jit
def attention_scores(a_ptr, b_ptr, lse_ptr, delta_ptr, seg_ptr, e_ptr, ds_ptr, max_ptr, sum_ptr, s, heads, first,
                     pairs, scale, stride_ab, stride_as, stride_ah, stride_bb, stride_bs, stride_bh,
                     MODE: tl.constexpr, HAS_SEG: tl.constexpr, D: tl.constexpr, TAIL: tl.constexpr, T: tl.constexpr,
                     BK: tl.constexpr, STAGES: tl.constexpr):
    """One pair of tiles (T x 2T) of one head (heads first, first + 1, ... of the flattened (b, heads)).

    MODE 0: a = q, b = k, E into e_ptr, with max_ptr, lse_ptr (sums), sum_ptr (sums of the rounded E), all (pair, T);
    1: the same, P into e_ptr; 2: a = dO, b = v, P from e_ptr, scale dS into ds_ptr.
    """
    W: tl.constexpr = 2 * T
    i, j = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    if 2 * j > i:
        return
    at = first + tl.program_id(2)
    b, h = (at // heads).to(tl.int64), at % heads
    pair = tl.program_id(2).to(tl.int64) * pairs + _row_start(i) + j
    r, c, d = tl.arange(0, T), tl.arange(0, W), tl.arange(0, BK)
    row, col = i * T + r, j * W + c
    a_ptr += b * stride_ab + h * stride_ah + (i * T).to(tl.int64) * stride_as
    b_ptr += b * stride_bb + h * stride_bh + (j * W).to(tl.int64) * stride_bs
    mask_r, mask_c = (row < s)[:, None], (col < s)[:, None]
    S = tl.zeros((T, W), dtype=tl.float32)
    for d0 in tl.range(0, D // BK * BK, BK, num_stages=STAGES):
        x = tl.load(a_ptr + d0 + (r[:, None] * stride_as + d[None, :]), mask=mask_r, other=0.0)
        y = tl.load(b_ptr + d0 + (c[:, None] * stride_bs + d[None, :]), mask=mask_c, other=0.0)
        S = tl.dot(x, tl.trans(y), S)
    if TAIL > 0:
        d = D // BK * BK + tl.arange(0, TAIL)
        if D // BK * BK + TAIL > D:
            mask_r = mask_r & (d < D)[None, :]
            mask_c = mask_c & (d < D)[None, :]
        x = tl.load(a_ptr + (r[:, None] * stride_as + d[None, :]), mask=mask_r, other=0.0)
        y = tl.load(b_ptr + (c[:, None] * stride_bs + d[None, :]), mask=mask_c, other=0.0)
        S = tl.dot(x, tl.trans(y), S)
    out = pair * (T * W) + (r[:, None] * W + c[None, :])
    if MODE == 2:
        delta = tl.load(delta_ptr + at.to(tl.int64) * s + row, mask=row < s, other=0.0)
        dS = tl.load(e_ptr + out).to(tl.float32) * ((S - delta[:, None]) * scale)
        tl.store(ds_ptr + out, dS.to(ds_ptr.dtype.element_ty))
    else:
        keep = row[:, None] >= col[None, :]
        if HAS_SEG:
            seg_r = tl.load(seg_ptr + b * s + row, mask=row < s, other=-1)
            seg_c = tl.load(seg_ptr + b * s + col, mask=col < s, other=-2)
            keep = keep & (seg_r[:, None] == seg_c[None, :])
        S = tl.where(keep, S * (scale * LOG2E), float("-inf"))
        if MODE == 1:
            lse = tl.load(lse_ptr + at.to(tl.int64) * s + row, mask=row < s, other=0.0)
            tl.store(e_ptr + out, tl.exp2(S - lse[:, None]).to(e_ptr.dtype.element_ty))
        else:
            m = tl.ceil(tl.maximum(tl.max(S, 1), NEGATIVE))
            E = tl.exp2(S - m[:, None])
            tl.store(max_ptr + pair * T + r, m)
            tl.store(lse_ptr + pair * T + r, tl.sum(E, 1))
            E = E.to(e_ptr.dtype.element_ty)  # the output is divided by the sum of what it is made of
            tl.store(sum_ptr + pair * T + r, tl.sum(E.to(tl.float32), 1))
            tl.store(e_ptr + out, E)


@triton.jit
def attention_stats(max_ptr, exact_ptr, sum_ptr, lse_ptr, s, first, pairs, T: tl.constexpr):
    """lse (flattened (b, heads), s) in log2 units; max_ptr becomes 2^(pair max - row max), sum_ptr's first 1/sum."""
    i = tl.program_id(0)
    r = tl.arange(0, T)
    row = (tl.program_id(1).to(tl.int64) * pairs + _row_start(i)) * T + r
    m = tl.full((T,), NEGATIVE, dtype=tl.float32)
    for j in range(i // 2 + 1):
        m = tl.maximum(m, tl.load(max_ptr + row + j * T))
    total = tl.zeros((T,), dtype=tl.float32)
    exact = tl.zeros((T,), dtype=tl.float32)
    for j in range(i // 2 + 1):
        factor = tl.exp2(tl.load(max_ptr + row + j * T) - m)
        total += tl.load(sum_ptr + row + j * T) * factor
        exact += tl.load(exact_ptr + row + j * T) * factor
        tl.store(max_ptr + row + j * T, factor)
    tl.store(sum_ptr + row, 1.0 / total)
    tl.store(lse_ptr + (first + tl.program_id(1)).to(tl.int64) * s + i * T + r, m + tl.log2(exact), mask=i * T + r < s)


@triton.jit
def attention_delta(o_ptr, do_ptr, delta_ptr, s, heads, stride_ob, stride_os, stride_oh, stride_db, stride_ds,
                    stride_dh, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr):
    at = tl.program_id(1).to(tl.int64)
    b, h = at // heads, at % heads
    row = tl.program_id(0) * R + tl.arange(0, R)
    d = tl.arange(0, DP)
    mask = (row < s)[:, None] & (d < D)[None, :]
    r64 = row[:, None].to(tl.int64)
    o = tl.load(o_ptr + b * stride_ob + h * stride_oh + r64 * stride_os + d[None, :], mask=mask, other=0.0)
    do = tl.load(do_ptr + b * stride_db + h * stride_dh + r64 * stride_ds + d[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + at * s + row, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=row < s)


@triton.jit
def attention_product(e_ptr, x_ptr, out_ptr, max_ptr, sum_ptr, s, heads, first, tiles, pairs, stride_xb, stride_xs,
                      stride_xh, stride_ob, stride_os, stride_oh, TRANSPOSED: tl.constexpr, SCALED: tl.constexpr,
                      D: tl.constexpr, T: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """out row block = sum over tiles of tile @ x rows; TRANSPOSED: of tile^T, over the tiles below in its column."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    # the longest sums first: low rows of the triangle, or its left columns
    i = tl.program_id(1) if TRANSPOSED else tiles - 1 - tl.program_id(1)
    at = first + tl.program_id(2)
    b, h = (at // heads).to(tl.int64), at % heads
    r, kk = tl.arange(0, T), tl.arange(0, BK)
    base = tl.program_id(2).to(tl.int64) * pairs
    x_ptr += b * stride_xb + h * stride_xh
    acc = tl.zeros((T, BD), dtype=tl.float32)
    PARTS: tl.constexpr = T // BK
    W: tl.constexpr = 2 * T
    first_part = i * PARTS if TRANSPOSED else 0
    last_part = tiles * PARTS if TRANSPOSED else (i + 1) * PARTS
    for part in tl.range(first_part, last_part, num_stages=STAGES):
        if TRANSPOSED:
            j, offset = part // PARTS, (part % PARTS) * BK
            tile = e_ptr + (base + _row_start(j) + i // 2) * (T * W) + offset * W + (i % 2) * T
            a = tl.trans(tl.load(tile + (kk[:, None] * W + r[None, :])))
        else:
            pair = base + _row_start(i) + part // (2 * PARTS)
            a = tl.load(e_ptr + pair * (T * W) + part % (2 * PARTS) * BK + (r[:, None] * W + kk[None, :]))
            if SCALED:
                a = (a * tl.load(max_ptr + pair * T + r)[:, None]).to(e_ptr.dtype.element_ty)
        rows = part * BK + kk
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xs + d[None, :],
                    mask=(rows < s)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(a, x, acc)
    if SCALED:
        acc *= tl.load(sum_ptr + (base + _row_start(i)) * T + r)[:, None]
    rows = i * T + r
    tl.store(out_ptr + b * stride_ob + h * stride_oh + rows[:, None].to(tl.int64) * stride_os + d[None, :],
             acc.to(out_ptr.dtype.element_ty), mask=(rows < s)[:, None] & (d < D)[None, :])
