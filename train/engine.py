"""ZeRO-1 over Megatron's groups: the one module that knows DeepSpeed.

DeepSpeed's ZeRO-1 optimizer (`BF16_Optimizer`) keeps the flat buffers: compute weights on every rank, and
on each data-parallel rank one partition of float32 masters and AdamW moments. The order of a step is ours,
because the skip rule needs the gradient norm before the update and because a gradient must not depend on
the layout: accumulate in float32, sum what tensor-parallel ranks hold in parts, reduce-scatter over the
data-parallel ranks, take the norm, then clip, update and all-gather. The same class serves float32 compute
(its "low-precision" weights are then float32), so that there is one path (docs/design.md, engine).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import ConfigError
from model.placement import Placement
from train.config import Optimizer
from train.distributed import Layout

LARGE = 2**20
"""Elements from which a gradient is summed where it lies: a copy of all bridges would be 0.7 GiB of a 7B's memory."""


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter that this rank owns: elements [start, start + numel) of its flattened local shard.

    master, exp_avg and exp_avg_sq are 1-D float32 views of the optimizer's state.
    """

    placement: Placement
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def numel(self) -> int:
        return self.master.numel()


class Engine:
    """Forward, backward and the ZeRO-1 update of one model.

    Args:
        model: its parameters carry their `placement`.
        config: AdamW's settings and the clip norm.
        layout: this rank's place; the process groups are initialised.
    """

    def __init__(self, model: nn.Module, config: Optimizer, layout: Layout) -> None:
        self.model, self.layout, self.clip_grad_norm = model, layout, config.clip_grad_norm
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        decayed = [p for p in self._names if p.placement.decay]  # type: ignore[attr-defined]
        others = [p for p in self._names if not p.placement.decay]  # type: ignore[attr-defined]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self._zero = _make_zero(self.adamw, self._names, layout)
        self._start_state()
        self._add_gradients_in_float32()
        partial = [
            gradient
            for group, gradients in zip(self._zero.bf16_groups, self._zero.fp32_groups_gradients, strict=True)
            for parameter, gradient in zip(group, gradients, strict=True)
            if parameter.placement.gradient_is_partial(layout.sequence) and layout.tensor > 1
        ]
        self._partial_gradients: list[Tensor] = partial
        self._counted = self._fragments_that_count()

    def _add_gradients_in_float32(self) -> None:
        """Gives each parameter its float32 sum, to which matrix products add the gradients of their weights themselves
        (model/linear.py). A gradient that autograd brings is added to it as soon as it is complete, and dropped.

        DeepSpeed's own hook makes a float32 copy first: 18 bytes moved a value instead of 10, and two launches.
        """

        def adder(total: Tensor) -> Callable[[Tensor], None]:
            def add(parameter: Tensor) -> None:
                if parameter.grad is not None:  # autograd calls it for what had no gradient, too
                    total.add_(parameter.grad)
                    parameter.grad = None

            return add

        for group, gradients in zip(self._zero.bf16_groups, self._zero.fp32_groups_gradients, strict=True):
            for parameter, gradient in zip(group, gradients, strict=True):
                parameter.main_grad = gradient.view(parameter.shape)
                parameter.register_post_accumulate_grad_hook(adder(parameter.main_grad))

    def _start_state(self) -> None:
        """Gives AdamW zero moments now, so that a step-0 state can be read and filled like any other."""
        for partition in self._zero.fp32_groups_flat_partition:
            self.adamw.state[partition] = {
                "step": torch.zeros((), dtype=torch.float32, device=partition.device),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
        self._zero._lazy_init_hp_params_optimizer_state()

    # --- one step ------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the float32 sums. `loss` is this rank's share of the global mean."""
        loss.backward()

    def reduce_gradients(self) -> float:
        """Sums gradients over the ranks and returns the global L2 norm (before clipping)."""
        small = [gradient for gradient in self._partial_gradients if gradient.numel() < LARGE]
        for gradient in self._partial_gradients:
            if gradient.numel() >= LARGE:
                dist.all_reduce(gradient, group=self.layout.tensor_group)
        if small:
            flat = torch.cat([g.reshape(-1) for g in small])
            dist.all_reduce(flat, group=self.layout.tensor_group)
            for gradient, summed in zip(small, flat.split([g.numel() for g in small]), strict=True):
                gradient.copy_(summed.view_as(gradient))
        if self.layout.data > 1:
            for flat, part in self._gradient_partitions():
                dist.reduce_scatter_tensor(
                    part, flat.clone() if part.device.type == "cpu" else flat, group=self.layout.data_group
                )
        return self._norm()

    def _gradient_partitions(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._zero.fp32_groups_gradients_flat, self._zero.fp32_groups_gradient_flat_partition, strict=True)

    def _fragments_that_count(self) -> list[tuple[int, int, int]]:
        """(group, start, numel) within the gradient partitions of what this rank adds to the global norm.

        A replicated parameter has the same gradient on every tensor-parallel rank, so only rank 0 counts it.
        """
        counted: list[tuple[int, int, int]] = []
        for index, group in enumerate(self._zero.bf16_groups):
            for parameter in group:
                mapping = parameter._hp_mapping
                sharded = parameter.placement.shard_dim is not None
                if mapping is None or not (sharded or self.layout.tensor_rank == 0):
                    continue
                address = mapping.get_hp_fragment_address()
                counted.append((index, address.start, address.numel))
        return counted

    def _norm(self) -> float:
        parts = self._zero.fp32_groups_gradient_flat_partition
        pieces = [parts[index].narrow(0, start, numel) for index, start, numel in self._counted]
        device = parts[0].device
        total = torch.zeros((), dtype=torch.float64, device=device)
        if pieces:
            total = torch.stack(torch._foreach_norm(pieces, 2, dtype=torch.float64)).square().sum()
        if self.layout.world > 1:
            dist.all_reduce(total)
        return math.sqrt(total.item()) if torch.isfinite(total) else float("nan")

    def update(self, learning_rate: float, grad_norm: float) -> None:
        """Clips by `grad_norm`, takes one AdamW step and spreads the new weights."""
        if self.clip_grad_norm and grad_norm > self.clip_grad_norm:
            scale = self.clip_grad_norm / (grad_norm + 1e-6)
            for _, part in self._gradient_partitions():
                part.mul_(scale)
        for partition, (_, gradient) in zip(
            self._zero.fp32_groups_flat_partition, self._gradient_partitions(), strict=True
        ):
            partition.grad = gradient
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self._zero.update_lp_params()
        self._zero.clear_hp_grads()

    def skip(self) -> None:
        """Drops the gradients of this step; AdamW's own step count stays."""
        self._zero.clear_hp_grads()

    # --- state ---------------------------------------------------------------------------------

    @property
    def optimizer_step(self) -> int:
        """AdamW's step: updates done, skipped ones not counted."""
        return int(self.adamw.state[self._zero.fp32_groups_flat_partition[0]]["step"].item())

    def fragments(self) -> Iterator[Fragment]:
        """The pieces of masters and moments that this rank owns, as views."""
        for group in self._zero.bf16_groups:
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    yield Fragment(
                        parameter.placement,
                        mapping.lp_fragment_address.start,
                        mapping.hp_fragment.detach(),
                        mapping.get_optim_state_fragment("exp_avg"),
                        mapping.get_optim_state_fragment("exp_avg_sq"),
                    )

    def state_was_loaded(self, optimizer_step: int) -> None:
        """Call after writing into `fragments()`: sets AdamW's step and rounds the masters into the compute weights."""
        for partition in self._zero.fp32_groups_flat_partition:
            self.adamw.state[partition]["step"].fill_(optimizer_step)
        self._zero.update_lp_params()


