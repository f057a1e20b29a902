"""The network between simulated masters: connections as TCP makes them, and what breaks them.

Within one direction of one connection order is kept; between connections there is none. Nothing is lost but with its
connection. A direction can be a hole: what is sent into it waits, as TCP's retransmission would, and comes out when the
hole is closed, also what a process sent that has closed the connection since. A connection is taken in by the machine,
not by the process, so it stands before anybody accepts it. What is sent in one piece may come in two.

The ends are transports of asyncio; the masters' own code (raft/transport.py, raft/link.py) runs on them unchanged.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sim.event_loop import SimLoop
    from tests.sim.raft_world import World

RETRANSMIT_S = 1.0
"""The first packet to a machine without power is sent once more after so long."""
SPLIT_SHARE = 0.05


class Sign(Enum):
    """What travels beside bytes."""

    OPEN = auto()
    OPENED = auto()
    CLOSE = auto()
    RESET = auto()


Item = bytes | Sign


class Endpoint(asyncio.Transport):
    """One end of one connection, in the life of one process."""

    def __init__(self, connection: Connection, loop: SimLoop, id: str, peer_id: str) -> None:
        super().__init__()
        self.id = id
        self.peer_id = peer_id
        self.connected: asyncio.Future[None] = loop.create_future()
        """At the end that dialled: done once the other machine has answered."""
        self._connection = connection
        self._loop = loop
        self._protocol: asyncio.Protocol | None = None
        self._early: list[Item] = []
        """What came before there was somebody to take it."""
        self._is_closing = False

    # The network calls this

    def take(self, item: Item) -> None:
        """Something has come; the process hears of it when it does anything."""
        self._loop.call_soon(self._take, item)

    def _take(self, item: Item) -> None:
        if self._is_closing:
            return
        if not self.connected.done() and item in (Sign.OPENED, Sign.RESET):
            if item is Sign.OPENED:
                self.connected.set_result(None)
            else:
                self.connected.set_exception(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))
        elif self._protocol is None:
            self._early.append(item)
        elif isinstance(item, bytes):
            self._protocol.data_received(item)
        elif item is Sign.CLOSE:
            self._protocol.eof_received()
            self.close()
        elif item is Sign.RESET:
            self._close(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"))

    # The event loop calls this

    def attach(self, protocol: asyncio.Protocol) -> None:
        """From now on the protocol hears of everything."""
        self._protocol = protocol
        protocol.connection_made(self)
        early, self._early = self._early, []
        for item in early:
            self._take(item)

    # Protocols and servers call these

    def write(self, data: Any) -> None:
        if not self._is_closing and not self._loop.is_dead:
            self._connection.send(self.id, bytes(data))

    def close(self) -> None:
        self._close(None)

    abort = close

    def _close(self, error: Exception | None) -> None:
        if not self._is_closing and not self._loop.is_dead:
            self._is_closing = True
            self._connection.close(self.id)
            self._loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        if self._protocol is not None:
            self._protocol.connection_lost(error)

    def is_closing(self) -> bool:
        return self._is_closing

    def get_write_buffer_size(self) -> int:
        return self._connection.network.congested.get((self.id, self.peer_id), 0)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self.peer_id, 0) if name == "peername" else default


class Listener:
    """A socket on which a process takes connections in. `listen` makes it heard of."""

    def __init__(self, network: Network, loop: SimLoop, id: str) -> None:
        self.loop = loop
        self._network = network
        self._id = id
        self._arrived: deque[Endpoint] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def listen(self, backlog: int) -> None:
        """From now on connections are made."""
        self._network.listeners[self._id] = self

    def take(self, endpoint: Endpoint) -> None:
        """The machine has made a connection."""
        self._arrived.append(endpoint)
        self.loop.call_soon(self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def accept(self, loop: SimLoop) -> Endpoint:
        """The next connection. Raises OSError once the socket is shut down."""
        while not self._arrived:
            self._waiter = loop.create_future()
            await self._waiter
        return self._arrived.popleft()

    def shutdown(self, how: int) -> None:
        """Takes nobody in any more."""
        self._network.listeners.pop(self._id, None)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(OSError(errno.EINVAL, "Invalid argument"))

    def close(self) -> None:
        """The same, and whoever was not accepted is turned away."""
        self._network.listeners.pop(self._id, None)
        for endpoint in self._arrived:
            endpoint.close()
        self._arrived.clear()


class Connection:
    """One TCP connection. A side that is not in `open_at` neither sends nor takes."""

    def __init__(self, network: Network, loop: SimLoop, dialler: str, answerer: str) -> None:
        self.network = network
        self.open_at = {dialler}
        self.is_broken = False
        """What is on its way is lost."""
        self.ends = {dialler: Endpoint(self, loop, dialler, answerer)}
        self.peer = {dialler: answerer, answerer: dialler}
        self._due_s: dict[str, float] = {dialler: 0.0, answerer: 0.0}
        self._waiting: dict[str, list[Item]] = {dialler: [], answerer: []}

    def send(self, from_id: str, item: Item) -> None:
        """Sends; it arrives after all that was sent before it in this direction."""
        if from_id not in self.open_at:
            return
        if isinstance(item, bytes) and (place := self.network.split(from_id, self.peer[from_id], len(item))):
            self._send(from_id, item[:place])
            item = item[place:]
        self._send(from_id, item)

    def _send(self, from_id: str, item: Item) -> None:
        to_id = self.peer[from_id]
        if (from_id, to_id) in self.network.holes:
            self._waiting[from_id].append(item)
            return
        network = self.network
        due_s = network.world.masters[from_id].time_s() + network.delay_s(from_id, to_id)
        self._due_s[from_id] = due_s = max(due_s, self._due_s[from_id])
        network.world.at(due_s, lambda: self._arrive(from_id, to_id, item))

    def hole_closed(self, from_id: str) -> None:
        """What waited goes."""
        items, self._waiting[from_id] = self._waiting[from_id], []
        for item in items:
            self._send(from_id, item)

    def close(self, id: str) -> None:
        """One side closes; the other hears of it behind all that was sent."""
        if id in self.open_at:
            self._send(id, Sign.CLOSE)
            self.open_at.discard(id)

    def vanish(self, id: str) -> None:
        """One side is gone without a word."""
        self.open_at.discard(id)

    def break_off(self) -> None:
        """Breaks, with all that is on its way."""
        self.is_broken = True
        for id in sorted(self.open_at):
            self.network.world.after(self.network.delay_s(self.peer[id], id), lambda id=id: self._reset(id))  # type: ignore[misc]

    def _reset(self, id: str) -> None:
        if id in self.open_at:
            self.ends[id].take(Sign.RESET)

    def _arrive(self, from_id: str, to_id: str, item: Item) -> None:
        if self.is_broken:
            return
        if item is Sign.OPEN:
            self._open(from_id, to_id)
        elif to_id in self.open_at:
            self.ends[to_id].take(item)
        elif self.network.world.masters[to_id].is_powered and item is not Sign.RESET:
            # The answer to what nobody takes.
            self._send(to_id, Sign.RESET)

    def _open(self, from_id: str, to_id: str) -> None:
        listener = self.network.listeners.get(to_id)
        if listener is not None:
            self.ends[to_id] = endpoint = Endpoint(self, listener.loop, to_id, from_id)
            self.open_at.add(to_id)
            endpoint.connected.set_result(None)
            listener.take(endpoint)
            self._send(to_id, Sign.OPENED)
        elif self.network.world.masters[to_id].is_powered:
            self._send(to_id, Sign.RESET)
        elif from_id in self.open_at:
            self.network.world.after(RETRANSMIT_S, lambda: self.send(from_id, Sign.OPEN))


class Network:
    """Delays and holes of all directions. Each direction draws from its own generator: no order of calls matters."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.holes: set[tuple[str, str]] = set()
        self.congested: dict[tuple[str, str], int] = {}
        """Directions in which so many bytes are said to wait, though they go on."""
        self.delay_s_max = 0.005
        self.connections: list[Connection] = []
        self.listeners: dict[str, Listener] = {}
        """Who takes connections in, by the master's id."""
        self._seed = seed
        self._generators: dict[tuple[str, str], random.Random] = {}

    def _generator(self, from_id: str, to_id: str) -> random.Random:
        generator = self._generators.get((from_id, to_id))
        if generator is None:
            generator = self._generators[from_id, to_id] = random.Random(f"{self._seed} {from_id} {to_id}")
        return generator

    def delay_s(self, from_id: str, to_id: str) -> float:
        """How long the next packet takes; most are fast, some take the whole of `delay_s_max`."""
        return 0.000_05 + self.delay_s_max * self._generator(from_id, to_id).random() ** 3

    def split(self, from_id: str, to_id: str, size: int) -> int:
        """Where a piece of so many bytes is cut in two; 0 for nowhere."""
        generator = self._generator(from_id, to_id)
        return generator.randrange(size) if generator.random() < SPLIT_SHARE else 0

    def dial(self, loop: SimLoop, dialler: str, answerer: str) -> Endpoint:
        """The end of a connection whose first packet is on its way."""
        self.connections = [connection for connection in self.connections if connection.open_at]
        connection = Connection(self, loop, dialler, answerer)
        self.connections.append(connection)
        connection.send(dialler, Sign.OPEN)
        return connection.ends[dialler]

    def process_ended(self, id: str, *, is_silent: bool) -> None:
        """A process is gone; its machine says so unless that is gone too."""
        self.listeners.pop(id, None)
        for connection in self.connections:
            if is_silent:
                connection.vanish(id)
            else:
                connection.close(id)

    def open_holes(self, directions: set[tuple[str, str]]) -> None:
        """Nothing passes in these directions any more."""
        self.holes = self.holes | directions

    def close_holes(self, directions: set[tuple[str, str]]) -> None:
        """Everything passes again in these directions."""
        closed = sorted(self.holes & directions)
        self.holes = self.holes - directions
        for from_id, to_id in closed:
            for connection in self.connections:
                if connection.peer.get(from_id) == to_id:
                    connection.hole_closed(from_id)
