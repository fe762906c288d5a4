"""Zamba and Zamba2: a stack of Mamba layers, some of which first call a shared attention block.

Source: arXiv 2405.16712 and 2411.15242, figure 2 of each. With e the token embedding and r the residual stream:

    plain layer       r <- r + Mamba(RMSNorm(r))
    hybrid layer      t  = bridge(SharedBlock(concat(r, e)))
                      r <- r + Mamba(RMSNorm(r + t))
    logits            RMSNorm(r) times the embedding's transpose
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor, nn

from model.collectives import all_gather_last
from model.config import ModelConfig
from model.initialization import draw
from model.kernels.cross_entropy import cross_entropy
from model.kernels.qkv import rope_tables
from model.layers import RMSNorm, Scope, VocabularyEmbedding, Weight, in_one_piece
from model.mamba1 import Mamba1
from model.mamba2 import Mamba2
from model.parallel import Layout, placement_of
from model.placement import placements
from model.recompute import Recompute
from model.shared_block import Pass, SharedBlock


class Layer(nn.Module):
    """A Mamba mixer, and in a hybrid layer the bridge from a shared block to its input."""

    def __init__(self, config: ModelConfig, index: int, scope: Scope, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.call = config.hybrid_layers.index(index) if index in config.hybrid_layers else None
        if self.call is not None:
            self.bridge = Weight(scope / "bridge")
        self.norm = RMSNorm(scope / "norm", config.norm_eps)
        mixer = Mamba1 if config.family == "zamba" else Mamba2
        self.mixer = mixer(config, scope / "mixer")

    def forward(self, stream: Tensor, embedding: Tensor, blocks: nn.ModuleList, shared: Pass) -> Tensor:
        """Stream and embedding (time / size under SP, batch, hidden) -> the stream after this layer."""

        def mix(stream: Tensor, *attended: Tensor) -> Tensor:
            normed, stream = self.norm.beside(stream, *attended)
            return stream + self.mixer(normed, shared.seq_idx)

        if self.call is None:
            return self.recompute("mamba", mix, stream)
        block = blocks[self.call % len(blocks)]
        return self.recompute("mamba", mix, stream, self.bridge(block(stream, embedding, self.call, shared)))


class Zamba(nn.Module):
    """The model, or this tensor-parallel rank's part of it. Parameters are not initialised: see `initialize`.

    Args:
        sequence_parallel: split the residual stream along time over the tensor-parallel ranks.
        document_reset: attention, scans and convolutions stop at document borders. Zamba was trained without.
        recompute: of `mamba`, `attention`, `mlp`: what is computed again in the backward pass to save memory.

    `named_parameters()` has the names and order of `placements(config, tensor)`; each parameter has its `.placement`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        document_reset: bool = False,
        recompute: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.config, self.document_reset = config, document_reset
        self.layout = Layout.current(sequence_parallel)
        scope = Scope(placements(config, self.layout.size), self.layout, dtype, device)
        again = Recompute(recompute)
        self.embedding = VocabularyEmbedding(scope / "embedding")
        self.blocks = nn.ModuleList(
            SharedBlock(config, index, scope / "blocks" / index, again) for index in range(config.num_shared_blocks)
        )
        self.layers = nn.ModuleList(
            Layer(config, index, scope / "layers" / index, again) for index in range(config.num_layers)
        )
        self.final_norm = RMSNorm(scope / "final_norm", config.norm_eps)
        in_one_piece(self.parameters())

    def forward(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Per-token losses, the same on all tensor-parallel ranks.

        Args:
            tokens, targets: (batch, time) int64; under sequence parallelism time is a multiple of the ranks.
            document_ids: (batch, time) int32; needed with document_reset, unused without. A border is where it changes.

        Returns:
            (batch, time) nats in float32 (float64 for a float64 model).
        """
        logits = self.embedding.logits(self._stream(tokens, document_ids))
        return cross_entropy(logits, targets.T, self.layout.ranks).T

    @torch.no_grad()
    def logits(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """(batch, time) -> (batch, time, vocabulary), gathered over the tensor-parallel ranks; no gradient."""
        local = self.embedding.logits(self._stream(tokens, document_ids))
        return all_gather_last(local, self.layout.ranks).transpose(0, 1)

    def _stream(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """(batch, time) -> the normed stream at the top, (time / size under SP, batch, hidden)."""
        shared = self._pass(tokens, document_ids)
        embedding = self.embedding(tokens)
        if self.layout.sequence:  # the widest rows that are gathered are attention's, of stream and embedding
            self.layout.exchange(tokens.device).reserve(2 * self.layout.size * embedding.nbytes)
        stream = embedding
        for layer in self.layers:
            stream = layer(stream, embedding, self.blocks, shared)
        return self.final_norm(stream)

    def _pass(self, tokens: Tensor, document_ids: Tensor | None) -> Pass:
        seq_idx = tables = None
        if self.document_reset:
            if document_ids is None:
                raise ValueError("document_reset needs document_ids")
            borders = document_ids[:, 1:] != document_ids[:, :-1]
            seq_idx = nn.functional.pad(borders.cumsum(1, dtype=torch.int32), (1, 0))
        if self.config.rope:
            tables = rope_tables(tokens.shape[1], self.config.head_dim, self.config.rope_theta, self.embedding.weight)
        return Pass(seq_idx, tables)

    def initialize(self, seed: int) -> None:
        """Fills the parameters by `seed`: the global tensors are the same at any tensor-parallel size.

        In threads: a core draws some 190 million values a second, and each tensor has a generator of its own.
        """

        def fill(parameter: nn.Parameter) -> None:
            placement = placement_of(parameter)
            part = placement.local_slice(self.layout.size, self.layout.rank)
            with torch.no_grad():
                parameter.copy_(draw(placement, seed)[part])

        # A thread begins on the first GPU, in its default stream, for which the caller's does not wait.
        device, begin = self.embedding.weight.device, None
        if device.type == "cuda":
            begin = partial(torch.cuda.set_stream, torch.cuda.current_stream(device))  # and its GPU
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with ThreadPoolExecutor(min(max(cores, 1), 8), initializer=begin) as threads:
            list(threads.map(fill, self.parameters()))
