"""Time of one step on Hopper GPUs, estimated from the config alone, to tell layouts apart; torch is not imported.

What a GPU does is counted (matrix products, attention, mixers, what is computed again, transfers, the update) and
divided by the rates below. Those of one GPU and of two tensor-parallel ones were measured (docs/performance.md):
forward and backward of the four released models come out within 6 %, tensor parallel 2 of the two smaller ones within
2 %. Those of data-parallel links are what such links usually give, and wider tensor parallelism has not been measured:
of two layouts within 10 %, try both (benchmarks/train.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from model.config import ModelConfig
from model.flops import flops_breakdown
from train.config import RunConfig
from train.memory import local_parameters

PRODUCTS = 700e12
"""FLOP/s of matrix products of unbounded width in bfloat16, at the clocks that an H100 has in a step; of width
w they have w / (w + NARROW) of it."""
NARROW = 60
SCORES = 280e12
"""FLOP/s of attention's two causal products, forward and backward together."""
MIXER = {"zamba2": 30e-12, "zamba": 48e-12}
"""Seconds for a channel and token: convolution, scan and gate, forward and backward, without the projections. Fitted to
whole steps, in which less of these means slower products, by the clock."""
SCAN_STEP = 0.145e-6
"""Seconds a position that the scan of `zamba` takes at least, forward and backward, however few channels there are."""
STREAM = 10e-12
"""Seconds for a value of the residual stream in a sublayer: norms, sums."""
FORWARD = {"products": 1 / 3, "scores": 1 / 3.5, "zamba": 0.32, "zamba2": 0.35, "stream": 0.3}
"""Of these, the share of the forward pass; of the mixers by the kernels in docs/performance.md: 0.31 of the selective
scan, 0.44 of the convolution, 0.34 of the gated norm, a third of SSD by its bytes."""
LAUNCH = (2.4e-3, 3.1e-3)
"""Seconds of Python for a sublayer's forward and backward pass without a CUDA graph: no tensor parallelism, with it."""
COPY = 3.0e12
"""Bytes/s of the GPU's memory in the optimizer's update."""
NODE, NETWORK = 300e9, 45e9
"""Bytes/s a GPU sends in a collective within a node of eight (NVLink) and across nodes (400 Gb/s a GPU)."""
LATENCY = 15e-6
"""Seconds of a collective of no bytes."""
REDUCE, REDUCE_WAIT = 200e9, 0.2e-3
"""Of an all-reduce by NCCL, as tensor parallelism without sequence parallelism has them: bytes/s that a GPU sends in
each of its halves, and seconds beside."""
TENSOR, TENSOR_WAIT = 370e9, 0.385e-3
"""What tensor parallelism adds to a sublayer, forward and backward, by measurements of two sizes: seconds (the second),
and the time of sending its rows once at so many bytes/s (the first). Transfers are hidden behind products, but ranks
wait for each other, and the kernels are narrower."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part; their sum is the step.

    compute: forward and backward of all micro-batches. recompute: what is computed again in them. tensor: what
    tensor parallelism adds to them. launch: what the GPU waits for Python, nothing in a CUDA graph.
    data: reduce-scatter of the gradients and all-gather of the weights. update: AdamW.
    """

    compute: float
    recompute: float
    tensor: float
    launch: float
    data: float
    update: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def step_time(config: RunConfig, data: int) -> StepTime:
    """Seconds of a step of a run with `data` data-parallel ranks."""
    model, tensor = config.model, config.parallel.tensor
    micro_batches = config.global_batch_size // data // config.micro_batch_size
    tokens = config.micro_batch_size * config.sequence_length
    sublayers = model.num_layers + 2 * model.num_calls
    kinds = _seconds(model, config.sequence_length, tokens, tensor)
    compute = sum(sum(parts.values()) for parts in kinds.values())
    again = sum(_again(kinds[kind]) for kind in config.recompute)
    split = _tensor_parallelism(model, tokens, tensor, config.parallel.sequence) * sublayers
    # A kind that is computed again is launched again: a forward pass is about a third of a sublayer's launches.
    repeated = {"mamba": model.num_layers, "attention": model.num_calls, "mlp": model.num_calls}
    launched = LAUNCH[tensor > 1] * (sublayers + sum(repeated[kind] for kind in config.recompute) / 3)
    if config.cuda_graph:
        launched = 0.0
    local = local_parameters(config)
    link = NODE if data * tensor <= 8 else NETWORK
    moved = (4 + 2) * local * (data - 1) / data
    return StepTime(
        compute=micro_batches * compute,
        recompute=micro_batches * again,
        tensor=micro_batches * split,
        launch=micro_batches * max(0.0, launched - compute - again - split),
        data=moved / link + 2 * LATENCY * (data > 1),
        # Masters, moments and gradients are read, all but the last written; the weights; gradients are zeroed.
        update=((4 * 4 + 3 * 4) * local / data + (2 + 4) * local) / COPY,
    )


def tokens_per_second(config: RunConfig, data: int) -> float:
    """Tokens/s of one GPU."""
    return config.tokens_per_step / step_time(config, data).total / (data * config.parallel.tensor)


def _seconds(model: ModelConfig, length: int, tokens: int, tensor: int) -> dict[str, dict[str, float]]:
    """Forward and backward of a micro-batch on one rank, by kind of sublayer and by what takes the time."""
    flops = {name: value * tokens / tensor for name, value in flops_breakdown(model, length).items()}
    width = min(model.hidden_size, model.d_inner / tensor)
    rate = PRODUCTS * width / (width + NARROW)
    stream = STREAM * tokens * model.hidden_size / tensor
    mixer = MIXER[model.family] * tokens * model.d_inner / tensor
    if model.family == "zamba":
        mixer = max(mixer, SCAN_STEP * length)
    return {
        "mamba": {
            "products": flops["mamba"] / rate,
            model.family: model.num_layers * mixer,
            "stream": model.num_layers * stream,
        },
        "attention": {
            "products": flops["attention"] / rate,
            "scores": flops["scores"] / SCORES,
            "stream": model.num_calls * stream,
        },
        "mlp": {"products": (flops["mlp"] + flops["adapters"]) / rate, "stream": model.num_calls * stream},
        "rest": {"products": (flops["bridge"] + flops["head"]) / rate},
    }


def _again(parts: dict[str, float]) -> float:
    """The forward pass of a sublayer without its last product, whose result backward does not need (about a third)."""
    return sum(FORWARD[name] * seconds * (2 / 3 if name == "products" else 1) for name, seconds in parts.items())


def _tensor_parallelism(model: ModelConfig, tokens: int, tensor: int, sequence: bool) -> float:
    """Seconds that it adds to a sublayer."""
    if tensor == 1:
        return 0.0
    sent = 2 * tokens * model.hidden_size * (tensor - 1) / tensor
    if not sequence:  # one all-reduce forward, and one backward, beside which products take longer
        return 2 * (REDUCE_WAIT + 2 * sent / REDUCE)
    # More ranks cut products into more parts and wait for more others: a guess, since none of that was measured.
    return TENSOR_WAIT * tensor / 2 + sent / TENSOR