def _make_zero(adamw: torch.optim.Optimizer, names: dict[nn.Parameter, str], layout: Layout) -> Any:
    if layout.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it found no GPU
    try:
        import deepspeed
        from deepspeed.runtime import bf16_optimizer
        from deepspeed.utils import logger
    except ImportError as error:
        raise ConfigError("deepspeed", error, "the trainer's ZeRO-1 optimizer is missing", "run make setup") from None
    logger.setLevel(logging.WARNING)
    # Its shared-memory collectives for CPUs would be compiled at every first start, for nothing: gloo does them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    # It would print its memory use at six stages, after a garbage collection (a second) at each.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    return bf16_optimizer.BF16_Optimizer(
        adamw,
        names,
        bfloat16_config=SimpleNamespace(enabled=True, immediate_grad_update=False),
        mpu=_MegatronGroups(layout),
        clip_grad=0.0,
        dp_process_group=layout.data_group,
        grad_acc_dtype=torch.float32,
    )


class _MegatronGroups:
    """What DeepSpeed asks of Megatron's `parallel_state`, under the names it uses."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def get_model_parallel_rank(self) -> int:
        return self._layout.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._layout.tensor

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._layout.tensor_group

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._layout.data_group

    def get_data_parallel_group_ranks(self) -> Iterable[int]:
        return dist.get_process_group_ranks(self._layout.data_group)
