"""Our model and transformers' with the weights of a checkpoint or a release."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError, ConfigError
from train.distributed import Layout
from train.evaluate.target import Target, read_hf_config


def load_model(target: Target, dtype: torch.dtype, device: torch.device, reset: bool) -> nn.Module:
    """Our model with the weights of a checkpoint or of a release, rounded to `dtype` as training rounds its masters.

    Raises:
        CheckpointError: the weights are damaged, missing or not the model's.
    """
    from model.zamba import Zamba

    if target.kind == "release":
        config, get = _from_release(target.folder)
    else:
        from train.checkpoint.weights import open_weights

        weights = open_weights(target.folder)
        config, get = weights.config, weights.tensor
    model = Zamba(config, dtype=dtype, device=device, document_reset=reset)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(get(name))
    return model


def _from_release(folder: Path) -> tuple[Any, Callable[[str], Tensor]]:
    """The model config and its tensors, mapped from Hugging Face's."""
    from model.convert import HuggingFaceFiles
    from model.hf import config_from_hf, from_hf

    config = config_from_hf(read_hf_config(folder))
    files = HuggingFaceFiles(folder)
    return config, dict(from_hf(config, files.names, files.get)).__getitem__


def load_strictly(folder: Path, dtype: torch.dtype | str) -> Any:
    """transformers' model of a folder, on the CPU, all of it out of its files: alone it makes up tensors that lack.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape, or a file cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        limit = f"transformers cannot load it: {str(error).strip().splitlines()[0]}"
        raise CheckpointError("target", folder, limit, "release it again") from None
    model, loading = loaded
    unused = set(loading["unexpected_keys"]) - set(_unused_adapters(folder, loading["unexpected_keys"]))
    faults = {"missing": loading["missing_keys"], "unexpected": unused, "mismatched": loading["mismatched_keys"]}
    if any(faults.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in faults.items() if names)
        first = str(next(name for names in faults.values() for name in sorted(map(str, names))))
        raise CheckpointError("target", folder, f"tensors: {counts}, such as {first}", "release it again")
    return model


def _unused_adapters(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that published files hold and no pass uses."""
    from model.hf import config_from_hf, foreign_adapters

    try:
        return foreign_adapters(config_from_hf(read_hf_config(folder)), names)
    except ConfigError:  # a structure that only transformers knows
        return []


def transformers_model(folder: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers' own model of a release, called like ours. Raises what `load_strictly` raises."""

    class PerTokenLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load_strictly(folder, dtype)
            self.config = self.model.config

        def forward(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
            logits = self.model(tokens, use_cache=False).logits.float()
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(
                targets
            )

    return PerTokenLoss().to(device)


def alone(device: torch.device) -> Layout:
    return Layout(
        world=1, rank=0, tensor=1, tensor_rank=0, data=1, data_rank=0, sequence=False, device=device,
        tensor_group=None, data_group=None,
    )  # fmt: skip
