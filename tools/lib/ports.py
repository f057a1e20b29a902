"""Free ports of the loopback address, for daemons that are started a moment later.

They lie below the range from which the system gives ports to outgoing connections (32768 and up on Linux, 49152 and up
elsewhere), so that between the look and the daemon's bind no connection of anybody takes one. Of processes that look
at the same moment, each begins at a place of its own.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

FIRST, LAST = 10_000, 31_999


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now for TCP or UDP, all different. Raises OSError when there are not so many."""
    start = random.SystemRandom().randrange(LAST + 1 - FIRST)
    found: list[int] = []
    for step in range(LAST + 1 - FIRST):
        port = FIRST + (start + step) % (LAST + 1 - FIRST)
        if _is_free(port):
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"of the ports {FIRST} to {LAST} only {len(found)} are free, and {count} are wanted")


def _is_free(port: int) -> bool:
    with ExitStack() as stack:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            one = stack.enter_context(socket.socket(socket.AF_INET, kind))
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
