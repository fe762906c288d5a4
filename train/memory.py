"""Memory of one GPU, estimated from the config alone; torch is not imported.

The peak of a training step: what is always there (weights, gradient sums, optimizer), the activations that the
forward pass of one micro-batch keeps, and the largest of what comes and goes on top of them. The count assumes the
fused kernels; the plain torch references keep more. A CUDA graph (train/graph.py) adds nothing: what it keeps from step
to step is the activations' memory, and evaluations get that back.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from model.placement import placements
from model.score_tiles import turns
from train.config import RunConfig

_CONTEXT = 3 * 2**29
"""The CUDA context, NCCL's buffers and fragmentation, 1.5 GiB."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part; their sum is the peak of what torch allocates.

    weights: in the compute type. gradients: the float32 sums, not sharded over data-parallel ranks.
    optimizer: float32 masters and two moments, a data-parallel rank's share.
    stream: the residual stream and what the norms keep. mamba, attention, mlp: what those layers keep.
    logits: the head's output and the loss. workspace: what backward needs beyond that, when the logits are gone.
    """

    weights: int
    gradients: int
    optimizer: int
    stream: int
    mamba: int
    attention: int
    mlp: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @property
    def activations(self) -> int:
        return self.stream + self.mamba + self.attention + self.mlp


@dataclass(frozen=True)
class Widths:
    """Values per token of the micro-batch that one rank keeps for one layer of each kind, in the compute type.

    stream: of the residual stream between layers. The others: within a sublayer when nothing is recomputed.
    """

    stream: float
    mamba: float
    attention: float
    mlp: float


def local_parameters(config: RunConfig) -> int:
    """Parameters of one tensor-parallel rank."""
    tensor = config.parallel.tensor
    return sum(math.prod(placement.local_shape(tensor)) for placement in placements(config.model, tensor).values())


def widths(config: RunConfig) -> Widths:
    """What one layer of each kind keeps per token (see `Widths`)."""
    model, tensor = config.model, config.parallel.tensor
    rows = tensor if config.parallel.sequence else 1
    hidden, inner, rank = model.hidden_size, model.d_inner / tensor, model.adapter_rank
    heads = model.mamba.num_heads / tensor
    stream = hidden / rows
    if model.family == "zamba2":
        states = max(model.mamba.ngroups // tensor, 1) * model.mamba.d_state
        # What the norm, the projection (z, x, B, C, dt), the convolution, the scan and the gated norm give.
        mamba = stream + 2 * inner + 2 * states + heads + inner + 2 * states + 2 * inner
    else:
        select = max(model.mamba.num_heads // tensor, 1) * (model.mamba.dt_rank + 2 * model.mamba.d_state)
        # What the norm, the projection (x, z) and the convolution give; dt's source, B, C; dt; the scan, and its states
        # (16 a channel, every 8 positions).
        mamba = stream + 2 * inner + inner + select + inner + inner + 2 * inner
    wide = 2 * hidden
    # What the norm and the projection give, which adapters and rotation write over; the output.
    attention = wide / rows + (3 + 1) * wide / tensor
    mlp = stream + 3 * model.intermediate_size / tensor
    if "attention" in model.adapters:
        attention += 3 * rank
    if "mlp" in model.adapters:
        mlp += rank
    return Widths(stream, mamba, attention, mlp)


def estimate(config: RunConfig, data: int) -> Memory:
    """The memory of one GPU of a run with `data` data-parallel ranks."""
    model, tensor = config.model, config.parallel.tensor
    size = 2 if config.precision.compute == "bfloat16" else 4
    tokens = config.micro_batch_size * config.sequence_length
    value = tokens * size
    width, again = widths(config), set(config.recompute)
    calls, layers = model.num_calls, model.num_layers
    parameters = local_parameters(config)

    # The norms' inputs: of each mixer, attention, MLP and of the head; the bridges' inputs; the head's input.
    streams = layers + 3 * calls + 2
    kept = {
        "mamba": layers * width.mamba,
        "attention": calls * width.attention,
        "mlp": calls * width.mlp,
    }
    # The logits, over which the loss writes their gradient (in float32 it keeps more); that of the head's input.
    rest = 0 if size == 2 else 8
    logits = tokens * model.vocab_size / tensor * (size + rest) + value * model.hidden_size
    return Memory(
        weights=size * parameters,
        gradients=4 * parameters,
        optimizer=-(-12 * parameters // data),
        stream=round(value * streams * width.stream),
        mamba=0 if "mamba" in again else round(value * kept["mamba"]),
        attention=0 if "attention" in again else round(value * kept["attention"]),
        mlp=0 if "mlp" in again else round(value * kept["mlp"]),
        logits=round(logits),
        workspace=round(max(0, _backward(config, width, value, size) - logits)),
    )


def reserved(config: RunConfig) -> int:
    """Bytes beside those that torch counts: of CUDA and NCCL, and what tensor-parallel ranks write into each other's
    memory (model/peer_memory.py): all ranks' rows, and the other ranks' parts of a sum, both as wide as attention's
    input."""
    tensor, size = config.parallel.tensor, 2 if config.precision.compute == "bfloat16" else 4
    rows = config.micro_batch_size * config.sequence_length * 2 * config.model.hidden_size * size
    return _CONTEXT + (rows + rows * (tensor - 1) // tensor if config.parallel.sequence and tensor > 1 else 0)


def _backward(config: RunConfig, width: Widths, value: int, size: int) -> int:
    """What backward has on top of the kept activations: one sublayer at a time is computed again and has gradients of
    about what it keeps. Those of weights need nothing: products add them to the float32 sums (model/linear.py).
    """
    model, tensor = config.model, config.parallel.tensor
    sublayers = {"mamba": width.mamba, "attention": width.attention, "mlp": width.mlp}
    once = [value * kept * (2 if kind in config.recompute else 1) for kind, kept in sublayers.items()]
    if size == 2 and (model.head_dim > 256 or config.document_reset):  # where the Triton attention is taken
        heads = config.micro_batch_size * model.num_attention_heads // tensor
        once[1] += turns(config.sequence_length, heads, 2, size).bytes
    tokens, inner, d_state = value / size, model.d_inner / tensor, model.mamba.d_state
    if model.family == "zamba2":
        # The scan's chunk states, forward and backward; in float32, the shares of the gradients of B and C of some four
        # blocks of heads, and what they have in common inside a chunk.
        once[0] += 2 * value * inner * d_state / 64
        once[0] += 4 * tokens * 4 * max(model.mamba.ngroups // tensor, 1) * (2 * d_state + 64)
    else:
        once[0] += 2 * 4 * tokens * d_state * inner / 32  # the same, of blocks of 32 channels
    return round(max(once))


def checkpoint_bytes(config: RunConfig, data: int) -> int:
    """Size of one checkpoint: 12 bytes a parameter, and the headers of the pieces that the ranks write."""
    tensor = config.parallel.tensor
    table = placements(config.model, tensor)
    pieces = sum(tensor if placement.shard_dim is not None else 1 for placement in table.values())
    # A border between data-parallel ranks cuts one tensor into about three boxes more.
    pieces += 3 * (data - 1) * tensor
    return 12 * sum(placement.numel for placement in table.values()) + 3 * 1830 * pieces + 4096


def checkpoints_kept(config: RunConfig, total_steps: int, phase_ends: list[int]) -> int:
    """The most checkpoints on disk at once: what the policy keeps, and the one being written."""
    # A new checkpoint lets go of one at most, so most are there at the end.
    policy = config.checkpoint
    for_ever = set(phase_ends) if policy.keep_phase_ends else set()
    saved = for_ever | {total_steps}
    last = total_steps // policy.every
    saved |= {policy.every * number for number in range(max(last - policy.keep_last, 1), last + 1)}
    milestones = 0
    if policy.keep_every:
        both = math.lcm(policy.every, policy.keep_every)
        milestones = total_steps // both
        for_ever |= {step for step in saved if step % policy.keep_every == 0}
        milestones -= sum(step % both == 0 for step in for_ever)  # those are counted below
    recent = sorted(saved)[-policy.keep_last - 1 :]
    return milestones + len(for_ever.union(recent))
