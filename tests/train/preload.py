"""What the server of tests/train/ranks.py imports before it forks ranks."""

import contextlib
import io
import os
import warnings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.filterwarnings("ignore")

with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed  # noqa: F401
    import torch
    import torch.distributed.checkpoint  # noqa: F401
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer  # noqa: F401
    from megatron.core import parallel_state  # noqa: F401

    import model.zamba
    import train.checkpoint.manager
    import train.loop
    import train.pretrain  # noqa: F401

torch.set_num_threads(1)
