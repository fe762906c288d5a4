"""What a start does before its first step: builds the model, records itself, tells the user."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch

from common.files import write_bytes
from common.version import VERSION
from model.placement import parameter_count
from model.zamba import Zamba
from train.config import Run, dump_yaml
from train.data import TrainingData
from train.distributed import Layout
from train.order import flatten_weights
from train.tracing import idle_profile

logger = logging.getLogger(__name__)


def build_model(run: Run, layout: Layout) -> Zamba:
    """This rank's part of the model, drawn from the run's seed, the same for every layout."""
    config = run.config
    model = Zamba(
        config.model,
        sequence_parallel=layout.sequence,
        dtype=getattr(torch, config.precision.compute),
        device=layout.device,
        document_reset=config.document_reset,
        recompute=config.recompute,
    )
    model.initialize(config.seed)
    return model


def _commit() -> str | None:
    """The commit of the code that runs, with a + where it was changed; None outside a checkout, or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def record_start(run: Run, layout: Layout, start: int, kernels: dict[str, str]) -> int:
    """Writes the resolved config and appends to `starts.jsonl`; returns how many starts came before.

    Args:
        kernels: operation -> the implementation that this start uses.
    """
    folder = run.folder
    write_bytes(folder / "config.yaml", dump_yaml(run.resolved))
    path = folder / "starts.jsonl"
    before = path.read_text().count("\n") if path.exists() else 0
    row = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "from_step": start,
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "hosts": os.environ.get("SLURM_JOB_NODELIST"),
        "processes": layout.world,
        "tensor": layout.tensor,
        "device": torch.cuda.get_device_name() if layout.device.type == "cuda" else "cpu",
        "kernels": kernels,
        "cuda_graph": run.config.cuda_graph and layout.device.type == "cuda",
        "code_version": VERSION,
        "commit": _commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "command": sys.argv,
    }
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
    return before


def announce(run: Run, data: TrainingData, layout: Layout, start: int, path: Path | None) -> None:
    """Tells the user what begins, and from which checkpoint it goes on."""
    config, table = run.config, data.order.table
    spread = f"{layout.world} processes = tensor {layout.tensor} x data {layout.data}"
    if layout.sequence:
        spread += ", sequence parallel"
    print(
        f"run {config.name}: {parameter_count(config.model):,} parameters, {spread}, {config.precision.compute} on "
        f"{layout.device.type}\n"
        + "\n".join(
            f"  phase {span.name}: steps {span.first_step}-{span.last_step}, "
            f"{span.steps * config.tokens_per_step:,} tokens, {span.config.learning_rate.shape}, "
            + ", ".join(f"{name} {share:.1%}" for name, share in flatten_weights(config, span.index).items())
            for span in table.spans
        ),
        flush=True,
    )
    for warning in idle_profile(config, layout.world):
        logger.warning(warning)
    if path:
        print(f"going on from {path} (step {start} of {table.total_steps})", flush=True)
