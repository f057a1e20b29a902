"""The network between simulated masters: connections as TCP makes them, and what breaks them.

Within one direction of one connection order is kept; between connections there is none. Nothing is lost but with its
connection. A direction can be a hole: what is sent into it waits, as TCP's retransmission would, and comes out when the
hole is closed, unless a side gave the connection up before. The transport's rules are played as transport.py has them:
the higher id dials with a growing pause, a newer connection replaces the older one, silence for `idle_s` closes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from pysyncobj.node import Node
from pysyncobj.transport import Transport

from coordinator.api.v1 import peer_pb2
from coordinator.raft.frames import KEEP_ALIVE, Message, ProtocolViolation, pack, parse, to_frame, to_message
from coordinator.raft.link import HELLO_S_MAX
from coordinator.raft.transport import REDIAL_S_MAX, REDIAL_S_MIN

if TYPE_CHECKING:
    from tests.sim.raft_master import Master
    from tests.sim.raft_world import World

RETRANSMIT_S = 1.0
"""A first packet that went into a hole is sent once more after so long."""
_HELLO = b"hello"
"""What a PeerHello begins with here; a frame never does."""
_CLOSE = b"close"


class Connection:
    """One TCP connection. A side that is not in `open_at` neither sends nor takes."""

    def __init__(self, network: Network, dialler: str, answerer: str) -> None:
        self.network = network
        self.open_at = {dialler, answerer}
        self.is_broken = False
        """What is on its way is lost."""
        self._peer = {dialler: answerer, answerer: dialler}
        self._due_s: dict[str, float] = {dialler: 0.0, answerer: 0.0}
        self._waiting: dict[str, list[bytes]] = {dialler: [], answerer: []}

    def send(self, from_id: str, item: bytes) -> None:
        """Sends; it arrives after all that was sent before it in this direction."""
        if from_id in self.open_at:
            self._send(from_id, item)

    def _send(self, from_id: str, item: bytes) -> None:
        to_id = self._peer[from_id]
        if (from_id, to_id) in self.network.holes:
            self._waiting[from_id].append(item)
            return
        network = self.network
        due_s = network.world.masters[from_id].time_s() + network.delay_s(from_id, to_id)
        self._due_s[from_id] = due_s = max(due_s, self._due_s[from_id])
        network.world.at(due_s, lambda: self._arrive(to_id, item))

    def hole_closed(self, from_id: str) -> None:
        """What waited goes."""
        items, self._waiting[from_id] = self._waiting[from_id], []
        for item in items:
            self._send(from_id, item)

    def close(self, id: str) -> None:
        """One side closes; the other hears of it behind all that was sent."""
        if id in self.open_at:
            self._send(id, _CLOSE)
            self.open_at.discard(id)

    def vanish(self, id: str) -> None:
        """One side is gone without a word."""
        self.open_at.discard(id)

    def break_off(self) -> None:
        """Breaks, with all that is on its way."""
        self.is_broken = True
        for id in sorted(self.open_at):
            self._tell_closed_later(id)

    def _arrive(self, to_id: str, item: bytes) -> None:
        if self.is_broken:
            return
        if to_id in self.open_at:
            self.network.world.masters[to_id].enqueue(lambda master: master.links.take(self, self._peer[to_id], item))
        elif self.network.world.masters[to_id].is_powered:
            # The answer to what nobody takes: a reset.
            from_id = self._peer[to_id]
            if (to_id, from_id) not in self.network.holes:
                self._tell_closed_later(from_id)

    def _tell_closed_later(self, id: str) -> None:
        self.network.world.after(self.network.delay_s(self._peer[id], id), lambda: self._told_closed(id))

    def _told_closed(self, id: str) -> None:
        if id in self.open_at:
            self.network.world.masters[id].enqueue(lambda master: master.links.closed(self, self._peer[id]))


class Network:
    """Delays and holes of all directions. Each direction draws from its own generator: no order of calls matters."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.holes: set[tuple[str, str]] = set()
        self.congested: set[tuple[str, str]] = set()
        """Directions in which as much waits as transport.py lets wait, though it goes on."""
        self.delay_s_max = 0.005
        self.connections: list[Connection] = []
        self._seed = seed
        self._generators: dict[tuple[str, str], random.Random] = {}

    def delay_s(self, from_id: str, to_id: str) -> float:
        """How long the next packet takes; most are fast, some take the whole of `delay_s_max`."""
        generator = self._generators.get((from_id, to_id))
        if generator is None:
            generator = self._generators[from_id, to_id] = random.Random(f"{self._seed} {from_id} {to_id}")
        return 0.000_05 + self.delay_s_max * generator.random() ** 3

    def connect(self, dialler: str, answerer: str, hello: bytes) -> Connection:
        """A connection whose first packet is on its way."""
        self.connections = [connection for connection in self.connections if connection.open_at]
        connection = Connection(self, dialler, answerer)
        self.connections.append(connection)
        connection.send(dialler, hello)
        return connection

    def open_holes(self, directions: set[tuple[str, str]]) -> None:
        """Nothing passes in these directions any more."""
        self.holes = self.holes | directions

    def close_holes(self, directions: set[tuple[str, str]]) -> None:
        """Everything passes again in these directions."""
        closed = sorted(self.holes & directions)
        self.holes = self.holes - directions
        for from_id, to_id in closed:
            for connection in self.connections:
                if connection._peer.get(from_id) == to_id:
                    connection.hole_closed(from_id)


