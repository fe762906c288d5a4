"""Own kernels, their peer and their limit, in one run.

    python -m benchmarks.kernels [--op NAME ...]

Shapes are those of the released models at sequence 4096, and of their tensor-parallel ranks. Times in ms: `forward` and
`both` (forward + backward) are medians by events, as a caller sees them, launch costs included; `kernels` is the sum of
the GPU times of both by the profiler. The limit is the larger of bytes over the measured copy bandwidth and arithmetic
over the measured matrix rate (special functions over 16 a clock and multiprocessor for the selective scan), each input
and output once, workspaces and recomputation not counted; of norms, conv and activations it is bytes.
"""

import argparse
import importlib.util

import torch
import triton

S = 4096


def randn(*shape):
    """(1, s, ...) as the model has it, a view of (s, 1, ...)."""
    return torch.randn(S, 1, *shape, device="cuda", dtype=torch.bfloat16).transpose(0, 1).requires_grad_()


def uniform(low, high, *shape):
    return torch.empty(*shape, device="cuda").uniform_(low, high).requires_grad_()


def weights(*shape):
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).uniform_(-1, 1).requires_grad_()


def median(function):
    return triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median")


def kernel_time(function, runs=5):
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(runs):
            function()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / runs / 1e3


def rates():
    """Measured copy bandwidth (bytes/s) and bf16 matrix rate (FLOP/s) on random data, and exp2 a second."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / (median(lambda: a @ b) * 1e-3)
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    to = torch.empty_like(big)
    properties = torch.cuda.get_device_properties(0)
    special = 16 * properties.multi_processor_count * getattr(properties, "clock_rate", 1755000) * 1e3
    return 2 * big.numel() / (median(lambda: to.copy_(big)) * 1e-3), matmul, special


def row(label, ours, peer, inputs, limits):
    several = lambda outs: outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.randn_like(out) for out in several(ours(*inputs))]

    def both(function):
        return lambda: torch.autograd.grad(several(function(*inputs)), inputs, grads)

    cells = [median(lambda: ours(*inputs)), median(both(ours)), kernel_time(both(ours))]
    if peer is not None:
        cells += [median(lambda: peer(*inputs)), median(both(peer)), kernel_time(both(peer))]
    text = "".join(f"{cell:9.3f}" for cell in cells) + " " * 9 * (6 - len(cells))
    print(f"{label:34s}{text}{max(limits):9.3f}", flush=True)


def header(title, peer):
    print(f"\n{title} (peer: {peer})")
    print(f"{'':34s}{'forward':>9s}{'both':>9s}{'kernels':>9s}{'peer fwd':>9s}{'both':>9s}{'kernels':>9s}{'limit':>9s}")


def ssd(bandwidth, matmul, special):
    from model.kernels.ssd.triton_ssd import ssd_triton

    peer = None
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        def peer(x, dt, A, B, C, D, bias):
            return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256, D=D, dt_bias=bias, dt_softplus=True)

    header("SSD, heads x 64 / state / groups", "mamba-ssm, chunk 256")
    shapes = [
        ("Zamba2-7B", 112, 64, 2),
        ("Zamba2-7B, TP 2", 56, 64, 1),
        ("Zamba2-7B, TP 4", 28, 64, 1),
        ("Zamba2-2.7B", 80, 64, 1),
        ("Zamba2-2.7B, TP 2", 40, 64, 1),
        ("Zamba2-2.7B, TP 4", 20, 64, 1),
        ("Zamba2-1.2B", 64, 128, 1),
        ("Zamba2-1.2B, TP 2", 32, 128, 1),
        ("Zamba2-1.2B, TP 4", 16, 128, 1),
    ]
    for name, heads, state, groups in shapes:
        inputs = [
            randn(heads, 64),
            randn(heads),
            (-uniform(1, 16, heads)).detach().requires_grad_(),
            randn(groups, state),
            randn(groups, state),
            uniform(1, 1, heads),
            uniform(-6, -2, heads),
        ]
        # x, y forward; x, dy, dx backward. Products with chunks of 64: 3 of 64 x 64 x state or P a head, 5 backward
        size = S * heads * 64 * 2
        flops = S * heads * 2 * 64 * (64 + 2 * state + 64 * 2 + 3 * state + state)
        row(
            f"{name}: {heads} / {state} / {groups}",
            ssd_triton,
            peer,
            inputs,
            [5e3 * size / bandwidth, 1e3 * flops / matmul],
        )


def selective_scan(bandwidth, matmul, special):
    from model.kernels.selective_scan.cuda_scan import selective_scan_cuda

    peer = None
    if importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        def peer(x, dt, A, B, C, D, z, bias):
            x, dt, z = (t.transpose(1, 2).contiguous() for t in (x, dt, z))
            B, C = (t.permute(0, 2, 3, 1).contiguous() for t in (B, C))
            return selective_scan_fn(x, dt, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)

    header("Selective scan, channels / heads", "mamba-ssm, transposes to its layout included")
    for name, channels, heads in [("Zamba-7B", 7424, 2), ("Zamba-7B, TP 2", 3712, 1), ("Zamba-7B, TP 4", 1856, 1)]:
        A = -torch.arange(1.0, 17.0, device="cuda").repeat(channels, 1)
        inputs = [
            randn(channels),
            randn(channels),
            A.requires_grad_(),
            randn(heads, 16),
            randn(heads, 16),
            uniform(1, 1, channels),
            randn(channels),
            uniform(-6, -2, channels),
        ]
        size = S * channels * 2  # forward x, dt, z, y; backward these, dy, dx, ddt, dz; the states, of two, each way
        row(
            f"{name}: {channels} / {heads}",
            selective_scan_cuda,
            peer,
            inputs,
            [16e3 * size / bandwidth, 2e3 * S * channels * 16 / special],
        )


def attention(bandwidth, matmul, special):
    from model.kernels.attention.triton_attention import attention_triton

    scale = 232**-0.5

    def peer(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return out.transpose(1, 2)

    header("Causal attention, head dim 464", "torch, memory-efficient")
    for name, heads in [("Zamba-7B", 16), ("Zamba-7B, TP 2", 8), ("Zamba-7B, TP 4", 4)]:
        inputs = [randn(heads, 464) for _ in range(3)]
        row(
            f"{name}: {heads} heads",
            lambda q, k, v: attention_triton(q, k, v, scale),
            peer,
            inputs,
            [1e3 * 7 * S * S * 464 * heads / matmul],
        )


def bytes_bound(name, function, peer, inputs, count, bandwidth):
    """A row of an operation that only moves memory: `count` bytes, forward and backward together."""
    row(name, function, peer, inputs, [1e3 * count / bandwidth])


def conv(bandwidth, matmul, special):
    from model.kernels.causal_conv1d.triton_causal_conv1d import causal_conv1d

    peer = None
    if importlib.util.find_spec("causal_conv1d"):
        from causal_conv1d import causal_conv1d_fn

        def peer(x, weight, bias):
            return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    header("Convolution with SiLU, channels", "causal-conv1d")
    inputs = [randn(7424), weights(7424, 4), weights(7424)]
    bytes_bound("7424", causal_conv1d, peer, inputs, 5 * S * 7424 * 2, bandwidth)


def gated_norm(bandwidth, matmul, special):
    from model.kernels.gated_norm.triton_gated_norm import gated_norm as ours

    header("Gated norm, width / groups", "mamba-ssm")
    for width, groups in ((7168, 2), (5120, 1), (4096, 1)):
        peer = None
        if importlib.util.find_spec("mamba_ssm"):
            from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

            def peer(x, z, weight, size=width // groups):
                return rmsnorm_fn(x, weight, None, z=z, eps=1e-5, group_size=size, norm_before_gate=False)

        function = lambda x, z, weight, groups=groups: ours(x, z, weight, 1e-5, groups)
        inputs = [randn(width), randn(width), weights(width)]
        bytes_bound(f"{width} / {groups}", function, peer, inputs, 8 * S * width * 2, bandwidth)


def rms_norm(bandwidth, matmul, special):
    from model.kernels.rms_norm.triton_rms_norm import rms_norm as ours

    header("RMSNorm, width", "torch")
    peer = lambda x, weight: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-5)
    for width in (3712, 2560, 2048):
        inputs = [randn(width), weights(width)]
        bytes_bound(str(width), lambda x, weight: ours(x, weight, 1e-5), peer, inputs, 5 * S * width * 2, bandwidth)


def residual_norm(bandwidth, matmul, special):
    from model.kernels.residual_norm.reference import residual_norm as peer
    from model.kernels.residual_norm.triton_residual_norm import residual_norm as ours

    header("RMSNorm beside the residual stream, width", "torch")
    for width in (3712, 3584, 2560, 2048):
        inputs = [randn(width), weights(width)]
        mine, theirs = (lambda x, weight, norm=norm: norm(x, weight, 1e-5) for norm in (ours, peer))
        bytes_bound(str(width), mine, theirs, inputs, 6 * S * width * 2, bandwidth)


def qkv(bandwidth, matmul, special):
    """Without low-rank terms, which would add up over the runs: ours writes over its input."""
    from model.kernels.qkv import rope_tables
    from model.kernels.qkv.reference import qkv as peer
    from model.kernels.qkv.triton_qkv import qkv as ours

    header("q, k, v of a projection, rotated, heads x head dim", "torch")
    for heads, head_dim in ((32, 224), (32, 128)):
        packed = torch.randn(S, 1, 3 * heads * head_dim, device="cuda", dtype=torch.bfloat16).requires_grad_()
        tables = rope_tables(S, head_dim, 10000.0, packed)
        mine, theirs = (lambda packed, f=f, d=head_dim, tables=tables: f(packed, d, *tables) for f in (ours, peer))
        bytes_bound(f"{heads} x {head_dim}", mine, theirs, [packed], 10 * S * heads * head_dim * 2, bandwidth)


def geglu(bandwidth, matmul, special):
    from model.kernels.geglu.reference import geglu as peer
    from model.kernels.geglu.triton_geglu import geglu as ours

    header("MLP activation, width", "torch")
    for width in (14336, 8192):
        bytes_bound(str(width), ours, peer, [randn(2 * width)], 8 * S * width * 2, bandwidth)


def cross_entropy(bandwidth, matmul, special):
    """Forward only: the backward pass writes over the logits, and so works once."""
    from model.kernels.cross_entropy.triton_cross_entropy import cross_entropy as ours

    header("Cross entropy, vocabulary (forward)", "torch")
    logits, ids = randn(32000).detach(), torch.randint(0, 32000, (1, S), device="cuda")
    peer = lambda: torch.nn.functional.cross_entropy(logits[0].float(), ids[0], reduction="none")
    times = [median(lambda: ours(logits, ids)), median(peer)]
    limit = 1e3 * S * 32000 * 2 / bandwidth
    print(f"{'32000':34s}{times[0]:9.3f}{'':18s}{times[1]:9.3f}{'':18s}{limit:9.3f}", flush=True)


OPS = {
    "ssd": ssd,
    "selective_scan": selective_scan,
    "attention": attention,
    "conv": conv,
    "gated_norm": gated_norm,
    "rms_norm": rms_norm,
    "residual_norm": residual_norm,
    "qkv": qkv,
    "geglu": geglu,
    "cross_entropy": cross_entropy,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", choices=OPS, action="append", help="default: all")
    names = parser.parse_args().op or list(OPS)
    torch.manual_seed(0)
    measured = rates()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; "
        f"copy {measured[0] / 1e12:.2f} TB/s, bf16 8192 cubed {measured[1] / 1e12:.0f} TFLOP/s; "
        f"batch 1, sequence {S}, bf16; ms"
    )
    for name in names:
        OPS[name](*measured)


if __name__ == "__main__":
    main()
