"""Free ports for tests that start servers."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

FIRST, LAST = 10000, 32000
"""Below the ports that Linux gives to outgoing connections: of those, one that was free may be taken a moment later."""


def free_ports(count: int) -> list[int]:
    """So many different ports that nothing on this machine listens on."""
    draw = random.SystemRandom()  # hypothesis gives the other generator the same seed in every process
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port, probe = draw.randint(FIRST, LAST), stack.enter_context(socket.socket())
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found.append(port)
        return found
