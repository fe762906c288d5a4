"""transformers on the CPU as an outside judge, whatever this machine has installed."""

from __future__ import annotations

import os
import sys


def use_plain_transformers() -> None:
    """Makes transformers run its plain torch code on the CPU in this process. Call it before torch is imported.

    transformers (5.17 to 5.23, `use_kernel_func_from_hub_with_fallback`) binds causal-conv1d and mamba-ssm at import
    wherever they can be imported, and then hands CPU tensors to their CUDA kernels.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for package in ("causal_conv1d", "mamba_ssm", "fla"):
        sys.modules[package] = None  # type: ignore[assignment]  # an import of it now fails, as if it were absent
