"""Connections between masters: one per pair, over asyncio, carrying the frames of frames.py.

Who dials: of two masters, the one whose id sorts higher dials the other, again and again with a growing
pause: 50 to 200 ms while nobody answers there, up to 5 s where the one that listens refuses. Both say PeerHello
first, and each checks protocol version, cluster name and identity (where both know it), that it is meant, and that
the other is a known peer; who fails is cut off and named in the log. A newer connection of the same peer replaces
the older one, which its owner may not yet know to be dead.

Bounds: a stranger may send 4 KiB, has 2 s for its hello, and there are at most 64 of them; a peer's frame
has at most 16 MiB. What a peer does not read piles up to SEND_BYTES_MAX, then its connection is dropped: the
engine sends again what is missing once it is back. Appends stop earlier, at CONGESTED_BYTES, so that a
follower is not dropped for being slow. Frames of one turn of the event loop go out in one write.

A peer that vanished without a word is noticed by silence: every link carries something at least every
quarter of `idle_s`, if need be a frame of length 0, and one that was silent for `idle_s` is closed.

Under mutual TLS both sides show a certificate of the cluster's authority. Who dials checks the peer's name in the
handshake; `check_hello` holds the hello of either side to its certificate: role master, this cluster, that id. A
stranger's 2 s and its place among the 64 begin with the connection, so the handshake is within both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

from pysyncobj.node import Node
from pysyncobj.transport import Transport

from coordinator.api.v1 import peer_pb2
from coordinator.model.errors import ConfigError
from coordinator.raft.address import PeerAddress, parse_address
from coordinator.raft.figures import Traffic, kind_of
from coordinator.raft.frames import KEEP_ALIVE, PROTOCOL_VERSION, Message, ProtocolViolation, pack, to_frame
from coordinator.raft.link import HELLO_S_MAX, NO_HELLO, SEND_BYTES_MAX, Link
from coordinator.raft.listener import listen
from coordinator.security.certificates import Identity
from coordinator.security.credentials import Credentials
from coordinator.security.tls import reason_of

CONGESTED_BYTES = 2 << 20
STRANGERS_MAX = 64
BACKLOG = 100
REDIAL_S_MIN = 0.05
REDIAL_S_MAX = 0.2
"""Well below an election timeout: a leader that is lost just after another master came back leaves two that must reach
each other before either can be elected."""
REFUSED_S_MAX = 5.0
"""Who is refused for what it is has to be mended by people, and every attempt is a line in the other's log."""
ACCEPT_RETRY_S = 1.0

log = logging.getLogger(__name__)


