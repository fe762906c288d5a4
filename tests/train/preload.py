"""What the server of tests/train/ranks.py imports before it forks ranks."""

import contextlib
import importlib
import io
import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

NAMES = (
    "deepspeed.runtime.bf16_optimizer",
    "megatron.core.parallel_state",
    "model.zamba",
    "torch.distributed.checkpoint",
    "train.checkpoint.manager",
    "train.loop",
    "train.pretrain",
    "train.start",
)
with contextlib.redirect_stdout(io.StringIO()):
    for name in NAMES:
        importlib.import_module(name)

importlib.import_module("torch").set_num_threads(1)
