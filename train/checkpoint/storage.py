"""Boxes of global tensors to and from files, through torch.distributed.checkpoint (DCP).

DCP's stock planners want whole tensors or DTensors. ZeRO-1 owns 1-D ranges of flattened local shards, which
are up to three boxes of a matrix; the planner below hands those to DCP with their global coordinates.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future as Started
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future


@dataclass(frozen=True)
class Box:
    """A rectangular part of a global tensor.

    key: the tensor's name in the checkpoint. shape: its global shape. offset, size: the part.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)


def range_boxes(start: int, numel: int, shape: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Cuts elements [start, start + numel) of a flattened array of `shape` into boxes, in memory order.

    Yields:
        (first element's place within the range, offset, size) of each box; at most 2 * dimensions - 1 of them.
    """
    if not shape or len(shape) == 1:
        yield 0, (start,) * len(shape), (numel,) * len(shape)
        return
    row = math.prod(shape[1:])
    place = 0
    while place < numel:
        index, inside = divmod(start + place, row)
        left = numel - place
        if inside == 0 and left >= row:
            rows = left // row
            yield place, (index, *([0] * (len(shape) - 1))), (rows, *shape[1:])
            place += rows * row
        else:
            count = min(row - inside, left)
            for deeper, offset, size in range_boxes(inside, count, shape[1:]):
                yield place + deeper, (index, *offset), (1, *size)
            place += count


@dataclass(frozen=True)
class Piece:
    """A box and where its values are: a CPU tensor of that size, of a type that numpy has, or a function that gives a
    tensor when it is written."""

    box: Box
    data: Tensor | Callable[[], Tensor]
    dtype: torch.dtype


class _BoxSavePlanner(DefaultSavePlanner):
    """Plans and hands over the pieces that this rank owns.

    torch's writer keeps what it wrote until its file is closed (2.11 to 2.13). The memory of a piece that was made for
    the call is therefore given back when the next one is asked for: no more than one is there at a time.
    """

    def __init__(self, pieces: Sequence[Piece], written: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._written, self._last = written, 0
        self._pieces = {(piece.box.key, piece.box.offset): piece for piece in pieces}
        self._made: Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self._pieces.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        piece = self._pieces[write_item.index.fqn, tuple(write_item.index.offset or ())]
        self._written(self._last)
        self._last = piece.box.numel * piece.dtype.itemsize
        if self._made is not None:
            self._made.untyped_storage().resize_(0)
            self._made = None
        if isinstance(piece.data, Tensor):
            # In a storage of its own extent: of a part of a larger one torch's writer makes, and keeps, a copy.
            return torch.from_numpy(piece.data.numpy()).view(piece.box.size)
        self._made = piece.data().view(piece.box.size).clone(memory_format=torch.contiguous_format)
        return self._made


def _write_item(piece: Piece) -> WriteItem:
    box = piece.box
    chunk = ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=torch.Size(box.size))
    return WriteItem(
        index=MetadataIndex(box.key, torch.Size(box.offset)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, TensorProperties(dtype=piece.dtype), torch.Size(box.shape)),
    )


_CACHED_BYTES = 1 << 28


class _Flusher:
    """Sends what one rank writes to the disk all along, beside the writing: at most two blocks wait in the cache.

    Else the last fsync would take as long as the disk needs for everything, and nothing would tell that it goes on.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._pattern = folder, f"__{rank}_*.distcp"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-flush")
        self._running: Started[None] | None = None
        self._cached = 0

    def wrote(self, size: int) -> None:
        """Raises OSError where the block before could not be written."""
        self._cached += size
        if self._cached >= _CACHED_BYTES:
            self._cached = 0
            if self._running is not None:
                self._running.result()
            self._running = self._thread.submit(self._flush)

    def close(self) -> None:
        """Waits for the block that is on its way; its error, if it has one, is also that of the writer's fsync."""
        self._thread.shutdown()

    def _flush(self) -> None:
        for path in self._folder.glob(self._pattern):
            with open(path, "rb") as file:
                os.fdatasync(file.fileno())


@contextlib.contextmanager
def _no_crc32() -> Iterator[None]:
    """torch.save without the checksum of zip files, which takes it two thirds of its time: files have hashes (xxh3)."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Writer(FileSystemWriter):
    """Says why a file could not be written, in this process: torch.save of a large tensor hides it in its context."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def write(
    folder: Path, pieces: Sequence[Piece], group: dist.ProcessGroup | None, tell: Callable[[], None] = lambda: None
) -> None:
    """Writes every rank's pieces into `folder`, fsynced. Collective over `group`; None: this process alone.

    Args:
        tell: called after every piece.

    Raises:
        OSError: a rank could not write (disk full and the like).
        RuntimeError: a rank is gone.
    """
    flusher = _Flusher(folder, 0 if group is None else dist.get_rank(group))

    def written(size: int) -> None:
        flusher.wrote(size)
        tell()

    # Nothing is asked for ahead: beside a GPU torch would take several pieces before it writes one, and a stream of the
    # first GPU.
    writer = _Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1, per_thread_copy_ahead=0)
    try:
        with _no_crc32():
            dcp.save(
                {},
                storage_writer=writer,
                planner=_BoxSavePlanner(pieces, written),
                process_group=group,
                no_dist=group is None,
            )
    except dcp.api.CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise next((f for f in failures if isinstance(f, OSError)), failures[0]) from None
    finally:
        flusher.close()


class _BoxLoadPlanner(DefaultLoadPlanner):
    """Where the parts that are read go: views of the caller's tensors."""

    def __init__(self, targets: dict[tuple[str, tuple[int, ...]], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        target = self._targets[index.fqn, tuple(index.offset or ())]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        return None


class Reader:
    """Tensors of one checkpoint folder, read in any boxes.

    Raises:
        KeyError: `tensor` or `read_boxes` name a tensor that is not there.
        ValueError: shapes differ, or the checkpoint lacks a part of a box.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = FileSystemReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tuple(tensor.size) for key, tensor in self._tensors.items()}

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].properties.dtype

    def tensor(self, key: str) -> Tensor:
        """The whole global tensor `key`, on the CPU."""
        shape = self.shapes[key]
        out = torch.empty(shape, dtype=self.dtype(key))
        self.read_boxes([(Box(key, shape, (0,) * len(shape), shape), out)])
        return out

    def read_boxes(self, wanted: Iterable[tuple[Box, Tensor]]) -> None:
        """Fills each CPU tensor with its box."""
        targets: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        items: list[ReadItem] = []
        for box, target in wanted:
            stored = self._tensors[box.key]
            if tuple(stored.size) != box.shape:
                raise ValueError(f"{box.key} is {tuple(stored.size)} in the checkpoint and {box.shape} in the model")
            chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size))
            parts = create_read_items_for_chunk_list(box.key, stored, [chunk])
            # Every read goes to one destination chunk; its offset tells which.
            parts = [
                ReadItem(
                    p.type,
                    MetadataIndex(box.key, chunk.offsets),
                    p.dest_offsets,
                    p.storage_index,
                    p.storage_offsets,
                    p.lengths,
                )
                for p in parts
            ]
            if sum(math.prod(p.lengths) for p in parts) != box.numel:
                raise ValueError(f"{box.key} lacks a part of the box at {box.offset} of size {box.size}")
            targets[box.key, box.offset] = target.view(box.size)
            items.extend(parts)
        self._reader.read_data(LoadPlan(items), _BoxLoadPlanner(targets)).wait()


UNREADABLE = (OSError, EOFError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError, AttributeError)
"""What reading damaged files can raise. Hashes are checked first; these stay as the last line of defence."""