class SimLinks(Transport):  # type: ignore[misc]
    """The transport of one life of one master, on its side of its connections."""

    def __init__(self, network: Network, master: Master, peers: list[str], idle_s: float) -> None:
        super().__init__(None, None, None)
        self.self_id = master.id
        self.nodes = {id: Node(id) for id in peers}
        self.on_unsent: Callable[[Node, Message], None] = lambda node, message: None
        self.describe: Callable[[peer_pb2.PeerHello], None] = lambda hello: None
        self.check_peer: Callable[[peer_pb2.PeerHello], None] = lambda hello: None
        self.told: dict[str, peer_pb2.PeerHello] = {}
        self._network = network
        self._master = master
        self._idle_s = idle_s
        self._links: dict[str, Connection] = {}
        self._received_s: dict[str, float] = {}
        self._sent_s: dict[str, float] = {}
        self._checked_s = master.monotonic_s()
        self._dials: dict[str, tuple[Connection | None, float]] = {}
        """Per peer that this side dials: the attempt, and when it fails or (without one) when the next begins."""
        self._pause_s = dict.fromkeys(peers, REDIAL_S_MIN)

    # Consensus calls these

    def send(self, node: Node, message: Message) -> bool:
        connection = self._links.get(node.id)
        if connection is None:
            self.on_unsent(node, message)
            return False
        self._sent_s[node.id] = self._master.monotonic_s()
        connection.send(self.self_id, pack(to_frame(message)))
        return True

    def is_congested(self, node: Node) -> bool:
        return node.id not in self._links or (self.self_id, node.id) in self._network.congested

    def disk_of(self, id: str) -> str:
        return self.told[id].disk_id if id in self.told else ""

    # The seat calls these

    @property
    def connected_ids(self) -> tuple[str, ...]:
        """Peers with a link, sorted."""
        return tuple(sorted(self._links))

    def move(self, id: str, address: str) -> None:
        """There are no addresses here."""

    def _hello(self) -> bytes:
        hello = peer_pb2.PeerHello(from_id=self.self_id)
        self.describe(hello)
        return _HELLO + hello.SerializeToString()

    # The network calls these

    def take(self, connection: Connection, from_id: str, item: bytes) -> None:
        """Takes what came in."""
        if self.self_id not in connection.open_at:
            return
        if item == _CLOSE:
            self.closed(connection, from_id)
        elif item.startswith(_HELLO):
            self._take_hello(connection, peer_pb2.PeerHello.FromString(item[len(_HELLO) :]))
        elif self._links.get(from_id) is connection:
            self._received_s[from_id] = self._master.monotonic_s()
            if item != KEEP_ALIVE:
                message = to_message(parse(item[4:]))
                assert message is not None
                self._onMessageReceived(self.nodes[from_id], message)
            self._master.schedule_step()

    def _take_hello(self, connection: Connection, hello: peer_pb2.PeerHello) -> None:
        try:
            self.check_peer(hello)
        except ProtocolViolation as violation:
            self._network.world.note(f"{self.self_id} cuts the connection to {hello.from_id}: {violation}")
            self.closed(connection, hello.from_id)
            return
        self.told[hello.from_id] = hello
        if self.self_id < hello.from_id:
            connection.send(self.self_id, self._hello())
        self._established(connection, hello.from_id)

    def _established(self, connection: Connection, from_id: str) -> None:
        older = self._links.pop(from_id, None)
        if older is not None:
            self._onNodeDisconnected(self.nodes[from_id])
            older.close(self.self_id)
        self._links[from_id] = connection
        self._pause_s[from_id] = REDIAL_S_MIN
        self._received_s[from_id] = self._sent_s[from_id] = self._master.monotonic_s()
        self._onNodeConnected(self.nodes[from_id])
        self._master.schedule_step()

    def closed(self, connection: Connection, from_id: str) -> None:
        """A connection ends."""
        connection.close(self.self_id)
        if self._links.get(from_id) is connection:
            del self._links[from_id]
            self._onNodeDisconnected(self.nodes[from_id])
            self._master.schedule_step()

    # The master calls these

    def check(self) -> None:
        """Dials, closes what is silent, keeps the rest alive; as PeerTransport's `check` and `_dial`."""
        now_s = self._master.monotonic_s()
        if now_s - self._checked_s > self._idle_s / 2:
            self._received_s = dict.fromkeys(self._received_s, now_s)
        self._checked_s = now_s
        for id, connection in list(self._links.items()):
            if now_s - self._received_s[id] > self._idle_s:
                self.closed(connection, id)
            elif now_s - self._sent_s[id] > self._idle_s / 4:
                self._sent_s[id] = now_s
                connection.send(self.self_id, KEEP_ALIVE)
        for id in self.nodes:
            if self.self_id > id and id not in self._links:
                self._dial(id, now_s)

    def _dial(self, id: str, now_s: float) -> None:
        attempt, due_s = self._dials.get(id, (None, 0.0))
        if attempt is not None and self.self_id in attempt.open_at and now_s < due_s:
            return
        if attempt is not None:
            attempt.close(self.self_id)
            self._dials[id] = (None, now_s + self._pause_s[id])
            self._pause_s[id] = min(2 * self._pause_s[id], REDIAL_S_MAX)
        elif now_s >= due_s:
            self._dials[id] = (self._network.connect(self.self_id, id, self._hello()), now_s + HELLO_S_MAX)

    def end(self, *, is_silent: bool) -> None:
        """The process is gone; its kernel says so unless that is gone too."""
        for connection in self._network.connections:
            if is_silent:
                connection.vanish(self.self_id)
            else:
                connection.close(self.self_id)
