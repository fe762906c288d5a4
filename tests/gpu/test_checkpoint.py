"""Checkpoints beside GPUs: conversions are whole, and no rank takes memory of another's GPU."""

import json
import os

import pytest
import torch
import yaml
from safetensors.torch import save_file

from model.convert import convert
from model.hf import hf_config, to_hf
from model.initialization import draw
from model.placement import placements
from tests.model import tiny
from tests.ports import free_ports
from tests.train.fixtures import ROOT, small_run, write_run
from train.verify import verify


def test_a_conversion_is_whole(tmp_path):
    """torch's writer goes another way where there is a GPU."""
    config, source = tiny.zamba2(), tmp_path / "hf"
    source.mkdir()
    table = placements(config)
    save_file(dict(to_hf(config, lambda name: draw(table[name], 0))), source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(hf_config(config)))
    convert(source, tmp_path / "converted")
    found = verify(tmp_path / "converted")
    assert found["valid"] and found["tensors"] == len(table), found


def _rank(rank, port, file, folder):
    from train import distributed
    from train.checkpoint.manager import CheckpointManager
    from train.checkpoint.manifest import Fingerprints, Manifest
    from train.config import Checkpoint, load_run
    from train.engine import Engine
    from train.start import build_model

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    run = load_run(file, ["precision.compute=bfloat16", "parallel.tensor=2", "parallel.sequence=true"])
    layout = distributed.start(2, True, 60)
    engine = Engine(build_model(run, layout), run.config.optimizer, layout)
    manager = CheckpointManager(folder, Checkpoint(), [], layout)

    def describe(files):
        return Manifest(kind="train", step=1, phase="a", tokens=0, files=files, model={}, config_sha256="",
                        fingerprints=Fingerprints(), optimizer_step=0, code_version="test")  # fmt: skip

    manager.prepare(engine)
    manager.save(engine, describe, 1)
    manager.wait()
    assert not torch._C._cuda_hasPrimaryContext(1 - rank), f"rank {rank} holds memory of GPU {1 - rank}"
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_takes_no_memory_of_the_other_gpu(tmp_path):
    """Threads begin on the first GPU; a context there takes half a gigabyte."""
    config = yaml.safe_load((ROOT / "configs/model/zamba2-tiny.yaml").read_text())
    run = write_run(tmp_path, small_run(tmp_path, config, sequence_length=128, micro_batch_size=4))
    torch.multiprocessing.spawn(_rank, args=(free_ports(1)[0], str(run), tmp_path / "checkpoints"), nprocs=2)
