"""Sockets that wait for connections: what asyncio's servers do, but with the accepting left to the caller.

An asyncio server under TLS neither counts nor names who fails the handshake; the peer port has to do both.
"""

from __future__ import annotations

import asyncio
import os
import socket


async def listen(host: str, port: int) -> list[socket.socket]:
    """Bound sockets, not yet listening, for every address of a host. Raises OSError when one cannot be had."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, place in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            listener.setblocking(False)
            if os.name == "posix":  # Elsewhere it would let two listeners share the port.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(place)
    except BaseException:
        for listener in sockets:
            listener.close()
        raise
    return sockets
