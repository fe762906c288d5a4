"""Causal attention with Triton kernels for head dims beyond 256: the public function and its autograd node. The
method, its limits and the kernels are in `triton_attention_kernels.py`."""

import torch
import triton

from model.kernels.attention import triton_attention_kernels as kernels
from model.kernels.launch import empty_like_layout, segments, shared_memory
from model.score_tiles import TILE, turns


def _stages(x):
    """Four, or as many as an older GPU's shared memory holds: before Hopper they take at most 149, 100 and 50 KB."""
    return 4 if (bytes := shared_memory(x)) >= 150_000 else 3 if bytes >= 99_400 else 2


class _Attention(torch.autograd.Function):
    # Launch settings, chosen by measurement on an H200 (benchmarks/kernels.py).
    scores_config = {"BK": 64, "num_warps": 8}
    product_config = {"BD": 256, "BK": 64, "num_warps": 8}

    @staticmethod
    def _turns(q, kinds):
        """Tiles, score tiles of a head, heads at once, and (first head, heads) of each turn."""
        b, s, heads = q.shape[:3]
        found = turns(s, b * heads, kinds, q.element_size())
        each = [(i, min(found.heads, b * heads - i)) for i in range(0, b * heads, found.heads)]
        return found.tiles, found.pairs, found.heads, each

    @staticmethod
    def _product(sizes, e, x, out, stats, first, count, transposed):
        config = dict(_Attention.product_config)
        bd = min(config.pop("BD"), triton.next_power_of_2(x.shape[-1]))
        maxima, sums = (e, e) if stats is None else stats
        kernels.attention_product[(triton.cdiv(x.shape[-1], bd), sizes[0], count)](
            e,
            x,
            out,
            maxima,
            sums,
            x.shape[1],
            x.shape[2],
            first,
            *sizes,
            *x.stride()[:3],
            *out.stride()[:3],
            TRANSPOSED=transposed,
            SCALED=stats is not None,
            D=x.shape[-1],
            T=TILE,
            BD=bd,
            STAGES=_stages(x),
            **config,
        )

    @staticmethod
    def _scores(mode, sizes, a, b, lse, delta, seg, e, ds, maxima, sums, first, count, scale):
        config = _Attention.scores_config
        D = a.shape[-1]
        tail = D % config["BK"] and max(16, triton.next_power_of_2(D % config["BK"]))
        kernels.attention_scores[(sizes[0], triton.cdiv(sizes[0], 2), count)](
            a,
            b,
            lse,
            delta,
            lse if seg is None else seg,
            e,
            ds,
            maxima,
            sums,
            a.shape[1],
            a.shape[2],
            first,
            sizes[1],
            scale,
            *a.stride()[:3],
            *b.stride()[:3],
            MODE=mode,
            HAS_SEG=seg is not None,
            D=D,
            TAIL=tail,
            T=TILE,
            STAGES=_stages(a),
            **config,
        )

    @staticmethod
    def forward(ctx, q, k, v, scale, seq_idx):
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        b, s, heads = q.shape[:3]
        seg = segments(seq_idx)
        *sizes, at_once, turns = _Attention._turns(q, 1)
        e = torch.empty((at_once, sizes[1], TILE, 2 * TILE), dtype=q.dtype, device=q.device)
        stats = torch.empty((3, at_once, sizes[1], TILE), dtype=torch.float32, device=q.device)
        lse = torch.empty((b * heads, s), dtype=torch.float32, device=q.device)
        o = empty_like_layout(q)
        for first, count in turns:
            _Attention._scores(0, sizes, q, k, stats[2], lse, seg, e, e, stats[0], stats[1], first, count, scale)
            kernels.attention_stats[(sizes[0], count)](
                stats[0], stats[2], stats[1], lse, s, first, sizes[1], T=TILE, num_warps=4
            )
            _Attention._product(sizes, e, v, o, stats[:2], first, count, False)
        ctx.save_for_backward(q, k, v, o, lse, seg)
        ctx.scale = scale
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, seg = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        b, s, heads, D = q.shape
        *sizes, at_once, turns = _Attention._turns(q, 2)
        p, ds = torch.empty((2, at_once, sizes[1], TILE, 2 * TILE), dtype=q.dtype, device=q.device)
        delta = torch.empty_like(lse)
        kernels.attention_delta[(triton.cdiv(s, 8), b * heads)](
            o,
            do,
            delta,
            s,
            heads,
            *o.stride()[:3],
            *do.stride()[:3],
            D=D,
            DP=triton.next_power_of_2(D),
            R=8,
            num_warps=4,
        )
        # side by side, as their projection's backward product wants them (model/kernels/qkv)
        dq, dk, dv = empty_like_layout(q, (b, s, 3 * heads, D)).split(heads, 2)
        for first, count in turns:
            _Attention._scores(1, sizes, q, k, lse, delta, seg, p, ds, delta, delta, first, count, ctx.scale)
            _Attention._scores(2, sizes, do, v, lse, delta, seg, p, ds, delta, delta, first, count, ctx.scale)
            _Attention._product(sizes, p, do, dv, None, first, count, True)
            _Attention._product(sizes, ds, q, dk, None, first, count, True)
            _Attention._product(sizes, ds, k, dq, None, first, count, False)
        return dq, dk, dv, None, None


def attention_triton(q, k, v, scale, seq_idx=None):
    """softmax(scale q k^T, causal) v: (b, s, heads, D) in q's type and batch/time memory order.

    q, k, v: (b, s, heads, D), equal shapes, any D, free leading strides; seq_idx: (b, s) integers, a position sees
    only the run of equal values it lies in. Products in the inputs' type with fp32 sums, softmax in fp32; no atomics:
    repeats bit for bit. Needs 600 MiB of workspace at most, or one head's scores where they are more (at 32k: 2.2 GB).
    Raises ValueError for unequal shapes.
    """
    if not q.shape == k.shape == v.shape:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be equal")
    return _Attention.apply(q, k, v, scale, seq_idx)
