"""One connection between two masters, from its first byte to its last: frames in, frames out, its bounds and its end.

What it means that a peer says hello, sends a message or is gone is the owner's business (transport.py).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Protocol, cast

from pysyncobj.node import Node

from coordinator.api.v1 import peer_pb2
from coordinator.raft.frames import (
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    FrameSplitter,
    Message,
    ProtocolViolation,
    pack,
    parse,
    to_message,
)
from coordinator.security.certificates import Identity
from coordinator.security.tls import peer_identity, reason_of

SEND_BYTES_MAX = 64 << 20
HELLO_S_MAX = 2.0
NO_HELLO = f"no hello within {HELLO_S_MAX:g} s"

log = logging.getLogger("coordinator.raft.transport")


class Owner(Protocol):
    """Whom a link tells what happens."""

    self_id: str
    loop: asyncio.AbstractEventLoop

    def hello(self, to_id: str) -> peer_pb2.PeerFrame:
        """What this master says first."""
        ...

    def check_hello(self, hello: peer_pb2.PeerHello, expected_id: str, certified: Identity | None) -> Node:
        """The peer that says this. Raises ProtocolViolation when it may not."""
        ...

    def opened(self, link: Link) -> None:
        """There is a socket, which `forgotten` ends."""
        ...

    def forgotten(self, link: Link) -> None:
        """The socket is closed."""
        ...

    def admit(self, link: Link) -> str:
        """Counts a new connection among the strangers; why it may not be one, else nothing."""
        ...

    def established(self, link: Link) -> None:
        """The other side is known now."""
        ...

    def ended(self, link: Link) -> None:
        """The connection is no more."""
        ...

    def deliver(self, node: Node, message: Message) -> None:
        """A message has come."""
        ...

    def on_activity(self) -> None:
        """Messages were taken in."""
        ...

    def on_failure(self, error: Exception) -> None:
        """The engine raised this."""
        ...


class Link(asyncio.Protocol):
    """One connection, from the first byte to the last; `peer` is None until the other side's hello was right."""

    def __init__(self, owner: Owner, dialled_id: str) -> None:
        self._owner = owner
        self._dialled_id = dialled_id
        self._splitter = FrameSplitter(HELLO_BYTES_MAX)
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._hello_timer: asyncio.TimerHandle | None = None
        self.peer: Node | None = None
        self.is_silent = False
        """The other side has not said who it is in time; it may stand still."""
        self.transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = owner.loop.create_future()
        """Done when nothing may come or go any more."""
        self.lost: asyncio.Future[None] = owner.loop.create_future()
        """Done when the socket is closed."""
        self.received_at = 0.0
        self.sent_at = 0.0

    @property
    def name(self) -> str:
        """The other side, for people."""
        where = self.transport.get_extra_info("peername") if self.transport else None
        address = f"{where[0]}:{where[1]}" if isinstance(where, tuple) else "an unknown address"
        known = self.peer.id if self.peer else self._dialled_id
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
        if refusal := self._owner.admit(self):
            self.cut(refusal)
            return
        self._hello_timer = self._owner.loop.call_later(HELLO_S_MAX, self._expire_hello)
        if self._dialled_id:
            self.write(pack(self._owner.hello(self._dialled_id)))

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
        assert self.transport is not None
        certificate = self.transport.get_extra_info("peercert")
        node = self._owner.check_hello(frame.hello, self._dialled_id, peer_identity(certificate))
        self._splitter.bytes_max = FRAME_BYTES_MAX
        if self._hello_timer:
            self._hello_timer.cancel()
        if not self._dialled_id:
            self.write(pack(self._owner.hello(node.id)))
        self.peer = node
        self._owner.established(self)

    def _expire_hello(self) -> None:
        self.is_silent = True
        if self._dialled_id:
            # Who dials says so, once for all attempts.
            self.end()
        else:
            self.cut(NO_HELLO)

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
        if isinstance(exc, ssl.SSLError) and not self.closed.done():
            # In TLS 1.3 a caller hears that its certificate is refused only after its own handshake is done.
            self.cut(reason_of(exc))
        self._ended()
        if not self.lost.done():
            self.lost.set_result(None)
        self._owner.forgotten(self)

    def _ended(self) -> None:
        if self.closed.done():
            return
        self.closed.set_result(None)
        if self._hello_timer:
            self._hello_timer.cancel()
        self._owner.ended(self)
