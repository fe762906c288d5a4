"""The whole trainer on GPUs, bfloat16 and fused kernels, beside the same run on a CPU in float32.

Plain torch in bfloat16 on a CPU is up to 0.06 (loss) and 13 % (gradient norm) from float32 in these runs.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from tests.train.fixtures import ROOT, small_run, write_run


def steps(folder, run, processes, *overrides, **environment):
    """Trains as a user does; (losses, gradient norms) of all steps."""
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "train.pretrain"]
    done = subprocess.run(
        [sys.executable, "-m", *command, run, f"run_dir={folder}", *overrides],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(line.get("skipped") for line in lines)
    return torch.tensor([(line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line]).T


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("model", ["zamba-tiny", "zamba2-tiny"])
def test_training_follows_the_reference(model, processes, tmp_path):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    config = yaml.safe_load((ROOT / f"configs/model/{model}.yaml").read_text())
    run = write_run(tmp_path, small_run(tmp_path, config, sequence_length=128, micro_batch_size=4))
    layout = [f"parallel.tensor={processes}", f"parallel.sequence={'true' if processes > 1 else 'false'}"]
    loss, norm = steps(tmp_path / "gpu", run, processes, "precision.compute=bfloat16", *layout)
    exact_loss, exact_norm = steps(tmp_path / "cpu", run, 1, CUDA_VISIBLE_DEVICES="")
    print(f"\n{model}: loss {(loss - exact_loss).abs().max():.4f} off, norm {(norm / exact_norm - 1).abs().max():.3f}")
    assert len(loss) == 14 and exact_loss[-1] < exact_loss[0] - 1
    torch.testing.assert_close(loss, exact_loss, rtol=0, atol=0.1)
    torch.testing.assert_close(norm, exact_norm, rtol=0.25, atol=0)
