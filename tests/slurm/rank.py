"""A rank of the trainer with faults in it: python -m tests.slurm.rank '[["slow_steps", {"seconds": 1}]]' ARGUMENTS."""

from __future__ import annotations

import json
import os
import sys

from tests.train import faults
from train.launcher import environment_rank
from train.pretrain import main

if __name__ == "__main__":
    for name, options in json.loads(sys.argv.pop(1)):
        getattr(faults, name)(environment_rank(), **options)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
