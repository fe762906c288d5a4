"""A function of tensors as one CUDA graph: captured once, replayed from then on.

Python needs milliseconds to launch what a sublayer computes forward and backward, and between two kernels the GPU waits
a little even where it is the slower of the two. A replay launches everything at once: the same kernels in the same
order, so that its results are the function's own, bit for bit.

A graph keeps the memory that its function had while it was captured, the activations of a micro-batch, also between
replays. It does not grow the peak: the allocator's cache is given back before. But what runs between two replays must
find memory of its own, or call `release`, which gives the graph's back until the next call.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor | None, ...]

WARM_UP = 2
"""Calls before the capture, during which nothing can be compiled, loaded or connected. The first call does that; the
second is already as all later ones are, gradients' sums included."""

logger = logging.getLogger(__name__)


@dataclass
class Captured:
    """A graph, the memory pool that it computes in, and the tensors there that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    pool: torch.cuda.MemPool
    inputs: Inputs
    output: Tensor

    def replay(self, inputs: Inputs) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it


class Graphed:
    """Calls `function`: the first times as it is, then through a graph.

    Where a capture fails, a warning says so and the function is called as it is for good. Nothing is done twice: a
    capture executes nothing.

    Args:
        function: takes tensors, or None, the same shapes at every call, and returns a tensor. A replay repeats what it
            did to any tensor, and nothing that it did in Python.
        model: its parameters have no `.grad` between calls.
        agree: given what went wrong here, or None, returns what went wrong on any rank. All ranks must do the same: a
            collective that is captured may be another one than called directly.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        model: nn.Module,
        agree: Callable[[str | None], str | None] = lambda fault: fault,
    ) -> None:
        self._function, self._model, self._agree = function, model, agree
        self._stream: torch.cuda.Stream | None = None
        self._captured: Captured | None = None
        self._calls = 0
        self._failed = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if self._captured is None and self._calls >= WARM_UP and not self._failed:
            self._captured = self._capture(inputs)
        self._calls += 1
        if self._captured is not None:
            return self._captured.replay(inputs)
        return self._function(*inputs) if self._failed else self._warm_up(inputs)

    def release(self) -> None:
        """Gives the graph's memory back; the next call captures anew. Also due before a process group is destroyed:
        NCCL waits for the graphs that use its communicators."""
        if self._captured is not None:
            torch.cuda.synchronize()
            self._captured.graph.reset()
            self._captured = None
            torch.cuda.empty_cache()

    def _warm_up(self, inputs: Inputs) -> Tensor:
        """Calls the function on the stream of the capture: what outlives a call, such as the workspaces of libraries
        and autograd's nodes, is bound to its stream, and a capture that meets another stream's fails. So the trainer
        has one stream for all (train/distributed.py); a caller on the default one, which cannot be captured, gets one.
        """
        if not torch.cuda.is_available():
            return self._function(*inputs)
        if self._stream is None:
            current = torch.cuda.current_stream()
            self._stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            output = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return output

    def _capture(self, inputs: Inputs) -> Captured | None:
        begin, captured, fault = time.perf_counter(), None, None
        try:
            captured = capture(self._function, inputs, self._stream)
        except RuntimeError as error:
            fault = _first_line(error)
        fault = self._agree(fault)
        if fault is None:
            logger.info("micro-batches are a CUDA graph from now on (captured in %.1f s)", time.perf_counter() - begin)
            return captured
        logger.warning("micro-batches are launched kernel by kernel, as with cuda_graph: false: %s", fault)
        self._failed, captured = True, None
        self._model.zero_grad(set_to_none=True)  # a capture that broke off may have left some, of no value
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def capture(function: Callable[..., Tensor], inputs: Inputs, stream: torch.cuda.Stream | None) -> Captured:
    """Captures `function` with buffers of its own in place of `inputs`. It is not executed.

    Raises:
        RuntimeError: it does what cannot be captured.
    """
    static = tuple(None if given is None else given.clone() for given in inputs)
    gc.collect()  # what waits for it in cycles is memory beside the graph's, and nodes of the calls before
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
    # `graph` first empties the allocator's cache: never are two copies of the activations held. Other threads may go
    # on pinning memory and asking for events, as those of checkpoints and NCCL do ("thread_local").
    recording = torch.cuda.graph(graph, pool.id, stream, capture_error_mode="thread_local")  # type: ignore[arg-type]
    try:
        with torch.cuda.stream(stream), recording:  # the outer one restores the stream where the inner one fails to
            output = function(*static)
    except RuntimeError:
        graph.reset()
        _close(pool)
        raise
    return Captured(graph, pool, static, output)


def _close(pool: torch.cuda.MemPool) -> None:
    """Ends what a failed capture leaves undone in torch (github.com/pytorch/pytorch, pull requests 180395, 190348)."""
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # the allocator has ended it
        torch._C._cuda_endAllocateToPool(device, pool.id)
    while pool.use_count() > 1:  # the graph's part; else the pool's memory would be lost
        torch._C._cuda_releasePool(device, pool.id)
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())  # the old one may take itself for captured


def _first_line(error: BaseException) -> str:
    """Of the error that began it: ending a broken capture raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]