def _same(link: Link) -> Link:
    return link


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
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(None, None, None)
        self.self_id = own.id
        self.loop: asyncio.AbstractEventLoop
        self.nodes: dict[str, Node] = {peer.id: Node(peer.id) for peer in peers}
        self.on_activity: Callable[[], None] = lambda: None
        self.on_unsent: Callable[[Node, Message], None] = lambda node, message: None
        self.on_failure: Callable[[Exception], None] = lambda error: None
        self.describe: Callable[[peer_pb2.PeerHello], None] = lambda hello: None
        self.check_peer: Callable[[peer_pb2.PeerHello], None] = lambda hello: None
        self.told: dict[str, peer_pb2.PeerHello] = {}
        """What each peer said of itself when it was connected the last time, by its id."""
        self._moved: dict[str, PeerAddress] = {}
        self.traffic = Traffic()
        self._own = own
        self._peers = peers
        self._cluster_name = cluster_name
        self._idle_s = idle_s
        self._incarnation = uuid.uuid4().hex
        self._credentials = credentials
        self._ssl_server = credentials.server_context() if credentials else None
        self._ssl_client = credentials.client_context() if credentials else None
        self._listeners: list[socket.socket] = []
        self._acceptors: list[asyncio.Task[None]] = []
        self._welcomes: dict[asyncio.Task[None], socket.socket] = {}
        """Connections that were accepted and are not links yet."""
        self._dialers: list[asyncio.Task[None]] = []
        self._links: dict[str, Link] = {}
        self._strangers: set[Link] = set()
        self._open: dict[Link, None] = {}
        """Links whose socket is open, whether or not they may still be used, in the order in which they were opened."""
        self._checked_at = 0.0
        self._is_stopped = False

    # Life

    async def bind(self) -> None:
        """Takes the peer port, without answering yet. Raises ConfigError when it cannot be had."""
        self.loop = asyncio.get_running_loop()
        own = self._own
        try:
            self._listeners = await listen(own.host, own.port)
        except OSError as error:
            problem = f"peer port {own.host}:{own.port} of master {own.id} cannot be used: {error.strerror or error}"
            raise ConfigError([f"{problem}; stop what uses it or change peer_address"]) from None

    async def open(self) -> None:
        """Starts to answer and to dial."""
        for listener in self._listeners:
            listener.listen(BACKLOG)
            self._acceptors.append(self.loop.create_task(self._accept(listener), name="accept peers"))
        self._checked_at = self.loop.time()
        for peer in self._peers:
            if self.self_id > peer.id:
                self._dialers.append(self.loop.create_task(self._dial(peer), name=f"dial {peer.id}"))

    async def close(self) -> None:
        """Ends everything; safe to call twice."""
        self._is_stopped = True
        for listener in self._listeners:
            # Where the system allows it `_accept` ends by this; a cancelled one may drop a socket that it just got.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        if self._acceptors:
            await asyncio.wait(self._acceptors, timeout=0.05)
        tasks = [*self._dialers, *self._acceptors, *self._welcomes]
        arriving = list(self._welcomes.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._dialers.clear()
        self._acceptors.clear()
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for link in list(self._open):
            link.end()
        if self._open:
            await asyncio.wait([link.lost for link in self._open], timeout=1.0)
        for connection in arriving:
            connection.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, where = await self.loop.sock_accept(listener)
            except ConnectionError:
                continue
            except OSError as error:
                if self._is_stopped:
                    return
                # Out of files, most likely: whoever comes waits until there are some again.
                log.warning("%s: cannot take connections: %s", self.self_id, error.strerror or error)
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            address = f"{where[0]}:{where[1]}"
            if len(self._welcomes) + len(self._strangers) >= STRANGERS_MAX:
                log.warning("%s: cut the connection to %s: too many have not said who they are", self.self_id, address)
                connection.close()
                continue
            welcome = self.loop.create_task(self._welcome(connection, address), name=f"welcome {address}")
            self._welcomes[welcome] = connection
            welcome.add_done_callback(lambda done: self._welcomes.pop(done, None))

    async def _welcome(self, connection: socket.socket, address: str) -> None:
        """Makes a link of a connection, after the handshake where there is one. The loop closes what fails."""
        link = Link(self, "")
        try:
            async with asyncio.timeout(HELLO_S_MAX):
                await self.loop.connect_accepted_socket(lambda: link, connection, ssl=self._ssl_server)
        except TimeoutError:
            problem = f"no TLS handshake within {HELLO_S_MAX:g} s"
            log.warning("%s: cut the connection to %s: %s", self.self_id, address, problem)
            self._abandon(link)
        except OSError as error:
            log.warning("%s: cut the connection to %s: %s", self.self_id, address, reason_of(error))
            self._abandon(link)

    def _abandon(self, link: Link) -> None:
        """Ends a connection whose making was given up; it may have been made all the same.

        After a pause of the whole process both are due at once: the hello that came, and the end of the time for it.
        The event loop then closes the transport without a word to the link, which would pass for a good one.
        """
        link.end()
        self.forgotten(link)

    async def _dial(self, peer: PeerAddress) -> None:
        pause_s = REDIAL_S_MIN
        last_problem = ""
        while True:
            problem, pause_s_max = "", REDIAL_S_MAX
            place = self._moved.get(peer.id, peer)
            link = Link(self, peer.id)
            try:
                async with asyncio.timeout(HELLO_S_MAX):
                    make: Callable[[], Link] = partial(_same, link)
                    await self.loop.create_connection(
                        make,
                        place.host,
                        place.port,
                        ssl=self._ssl_client,
                        server_hostname=self._credentials.peer_name(peer.id) if self._credentials else None,
                    )
            except (OSError, TimeoutError) as error:
                problem = reason_of(error)
                if isinstance(error, ssl.SSLError):
                    pause_s_max = REFUSED_S_MAX
                self._abandon(link)
            else:
                await link.closed
                if link.peer is not None:
                    pause_s, last_problem = REDIAL_S_MIN, ""
                elif link.is_silent:
                    # Its machine took the connection and the process stands still; it may go on at any moment.
                    problem = NO_HELLO
                else:
                    problem = "it closed the connection without a hello; its log says why"
                    pause_s_max = REFUSED_S_MAX
            if problem and problem != last_problem:
                where = f"master {peer.id} at {place.host}:{place.port}"
                log.warning("%s: no connection to %s: %s", self.self_id, where, problem)
                last_problem = problem
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, pause_s_max)

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
        frame = peer_pb2.PeerFrame(
            hello=peer_pb2.PeerHello(
                protocol_version=PROTOCOL_VERSION,
                from_id=self.self_id,
                to_id=to_id,
                cluster_name=self._cluster_name,
                incarnation=self._incarnation,
            )
        )
        self.describe(frame.hello)
        return frame

    def check_hello(self, hello: peer_pb2.PeerHello, expected_id: str, certified: Identity | None) -> Node:
        """The peer that says this; `expected_id` is empty for one that dialled. Raises ProtocolViolation."""
        if hello.protocol_version != PROTOCOL_VERSION:
            spoken = hello.protocol_version
            raise ProtocolViolation(f"it speaks protocol {spoken}, this master speaks {PROTOCOL_VERSION}")
        if hello.cluster_name != self._cluster_name:
            raise ProtocolViolation(f"it belongs to cluster {hello.cluster_name!r}, this one is {self._cluster_name!r}")
        if hello.to_id != self.self_id:
            raise ProtocolViolation(f"it wants master {hello.to_id!r}, this is {self.self_id!r}")
        node = self.nodes.get(hello.from_id)
        if node is None or (expected_id and hello.from_id != expected_id):
            wanted = expected_id or "one of " + ", ".join(sorted(self.nodes))
            raise ProtocolViolation(f"it calls itself {hello.from_id!r}, but {wanted} is expected")
        if self._credentials is not None and certified != self._credentials.peer(hello.from_id):
            shown = certified.uri if certified is not None else "nobody that this cluster knows"
            raise ProtocolViolation(f"it calls itself {hello.from_id!r}, but its certificate is of {shown}")
        self.check_peer(hello)
        self.told[hello.from_id] = hello
        return node

    def opened(self, link: Link) -> None:
        """A socket is open."""
        self._open[link] = None

    def forgotten(self, link: Link) -> None:
        """A socket is closed."""
        self._open.pop(link, None)

    def admit(self, link: Link) -> str:
        """Counts a new connection among the strangers; why it may not be one, else nothing."""
        if self._is_stopped:
            return "this master stops"
        if len(self._strangers) >= STRANGERS_MAX:
            return "too many connections that have not said who they are"
        self._strangers.add(link)
        return ""

    def established(self, link: Link) -> None:
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

    def ended(self, link: Link) -> None:
        """A connection is no more."""
        self._strangers.discard(link)
        if link.peer is not None and self._links.get(link.peer.id) is link:
            del self._links[link.peer.id]
            log.info("%s: lost the connection to master %s", self.self_id, link.peer.id)
            self._onNodeDisconnected(link.peer)
            self.on_activity()

    def deliver(self, node: Node, message: Message) -> None:
        """Hands a message to the engine."""
        self.traffic.received[kind_of(message)] += 1
        self._onMessageReceived(node, message)

    # PySyncObj and the engine call these

    @property
    def connected_ids(self) -> tuple[str, ...]:
        """Peers with a link, sorted."""
        return tuple(sorted(self._links))

    @property
    def queued_bytes(self) -> dict[str, int]:
        """What waits for each connected peer to read it, by its id."""
        return {id: link.queued_bytes for id, link in sorted(self._links.items())}

    def disk_of(self, id: str) -> str:
        """The data directory that a peer said it has; empty for one that was never connected."""
        return self.told[id].disk_id if id in self.told else ""

    def move(self, id: str, address: str) -> None:
        """Dials a peer at another place from now on; at the configured one when `address` is empty."""
        before = self._moved.pop(id, None)
        if address:
            self._moved[id] = parse_address(id, address)
        if before != self._moved.get(id) and self.self_id > id and (link := self._links.get(id)):
            link.end()

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
        self.traffic.sent[kind_of(message)] += 1
        link.write(pack(to_frame(message)))
        return True

    def addNode(self, node: Any) -> None:
        raise NotImplementedError("the masters are fixed by the configuration")

    dropNode = addNode

    def destroy(self) -> None:
        """PySyncObj's way of closing; `close` does it."""
