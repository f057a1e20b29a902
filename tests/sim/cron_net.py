"""Streams between workers and masters: in order, with delays, broken as a whole, held back by partitions.

What is sent into a partition waits, as TCP would send it again, and arrives when it heals unless the stream was given
up meanwhile: so old orders and old reports turn up late, which is what fencing tokens are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from coordinator.api.v1 import session_pb2
from coordinator.control import interface
from worker_agent import session_interface

if TYPE_CHECKING:
    from tests.sim.cron_leader import Leader
    from tests.sim.cron_worker import Process
    from tests.sim.cron_world import World

UP, DOWN = "up", "down"


@dataclass(eq=False, slots=True)
class Stream:
    """One stream of one process to one master."""

    process: Process
    number: int
    """The worker's own number of it."""
    address: str
    session: int
    leader: Leader | None = None
    """Whose session it is, from the Hello on."""
    has_worker_left: bool = False
    has_master_left: bool = False
    arrival: dict[str, float] = field(default_factory=dict)
    held: dict[str, list[Callable[[], None]]] = field(default_factory=dict)


class Network:
    """All streams that are open."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = world.rng
        self._last_session = 0
        self.streams: dict[int, Stream] = {}
        """By session number."""
        self.cut: dict[str, frozenset[str]] = {}
        """Workers that no message passes to or from, and which ways."""

    def dial(self, process: Process, number: int, address: str) -> None:
        """A process opens a stream; it hears of the outcome, unless it is cut off."""
        world, ways = self._world, self.cut.get(process.worker.id, frozenset())
        delay_s = self._rng.uniform(0.000_3, 0.005)
        if ways:
            return
        if not world.masters[address].is_up:
            event = session_interface.StreamEnded(number, "UNAVAILABLE", "connection refused")
            world.time.after(delay_s, partial(process.on_event, event))
            return
        self._last_session += 1
        stream = Stream(process, number, address, self._last_session)
        self.streams[stream.session] = stream
        process.stream = stream
        world.time.after(delay_s, partial(process.stream_opened, number))

    def send_up(self, stream: Stream, request: session_pb2.OpenRequest) -> None:
        """From the worker to the master."""
        self._deliver(stream, UP, partial(self._arrives_up, stream, request))

    def send_down(self, session: int, response: session_pb2.OpenResponse) -> None:
        """From the leader to the worker; nothing when the session has ended."""
        stream = self.streams.get(session)
        if stream is not None and not stream.has_master_left:
            self._deliver(stream, DOWN, partial(self._arrives_down, stream, response))

    def hang_up(self, stream: Stream) -> None:
        """The worker ends the stream; the master learns of it."""
        if not stream.has_worker_left:
            stream.has_worker_left = True
            self._deliver(stream, UP, partial(self._master_learns, stream))

    def vanish(self, stream: Stream) -> None:
        """The worker's machine is gone: nobody tells the master."""
        stream.has_worker_left = True

    def close(self, session: int, is_told: bool = True) -> None:
        """The master ends the stream; the worker learns of it, unless the master's machine is gone."""
        stream = self.streams.get(session)
        if stream is None or stream.has_master_left:
            return
        stream.has_master_left = True
        if stream.has_worker_left:
            del self.streams[session]
        elif is_told:
            ended = session_interface.StreamEnded(stream.number, "UNAVAILABLE", "the master ended it")
            self._deliver(stream, DOWN, partial(self._worker_learns, stream, ended))

    def break_stream(self, stream: Stream) -> None:
        """Both ends learn that it is broken."""
        self.hang_up(stream)
        ended = session_interface.StreamEnded(stream.number, "UNAVAILABLE", "connection reset")
        self._world.time.after(self._rng.uniform(0.001, 0.2), partial(stream.process.on_event, ended))

    def heal(self, worker_id: str) -> None:
        """The partition of a worker ends: what waited goes on."""
        if self.cut.pop(worker_id, None) is None:
            return
        for stream in list(self.streams.values()):
            if stream.process.worker.id == worker_id:
                for way, waiting in stream.held.items():
                    for arrive in waiting:
                        self._deliver(stream, way, arrive)
                stream.held = {}

    def _deliver(self, stream: Stream, way: str, arrive: Callable[[], None]) -> None:
        if way in self.cut.get(stream.process.worker.id, ()):
            stream.held.setdefault(way, []).append(arrive)
            return
        time = max(self._world.time.now + self._rng.uniform(0.000_3, 0.005), stream.arrival.get(way, 0.0))
        stream.arrival[way] = time
        self._world.time.at(time, arrive)

    def _arrives_up(self, stream: Stream, request: session_pb2.OpenRequest) -> None:
        if stream.has_master_left:
            return
        leader = self._world.leader
        if stream.leader is None:
            if leader is None or leader.master.id != stream.address:
                address = "" if leader is None else leader.master.id
                redirect = session_pb2.Redirect(leader_address=address, reason="it does not lead")
                self.send_down(stream.session, session_pb2.OpenResponse(redirect=redirect))
                self.close(stream.session)
                return
            stream.leader = leader
        stream.leader.take(stream.session, stream.process.worker.id, request)

    def _arrives_down(self, stream: Stream, response: session_pb2.OpenResponse) -> None:
        if stream.has_worker_left:
            return
        stream.process.on_event(session_interface.Received(stream.number, response))

    def _master_learns(self, stream: Stream) -> None:
        self.streams.pop(stream.session, None)
        if not stream.has_master_left:
            stream.has_master_left = True
            if stream.leader is not None:
                stream.leader.tell(interface.SessionClosed(stream.session, stream.process.worker.id))

    def _worker_learns(self, stream: Stream, ended: session_interface.StreamEnded) -> None:
        self.streams.pop(stream.session, None)
        if not stream.has_worker_left:
            stream.process.on_event(ended)
