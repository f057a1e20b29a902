"""One connection between two masters; transport.py owns them and has the rules."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from pysyncobj.node import Node

from coordinator.api.v1 import peer_pb2
from coordinator.model.errors import ConfigError
from coordinator.raft.frames import (
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    FrameSplitter,
    ProtocolViolation,
    pack,
    parse,
    to_message,
)

if TYPE_CHECKING:
    from coordinator.raft.transport import PeerTransport

SEND_BYTES_MAX = 64 << 20
"""What may wait in this process for a peer to read it."""
HELLO_S_MAX = 2.0
"""How long a stranger may take to say who it is."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a master's peer port is."""

    id: str
    host: str
    port: int


def parse_address(id: str, address: str) -> PeerAddress:
    """Reads "host:port"; an IPv6 host stands in brackets. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ConfigError([f"peer address {address!r} of master {id} is not host:port"])
    return PeerAddress(id, host.strip("[]"), int(port))


class Link(asyncio.Protocol):
    """One connection, from the first byte to the last; `peer` is None until the other side's hello was right."""

    def __init__(self, transport: PeerTransport, dialled: PeerAddress | None) -> None:
        self._owner = transport
        self._dialled = dialled
        self._splitter = FrameSplitter(HELLO_BYTES_MAX)
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._hello_timer: asyncio.TimerHandle | None = None
        self.peer: Node | None = None
        self.transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = transport.loop.create_future()
        """Done when nothing may come or go any more."""
        self.lost: asyncio.Future[None] = transport.loop.create_future()
        """Done when the socket is closed."""
        self.received_at = 0.0
        self.sent_at = 0.0

    @property
    def name(self) -> str:
        """The other side, for people."""
        where = self.transport.get_extra_info("peername") if self.transport else None
        address = f"{where[0]}:{where[1]}" if isinstance(where, tuple) else "an unknown address"
        known = self.peer.id if self.peer else self._dialled.id if self._dialled else ""
        return f"{known} at {address}" if known else address

    @property
    def queued_bytes(self) -> int:
        """Bytes that were sent to it but did not leave this process yet."""
        return self._pending_bytes + (self.transport.get_write_buffer_size() if self.transport else 0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no instances of asyncio.Transport, though they have its methods.
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=SEND_BYTES_MAX)
        self.received_at = self.sent_at = self._owner.loop.time()
        self._owner.opened(self)
        if not self._owner.admit(self):
            self.cut("too many connections that have not said who they are")
            return
        self._hello_timer = self._owner.loop.call_later(HELLO_S_MAX, self._expire_hello)
        if self._dialled:
            self.write(pack(self._owner.hello(self._dialled.id)))

    def data_received(self, data: bytes) -> None:
        self.received_at = self._owner.loop.time()
        try:
            for body in self._splitter.feed(data):
                if self.closed.done():
                    return
                if self.peer is None:
                    self._take_hello(parse(body))
                elif body and (message := to_message(parse(body))) is not None:
                    self._owner.deliver(self.peer, message)
        except ProtocolViolation as violation:
            self.cut(str(violation))
        except Exception as error:
            # Not the peer's fault: the engine or the disk failed while it took the message in.
            self._owner.on_failure(error)
            return
        self._owner.on_activity()

    def _take_hello(self, frame: peer_pb2.PeerFrame) -> None:
        if frame.WhichOneof("message") != "hello":
            raise ProtocolViolation("its first frame is no hello")
        node = self._owner.check_hello(frame.hello, self._dialled.id if self._dialled else None)
        self._splitter.bytes_max = FRAME_BYTES_MAX
        if self._hello_timer:
            self._hello_timer.cancel()
        if not self._dialled:
            self.write(pack(self._owner.hello(node.id)))
        self.peer = node
        self._owner.established(self)

    def _expire_hello(self) -> None:
        self.cut(f"no hello within {HELLO_S_MAX:g} s")

    def write(self, data: bytes) -> None:
        """Sends with what else is sent in this turn of the event loop."""
        if not self._pending:
            self._owner.loop.call_soon(self._flush)
        self._pending.append(data)
        self._pending_bytes += len(data)

    def _flush(self) -> None:
        data = b"".join(self._pending)
        self._pending.clear()
        self._pending_bytes = 0
        if self.transport and not self.closed.done() and not self.transport.is_closing():
            self.transport.write(data)
            self.sent_at = self._owner.loop.time()

    def cut(self, why: str) -> None:
        """Ends the connection because of the peer, with one line in the log."""
        if not self.closed.done():
            log.warning("%s: cut the connection to master %s: %s", self._owner.self_id, self.name, why)
        self.end()

    def end(self) -> None:
        """Ends the connection at once."""
        if self.transport:
            self.transport.abort()
        self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()
        if not self.lost.done():
            self.lost.set_result(None)
        self._owner.forget(self)

    def _ended(self) -> None:
        if self.closed.done():
            return
        self.closed.set_result(None)
        if self._hello_timer:
            self._hello_timer.cancel()
        self._owner.ended(self)
