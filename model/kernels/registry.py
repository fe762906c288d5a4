"""Which implementation of an operation runs: decided here and nowhere else.

An operation has a plain torch reference, which is the CPU path, and fast implementations in order of preference.
A fast one is imported only where there is a GPU, and only once; one that cannot be imported, or whose inputs do not
suit it, gives way to the next. `chosen` and `unavailable` say what happened, so that a program can show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Function = Callable[..., Any]


@dataclass(frozen=True)
class Fast:
    """A fast implementation.

    name: as users see it, e.g. `triton`.
    load: imports it and returns a function with the operation's own signature.
    suits: whether it can take these arguments (those of the operation); None: it takes all.
    cure: how to get it where it is missing.
    takes: `suits` in words.

    Its results repeat bit for bit where `torch.use_deterministic_algorithms` is on.
    """

    name: str
    load: Callable[[], Function]
    suits: Callable[..., bool] | None = None
    cure: str = "see docs/dependencies.md"
    takes: str = "other arguments"


class Operation:
    """A callable that runs the first implementation that is there and suits its arguments.

    Args:
        name: as in model/kernels/<name>.
        reference: plain torch, any device, any floating type.
        fast: in order of preference.
        example: makes arguments for a real call on a device, for the doctor and the tests.
    """

    def __init__(
        self, name: str, reference: Function, fast: list[Fast], example: Callable[..., dict[str, Any]]
    ) -> None:
        self.name, self.reference, self.fast, self.example = name, reference, fast, example
        self.unavailable: dict[str, str] = {}
        self._loaded: dict[str, Function] = {}
        self._forced: str | None = None
        OPERATIONS[name] = self

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        run = self.implementation(self.chosen(*arguments, **options))
        values = (*arguments, *options.values())
        device = next((v.device for v in values if isinstance(v, torch.Tensor) and v.is_cuda), None)
        if device is None or device.index == torch.cuda.current_device():
            return run(*arguments, **options)
        with torch.cuda.device(device):  # Triton launches on the current one
            return run(*arguments, **options)

    def chosen(self, *arguments: Any, **options: Any) -> str:
        """The name of the implementation that a call with these arguments runs."""
        if self._forced is not None:
            return self._forced
        values = (*arguments, *options.values())
        if not any(isinstance(value, torch.Tensor) and value.is_cuda for value in values):
            return "reference"
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in values):
            return "reference"
        for fast in self.fast:
            suits = fast.suits is None or fast.suits(*arguments, **options)
            if suits and self.available(fast.name):
                return fast.name
        return "reference"

    def available(self, name: str) -> bool:
        """Whether the fast implementation `name` can be imported; the reason why not is in `unavailable`."""
        if name in self._loaded:
            return True
        if name in self.unavailable:
            return False
        fast = next(fast for fast in self.fast if fast.name == name)
        try:
            self._loaded[name] = fast.load()
        except Exception as error:  # a broken build fails in many ways, and all of them mean: not usable
            self.unavailable[name] = f"{type(error).__name__}: {error}"
            return False
        return True

    def implementation(self, name: str) -> Function:
        """The function called `name`, which is available, or the reference."""
        return self.reference if name == "reference" else self._loaded[name]

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Runs `name`, whatever the arguments, inside the block: for tests and benchmarks.

        Raises:
            LookupError: it cannot be loaded; the message says why.
        """
        if name != "reference" and not self.available(name):
            raise LookupError(f"{self.name}: {name}: {self.unavailable[name]}")
        before, self._forced = self._forced, name
        try:
            yield
        finally:
            self._forced = before


OPERATIONS: dict[str, Operation] = {}


@contextmanager
def reference_only() -> Iterator[None]:
    """Runs every operation's plain torch reference inside the block."""
    forced = {name: operation._forced for name, operation in OPERATIONS.items()}
    for operation in OPERATIONS.values():
        operation._forced = "reference"
    try:
        yield
    finally:
        for name, value in forced.items():
            OPERATIONS[name]._forced = value
