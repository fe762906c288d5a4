"""The proof that a released folder is the model that was trained: loaded by transformers and compared with ours."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckFailed
from data_prep.tokenizer import Tokenizer
from model.config import ModelConfig
from train.checkpoint.weights import Weights

LIMIT = 1e-4
"""Largest relative difference of the logits in float32: norm of the difference over the norm."""

ROUNDING = 3.0
"""In bfloat16 both sides round; they may differ by this many times what rounding moves our own logits by."""

_TEXT = (
    "def fibonacci(n):\n    a, b = 0, 1\n    while n > 0:\n        a, b = b, a + b\n        n -= 1\n    return a\n\n"
    "The shared attention block is applied every few layers of the Mamba backbone. "
)


def probe_ids(config: ModelConfig, tokenizer: Tokenizer | None, length: int = 300) -> Tensor:
    """(2, length) ids: text, then random ids; longer than one SSD chunk of 256."""
    length = min(length, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(3, config.vocab_size, (2, length), generator=generator)
    if tokenizer is not None:
        text = torch.from_numpy(tokenizer.encode(_TEXT * (1 + length // 60))).long()[:length]
        random[0, : len(text)] = text
    return random


def our_model(config: ModelConfig, weights: Weights, released: torch.dtype | None, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Our model with the checkpoint's weights as released (rounded to `released`, None: as stored), in `dtype`."""
    from model.zamba import Zamba

    model = Zamba(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name, released))
    return model.eval()


@torch.no_grad()
def prove(
    folder: Path, weights: Weights, released: torch.dtype | None, tokenizer: Tokenizer | None, new_tokens: int = 16
) -> dict[str, Any]:
    """Loads the folder strictly with transformers and compares logits (float32, bfloat16) and greedy text with ours.

    Raises:
        CheckFailed: a key is missing or left over, or the numbers differ by more than `LIMIT` or `ROUNDING` allow.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = weights.config
    ids = probe_ids(config, tokenizer)
    prompt = ids[:1, :32]
    ours = our_model(config, weights, released, torch.float32)
    expected = ours.logits(ids).float()
    our_text = _greedy(ours, prompt, new_tokens)
    ours = ours.to(torch.bfloat16)
    expected_bf16 = ours.logits(ids).float()
    del ours
    gc.collect()

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    theirs, loading = loaded
    left = {key: sorted(map(str, loading[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(left.values()):
        raise CheckFailed("release", folder, f"transformers did not load it strictly: {left}", "report this")
    theirs.eval()
    logits = theirs(ids).logits.float()
    their_text = theirs.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)[0].tolist()
    theirs = theirs.to(torch.bfloat16)
    logits_bf16 = theirs(ids).logits.float()
    difference = _difference(logits, expected)
    if not difference["relative"] <= LIMIT:
        raise CheckFailed(
            "release",
            folder,
            f"float32 logits differ by {difference['relative']:.1e}, more than {LIMIT}",
            "report this",
        )
    if their_text != our_text:
        raise CheckFailed("release", folder, "greedy text differs between transformers and this code", "report this")
    difference_bf16 = _difference(logits_bf16, expected_bf16)
    limit_bf16 = ROUNDING * _difference(expected_bf16, expected)["relative"]
    if not difference_bf16["relative"] <= limit_bf16:
        limit = f"bfloat16 logits differ by {difference_bf16['relative']:.1e}, more than {limit_bf16:.1e}"
        raise CheckFailed("release", folder, limit, "report this")
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "strict_load": True,
        "logits": {
            "tokens": ids.numel(),
            "float32": difference,
            "bfloat16": difference_bf16,
            "limit_float32_relative": LIMIT,
            "limit_bfloat16_relative": limit_bf16,
        },
        "greedy": {
            "equal": True,
            "ids": our_text,
            "text": _decoded(tokenizer, our_text[prompt.shape[1] :]) if tokenizer else None,
        },
    }


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of ids; those above the tokenizer's, which a larger vocabulary of the model has, are left out."""
    return tokenizer.decode(i for i in ids if i < tokenizer.vocab_size)


def _difference(a: Tensor, b: Tensor) -> dict[str, float]:
    return {"relative": float((a - b).norm() / b.norm()), "largest": float((a - b).abs().max())}


def _greedy(model, ids: Tensor, count: int) -> list[int]:  # type: ignore[no-untyped-def]
    """Most likely continuation, recomputing all positions at each token: slow and plain."""
    for _ in range(count):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()
