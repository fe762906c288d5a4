"""Selective activation recomputation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.errors import ConfigError

KINDS = ("mamba", "attention", "mlp")


class Recompute:
    """Calls sublayers; those of the given kinds keep only their input and are run again in the backward pass.

    Non-re-entrant, so that a shared block's parameters reach their gradient accumulators once a backward pass.
    """

    def __init__(self, kinds: Iterable[str] = ()) -> None:
        self.kinds = frozenset(kinds)
        if unknown := sorted(self.kinds - set(KINDS)):
            raise ConfigError("recompute", unknown[0], f"must be among {', '.join(KINDS)}", "correct the list")

    def __call__(self, kind: str, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if kind not in self.kinds or not torch.is_grad_enabled():
            return function(*inputs)
        contexts = lambda: (contextlib.nullcontext(), _recomputation())
        out = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        assert isinstance(out, Tensor)
        return out


_recomputing: ContextVar[bool] = ContextVar("_recomputing", default=False)


def recomputing() -> bool:
    """Whether a sublayer is being run again, so that nothing needs its result."""
    return _recomputing.get()


@contextlib.contextmanager
def _recomputation() -> Iterator[None]:
    before = _recomputing.set(True)
    try:
        yield
    finally:
        _recomputing.reset(before)
