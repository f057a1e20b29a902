"""Connections between masters: one per pair, over asyncio, carrying the frames of frames.py.

Who dials: of two masters, the one whose id sorts higher dials the other, again and again with a growing
pause (50 ms to 1 s). Both say PeerHello first, and each checks protocol version, cluster name, that it is
meant, and that the other is a known peer; who fails is cut off and named in the log. A newer connection of
the same peer replaces the older one, which its owner may not yet know to be dead.

Bounds: a stranger may send 4 KiB, has 2 s for its hello, and there are at most 64 of them; a peer's frame
has at most 16 MiB. What a peer does not read piles up to SEND_BYTES_MAX, then its connection is dropped: the
engine sends again what is missing once it is back. Appends stop earlier, at CONGESTED_BYTES, so that a
follower is not dropped for being slow. Frames of one turn of the event loop go out in one write.

A peer that vanished without a word is noticed by silence: every link carries something at least every
quarter of `idle_s`, if need be a frame of length 0, and one that was silent for `idle_s` is closed.

The two `ssl` parameters are the seam for mutual TLS; the check of a peer's certificate against its hello
belongs into `check_hello`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pysyncobj.node import Node
from pysyncobj.transport import Transport

from coordinator.api.v1 import peer_pb2
from coordinator.model.errors import ConfigError
from coordinator.raft.frames import (
    FRAME_BYTES_MAX,
    HELLO_BYTES_MAX,
    KEEP_ALIVE,
    PROTOCOL_VERSION,
    FrameSplitter,
    Message,
    ProtocolViolation,
    pack,
    parse,
    to_frame,
    to_message,
)

SEND_BYTES_MAX = 64 << 20
CONGESTED_BYTES = 2 << 20
HELLO_S_MAX = 2.0
STRANGERS_MAX = 64
REDIAL_S_MIN = 0.05
REDIAL_S_MAX = 1.0

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


class _Link(asyncio.Protocol):
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
        self.closed = asyncio.get_running_loop().create_future()
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
        if self.transport and not self.transport.is_closing():
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

    def _ended(self) -> None:
        if self.closed.done():
            return
        self.closed.set_result(None)
        if self._hello_timer:
            self._hello_timer.cancel()
        self._owner.ended(self)


class PeerTransport(Transport):  # type: ignore[misc]
    """PySyncObj's transport over links.

    `on_activity` is called after messages were taken in, `on_unsent` for a message that had no link to go over,
    `on_failure` with an exception that the engine raised.
    """

    def __init__(
        self,
        own: PeerAddress,
        peers: tuple[PeerAddress, ...],
        cluster_name: str,
        idle_s: float,
        *,
        ssl_server: ssl.SSLContext | None = None,
        ssl_client: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(None, None, None)
        self.self_id = own.id
        self.loop: asyncio.AbstractEventLoop
        self.nodes: dict[str, Node] = {peer.id: Node(peer.id) for peer in peers}
        self.on_activity: Callable[[], None] = lambda: None
        self.on_unsent: Callable[[Node, Message], None] = lambda node, message: None
        self.on_failure: Callable[[Exception], None] = lambda error: None
        self._own = own
        self._peers = peers
        self._cluster_name = cluster_name
        self._idle_s = idle_s
        self._incarnation = uuid.uuid4().hex
        self._ssl_server = ssl_server
        self._ssl_client = ssl_client
        self._server: asyncio.Server | None = None
        self._dialers: list[asyncio.Task[None]] = []
        self._links: dict[str, _Link] = {}
        self._strangers: set[_Link] = set()
        self._checked_at = 0.0
        self._is_stopped = False

    # Life

    async def bind(self) -> None:
        """Takes the peer port, without answering yet. Raises ConfigError when it cannot be had."""
        self.loop = asyncio.get_running_loop()
        own = self._own
        try:
            self._server = await self.loop.create_server(
                lambda: _Link(self, None), own.host, own.port, ssl=self._ssl_server, start_serving=False
            )
        except OSError as error:
            problem = f"peer port {own.host}:{own.port} of master {own.id} cannot be used: {error.strerror or error}"
            raise ConfigError([f"{problem}; stop what uses it or change peer_address"]) from None

    async def open(self) -> None:
        """Starts to answer and to dial."""
        assert self._server is not None
        await self._server.start_serving()
        self._checked_at = self.loop.time()
        for peer in self._peers:
            if self.self_id > peer.id:
                self._dialers.append(self.loop.create_task(self._dial(peer), name=f"dial {peer.id}"))

    async def close(self) -> None:
        """Ends everything; safe to call twice."""
        self._is_stopped = True
        for dialer in self._dialers:
            dialer.cancel()
        await asyncio.gather(*self._dialers, return_exceptions=True)
        self._dialers.clear()
        for link in [*self._links.values(), *self._strangers]:
            link.end()
        if self._server:
            self._server.close()
            # Connections that were accepted but not yet made into links end with the server.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 1.0)
            self._server = None

    async def _dial(self, peer: PeerAddress) -> None:
        pause_s = REDIAL_S_MIN
        last_problem = ""
        while True:
            problem = ""
            try:
                async with asyncio.timeout(HELLO_S_MAX):
                    _, link = await self.loop.create_connection(
                        lambda: _Link(self, peer), peer.host, peer.port, ssl=self._ssl_client
                    )
            except (OSError, TimeoutError) as error:
                problem = str(error) or type(error).__name__
            else:
                await link.closed
                if link.peer is not None:
                    pause_s, last_problem = REDIAL_S_MIN, ""
                else:
                    problem = "it closed the connection without a hello; its log says why"
            if problem and problem != last_problem:
                where = f"master {peer.id} at {peer.host}:{peer.port}"
                log.warning("%s: no connection to %s: %s", self.self_id, where, problem)
                last_problem = problem
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, REDIAL_S_MAX)

    def check(self, now: float) -> None:
        """Closes silent links and keeps the others alive; to be called several times per `idle_s`."""
        if now - self._checked_at > self._idle_s / 2:
            # This process stood still, so it cannot blame a peer for silence.
            for link in self._links.values():
                link.received_at = now
        self._checked_at = now
        for link in list(self._links.values()):
            if now - link.received_at > self._idle_s:
                link.cut(f"silent for {self._idle_s:g} s")
            elif now - link.sent_at > self._idle_s / 4:
                link.write(KEEP_ALIVE)

    # Links call these

    def hello(self, to_id: str) -> peer_pb2.PeerFrame:
        """What this master says first."""
        return peer_pb2.PeerFrame(
            hello=peer_pb2.PeerHello(
                protocol_version=PROTOCOL_VERSION,
                from_id=self.self_id,
                to_id=to_id,
                cluster_name=self._cluster_name,
                incarnation=self._incarnation,
            )
        )

    def check_hello(self, hello: peer_pb2.PeerHello, expected_id: str | None) -> Node:
        """The peer that says this. Raises ProtocolViolation when it may not."""
        if hello.protocol_version != PROTOCOL_VERSION:
            spoken = hello.protocol_version
            raise ProtocolViolation(f"it speaks protocol {spoken}, this master speaks {PROTOCOL_VERSION}")
        if hello.cluster_name != self._cluster_name:
            raise ProtocolViolation(f"it belongs to cluster {hello.cluster_name!r}, this one is {self._cluster_name!r}")
        if hello.to_id != self.self_id:
            raise ProtocolViolation(f"it wants master {hello.to_id!r}, this is {self.self_id!r}")
        node = self.nodes.get(hello.from_id)
        if node is None or (expected_id is not None and hello.from_id != expected_id):
            wanted = expected_id or "one of " + ", ".join(sorted(self.nodes))
            raise ProtocolViolation(f"it calls itself {hello.from_id!r}, but {wanted} is expected")
        return node

    def admit(self, link: _Link) -> bool:
        """Counts a new connection among the strangers; False when there are too many or the transport is closed."""
        if self._is_stopped or len(self._strangers) >= STRANGERS_MAX:
            return False
        self._strangers.add(link)
        return True

    def established(self, link: _Link) -> None:
        """The other side is known now."""
        assert link.peer is not None
        self._strangers.discard(link)
        older = self._links.pop(link.peer.id, None)
        if older:
            self._onNodeDisconnected(link.peer)
            older.end()
        self._links[link.peer.id] = link
        log.info("%s: connected to master %s", self.self_id, link.name)
        self._onNodeConnected(link.peer)

    def ended(self, link: _Link) -> None:
        """A connection is no more."""
        self._strangers.discard(link)
        if link.peer is not None and self._links.get(link.peer.id) is link:
            del self._links[link.peer.id]
            log.info("%s: lost the connection to master %s", self.self_id, link.peer.id)
            self._onNodeDisconnected(link.peer)
            self.on_activity()

    def deliver(self, node: Node, message: Message) -> None:
        """Hands a message to the engine."""
        self._onMessageReceived(node, message)

    # PySyncObj and the engine call these

    @property
    def connected_ids(self) -> tuple[str, ...]:
        """Peers with a link, sorted."""
        return tuple(sorted(self._links))

    def is_congested(self, node: Node) -> bool:
        """True when a peer has enough to read; also when it has no link."""
        link = self._links.get(node.id)
        return link is None or link.queued_bytes > CONGESTED_BYTES

    def send(self, node: Node, message: Message) -> bool:
        link = self._links.get(node.id)
        if link is None:
            self.on_unsent(node, message)
            return False
        if link.queued_bytes > SEND_BYTES_MAX:
            link.cut(f"it left {link.queued_bytes} bytes unread")
            self.on_unsent(node, message)
            return False
        link.write(pack(to_frame(message)))
        return True

    def addNode(self, node: Any) -> None:
        raise NotImplementedError("the masters are fixed by the configuration")

    dropNode = addNode

    def destroy(self) -> None:
        """PySyncObj's way of closing; `close` does it."""
