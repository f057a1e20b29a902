"""The network of a simulated cluster with masters and workers: among workers as replica_net.py has it, and sessions.

A session stream is a connection from a worker to a master: in order each way, late, with one-way holes in which what
was sent waits, and lost with the process at either end. Whoever closes it is heard behind all that it sent; a machine
without power says nothing, and then nobody notices but by silence.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tests.sim.replica_net import Net

if TYPE_CHECKING:
    from tests.sim.cluster_world import WorkerSide, World


class SessionStream:
    """One stream. An end that is not in `open_at` neither sends nor takes. `number` is the worker's."""

    def __init__(self, net: ClusterNet, worker: str, number: int, master: str) -> None:
        self.worker = worker
        self.number = number
        self.master = master
        self.open_at = {worker, master}
        self._net = net
        self._peer = {worker: master, master: worker}
        self._due_s = {worker: 0.0, master: 0.0}
        self._waiting: dict[str, list[Any]] = {worker: [], master: []}
        self._is_broken = False

    def send(self, sender: str, item: Any) -> None:
        """Sends; it arrives behind all that was sent before it in this direction. None stands for the end."""
        if sender not in self.open_at:
            return
        if item is None:
            self.open_at.discard(sender)
        self._send(sender, item)

    def close(self, sender: str) -> None:
        """One end closes."""
        self.send(sender, None)

    def _send(self, sender: str, item: Any) -> None:
        receiver = self._peer[sender]
        if (sender, receiver) in self._net.holes:
            self._waiting[sender].append(item)
            return
        cluster = self._net.cluster
        sent_s = cluster.masters[sender].time_s() if sender == self.master else cluster.now_s
        self._due_s[sender] = due_s = max(sent_s + self._net.delay_s(), self._due_s[sender])
        cluster.at(due_s, lambda: self._arrive(sender, receiver, item))

    def go_on(self, sender: str) -> None:
        """A hole closed: what waited goes."""
        items, self._waiting[sender] = self._waiting[sender], []
        for item in items:
            self._send(sender, item)

    def vanish(self, end: str) -> None:
        """One end is gone without a word."""
        self.open_at.discard(end)

    def break_off(self) -> None:
        """Both ends hear that the connection is gone; what is on its way goes with it."""
        self._is_broken = True
        for end in sorted(self.open_at):
            self._net.cluster.after(self._net.delay_s(), lambda end=end: self._tell(end, None))  # type: ignore[misc]

    def _arrive(self, sender: str, receiver: str, item: Any) -> None:
        if receiver not in self.open_at or self._is_broken:
            return
        is_there = self._net.cluster.is_there(receiver)
        if is_there is None:
            return
        if is_there:
            self._tell(receiver, item)
        else:
            # The answer to what nobody takes: a reset.
            self.open_at.discard(receiver)
            self._net.cluster.after(self._net.delay_s(), lambda: self._tell(sender, None))

    def _tell(self, end: str, item: Any) -> None:
        cluster = self._net.cluster
        if end not in self.open_at:
            return
        if end == self.master:
            cluster.masters[end].enqueue(lambda master: cluster.lead_of(master).take(self, item))
        else:
            cluster.workers.workers[end].enqueue(lambda worker: cluster.agent_of(worker).take_session(self, item))


class ClusterNet(Net):
    """Adds the sessions, and holes between workers and masters."""

    def __init__(self, side: WorkerSide, cluster: World, rng: random.Random) -> None:
        super().__init__(side, rng)
        self.cluster = cluster
        self.sessions: list[SessionStream] = []
        self._wanted: dict[str, tuple[str, ...]] = {}
        """Whom each worker wants a stream to: those that replicate a shard with it."""

    def follow(self, opener: str, wanted: tuple[str, ...]) -> None:
        """Opens and ends a worker's streams to others; as Replication.follow."""
        before, self._wanted[opener] = self._wanted.get(opener, ()), wanted
        for other in before:
            stream = self.streams.get((opener, other))
            if other not in wanted and stream is not None:
                self.drop(stream)
        for other in wanted:
            if other not in before:
                self.dial(opener, other)

    def dial(self, opener: str, other: str) -> None:
        if other in self._wanted.get(opener, ()):
            super().dial(opener, other)

    def open_session(self, worker: str, number: int, master: str) -> SessionStream:
        """A stream whose first packet is on its way."""
        self.sessions = [stream for stream in self.sessions if stream.open_at]
        stream = SessionStream(self, worker, number, master)
        self.sessions.append(stream)
        stream.send(worker, b"dial")
        return stream

    def end_sessions_of(self, name: str, *, is_silent: bool) -> None:
        """A process is gone; its kernel says so unless that is gone too."""
        for stream in self.sessions:
            if name in (stream.worker, stream.master):
                if is_silent:
                    stream.vanish(name)
                else:
                    stream.close(name)

    def close_holes(self, directions: set[tuple[str, str]]) -> None:
        closed = self.holes & directions
        super().close_holes(directions)
        for stream in self.sessions:
            for sender, receiver in ((stream.worker, stream.master), (stream.master, stream.worker)):
                if (sender, receiver) in closed:
                    stream.go_on(sender)
