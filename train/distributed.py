"""This process's place among the others: ranks, groups, device."""

from __future__ import annotations

import ctypes
import os
import socket
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import ConfigError
from train.health import SKEW_SECONDS, Signals
from train.launcher import environment_rank, environment_world


@dataclass(frozen=True)
class Layout:
    """Sizes, this rank's coordinates and the process groups of the tensor and data dimensions."""

    world: int
    rank: int
    tensor: int
    tensor_rank: int
    data: int
    data_rank: int
    sequence: bool
    device: torch.device
    tensor_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def check_gpus() -> None:
    """Refuses more processes on a machine with GPUs than it has of them.

    Raises:
        ConfigError: on all ranks of the machine where torchrun says how many they are, else on those without a GPU.
    """
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", _local_rank() + 1))
    if 0 < gpus < processes:
        limit = f"on {socket.gethostname()}, where each sees {gpus} GPU{'s' * (gpus > 1)}, and needs one of its own"
        cure = f"--nproc-per-node {gpus}; with srun --gpu-bind=none, so that each sees all GPUs of its node"
        raise ConfigError("processes", processes, limit, cure)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed. By default blocks of megabytes, as activations are, go back to the system
    and come again page by page, zeroed: on a CPU a sixth of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def start(tensor: int, sequence: bool, timeout_seconds: float) -> Layout:
    """Joins the process group (nccl with a GPU a process, else gloo) and cuts it into tensor x data groups.

    Tensor-parallel ranks are neighbours, so that they share a node.
    """
    # torch 2.13 says that the collectives which Megatron and DeepSpeed call have new names.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    from model.parallel import initialize_parallel

    rank, world = environment_rank(), environment_world()
    use_gpu = torch.cuda.is_available()
    device = torch.device("cuda", _local_rank()) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
        # Autograd's nodes remember the stream on which they were made, the engine's hooks keep some, and a graph can
        # be captured on any stream but the default one.
        torch.cuda.set_stream(torch.cuda.Stream())
    else:
        keep_freed_memory()
    timeout = timedelta(seconds=timeout_seconds)
    backend = "nccl" if use_gpu else "gloo"
    if "MASTER_ADDR" in os.environ and world > 1:
        dist.init_process_group(
            backend, rank=rank, world_size=world, timeout=timeout, device_id=device if use_gpu else None
        )
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)
    initialize_parallel(tensor, timeout_seconds)
    from megatron.core import parallel_state

    return Layout(
        world=world,
        rank=rank,
        tensor=tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        data=world // tensor,
        data_rank=parallel_state.get_data_parallel_rank(),
        sequence=sequence and tensor > 1,
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
    )


def local_peers(layout: Layout) -> list[int]:
    """Process ids of the other ranks on this machine. Collective."""
    # Containers of one machine may count their processes apart.
    me = (socket.gethostname(), os.readlink("/proc/self/ns/pid"), os.getpid())
    everyone: list[tuple[str, str, int]] = [me] * layout.world
    dist.all_gather_object(everyone, me)
    return [other[2] for other in everyone if other[:2] == me[:2] and other[2] != me[2]]


def first_fault(layout: Layout, fault: str | None) -> str | None:
    """Of all ranks' faults the first, with its rank; None where no rank has one. Collective."""
    faults = [fault] * layout.world
    if layout.world > 1:
        dist.all_gather_object(faults, fault)
    return next((f"rank {rank}: {found}" for rank, found in enumerate(faults) if found is not None), None)


def begin_together(layout: Layout, signals: Signals) -> bool:
    """Waits until all ranks can begin to train; False when one was asked to stop before all could. Call it once.

    Until here a signal ends a process at once, from here on all ranks agree on it in a step. Without this meeting a
    signal would find some ranks before that border and some behind it, and these would take the end of those for a
    death. What is decided first, in the store that all ranks share, holds for all.

    Raises:
        torch.distributed.DistNetworkError: the store is gone, with the rank that kept it, and no signal said why.
    """
    signals.training()
    if layout.world == 1:
        return not signals.asked()
    store = dist.distributed_c10d._get_default_store()
    decided = "begin"
    try:
        if store.add("ready", 1) == layout.world:
            store.compare_set(decided, "", "go")
        while not store.check([decided]):
            time.sleep(0.05)
            if signals.asked():
                store.compare_set(decided, "", "stop")
        return store.get(decided) == b"go"
    except dist.DistNetworkError:
        if signals.wait(SKEW_SECONDS):
            return False
        raise


def be_deterministic() -> None:
    """Only kernels that repeat bit for bit; an operation that has none says so with an error."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
