"""A short look at GPUs, kernels and links when a run starts: seconds, so that hours are not spent on a broken node."""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.errors import CheckFailed, ConfigError
from model.doctor import measure_device, measure_links
from model.exchange import SWITCH, exchange_of
from model.kernels.check import check_kernels
from train.config import RunConfig
from train.distributed import Layout
from train.memory import estimate, reserved

GIB = 2**30
SLOW = 0.8
"""A GPU with less than this share of the median matrix rate, or a link with less of the best, is warned of."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """What one rank found. fault: (exception's class, field, value, limit, cure) of what ends the run, or None."""

    host: str
    kernels: dict[str, str]
    product: float
    total: int
    free: int
    fault: tuple[type[CheckFailed] | type[ConfigError], str, str, str, str] | None


def probe(config: RunConfig, layout: Layout) -> dict[str, str]:
    """Calls every kernel once, multiplies on every GPU, and sums over every link; the kernels that the run will use.

    Collective. Slow GPUs and too little memory are warnings in the log.

    Raises:
        ConfigError: a kernel is missing or fails. CheckFailed: a collective gave a wrong result. On all ranks alike.
    """
    begin = time.perf_counter()
    everyone: list[Found] = [_look(config, layout)] * layout.world
    dist.all_gather_object(everyone, everyone[0])
    for rank, found in enumerate(everyone):
        if found.fault is not None:
            kind, field, value, limit, cure = found.fault
            raise kind(field, value, f"rank {rank} on {found.host}: {limit}", cure)
    links = measure_links(layout.device) if layout.world > 1 else []
    for name, right, _ in links:
        if not right:
            cure = "run python -m model.doctor on its nodes; NCCL_DEBUG=INFO says which links it takes"
            raise CheckFailed("links", name, f"a wrong result over {layout.world} ranks", cure)
    ways = _ways(layout)
    if layout.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if layout.is_main:
        _tell(config, layout, everyone, links, time.perf_counter() - begin)
        _tell_of_slow_exchanges(layout, everyone, ways)
    return everyone[0].kernels


def _look(config: RunConfig, layout: Layout) -> Found:
    """This rank's own part, without talking to the others."""
    gpu = layout.device.type == "cuda"
    product, free, total = 0.0, 0, 0
    kernels: dict[str, str] = {}
    fault: tuple[type[CheckFailed] | type[ConfigError], str, str, str, str] | None = None
    strict = torch.are_deterministic_algorithms_enabled()
    # The float64 references that kernels are held against need not repeat.
    torch.use_deterministic_algorithms(strict, warn_only=True)
    try:
        if gpu:
            free, total = torch.cuda.mem_get_info(layout.device)
            _, product = measure_device(layout.device)
        kernels = check_kernels(
            config.model,
            tensor=layout.tensor,
            device=layout.device,
            dtype=getattr(torch, config.precision.compute),
            document_reset=config.document_reset,
        )
    except ConfigError as error:
        fault = (ConfigError, str(error.field), str(error.value), error.limit, error.cure)
    except RuntimeError as error:
        cure = "run python -m model.doctor there; take the node out if it fails too"
        fault = (CheckFailed, "gpu", str(layout.device), f"{type(error).__name__}: {error}", cure)
    finally:
        torch.use_deterministic_algorithms(strict)
    return Found(socket.gethostname(), kernels, product, total, free, fault)


def _ways(layout: Layout) -> list[str]:
    """How each rank sends rows to those of its tensor-parallel group; none without sequence parallelism. Collective."""
    if not layout.sequence or layout.tensor_group is None:
        return []
    ways = [exchange_of(layout.tensor_group, layout.device).way] * layout.world
    dist.all_gather_object(ways, ways[0])
    return ways


def _tell_of_slow_exchanges(layout: Layout, everyone: list[Found], ways: list[str]) -> None:
    slow = [rank for rank, way in enumerate(ways) if way != "peer memory"]
    if slow and layout.device.type == "cuda" and os.environ.get(SWITCH) != "off":
        logger.warning(
            "rank %d on %s and %d more cannot write into the memory of the GPUs of their tensor-parallel group: all "
            "others will wait for them; nvidia-smi topo -p2p w there tells what GPUs allow",
            slow[0], everyone[slow[0]].host, len(slow) - 1,
        )  # fmt: skip


def _tell(
    config: RunConfig, layout: Layout, everyone: list[Found], links: list[tuple[str, bool, float]], seconds: float
) -> None:
    """The log's lines about it."""
    kernels = ", ".join(f"{name} {used}" for name, used in everyone[0].kernels.items())
    speeds = ", ".join(f"{name} {speed / 1e9:,.1f} GB/s" for name, _, speed in links)
    rates = [found.product for found in everyone]
    if layout.device.type == "cuda":
        speeds = f"{min(rates) / 1e12:,.0f} to {max(rates) / 1e12:,.0f} TFLOP/s; {speeds}"
    logger.info("probe (%.1f s): kernels %s; %s", seconds, kernels, speeds or "one process, no links")
    for rank, found in enumerate(everyone):
        if found.product < SLOW * statistics.median(rates):
            logger.warning(
                "rank %d on %s multiplies at %.0f TFLOP/s, the median is %.0f: it will hold up all others",
                rank, found.host, found.product / 1e12, statistics.median(rates) / 1e12,
            )  # fmt: skip
    needed = estimate(config, layout.data).total + reserved(config)
    tight = [rank for rank, found in enumerate(everyone) if found.total and found.free < needed]
    if tight:
        logger.warning(
            "the plan expects %.1f GiB on each GPU, rank %d has %.1f GiB free of %.1f: it may run out of memory",
            needed / GIB, tight[0], everyone[tight[0]].free / GIB, everyone[tight[0]].total / GIB,
        )  # fmt: skip
