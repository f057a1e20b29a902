"""Streams between simulated workers: in order, late, one-way holes, lost with their connection.

Each worker opens a stream to each other one. What is sent into a hole waits until the hole closes, or goes with the
stream; between different streams nothing is in order.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from coordinator.api.v1 import replication_pb2

if TYPE_CHECKING:
    from tests.sim.replica_world import World

REDIAL_S = 0.08
SILENCE_S_MAX = 1.2
"""A stream whose one direction is silent for so long is given up by its opener."""
Item = replication_pb2.ShardMessage


class Stream:
    """One stream; messages of the opener go up, answers down."""

    def __init__(self, net: Net, opener: str, other: str) -> None:
        self.opener, self.other = opener, other
        self._net = net
        self.is_open = True
        self._due_s = {opener: 0.0, other: 0.0}
        self._waiting: dict[str, list[Item]] = {opener: [], other: []}

    def send(self, sender: str, item: Item) -> None:
        """Sends; it arrives behind all that was sent before it in this direction."""
        receiver = self.other if sender == self.opener else self.opener
        if (sender, receiver) in self._net.holes:
            self._waiting[sender].append(item)
            return
        world = self._net.world
        due_s = max(world.now_s + self._net.delay_s(), self._due_s[sender])
        self._due_s[sender] = due_s
        world.at(due_s, lambda: self._arrive(sender, receiver, item))

    def _arrive(self, sender: str, receiver: str, item: Item) -> None:
        if self.is_open:
            is_answer = sender == self.other
            self._net.world.workers[receiver].enqueue(lambda worker: worker.take(self, sender, item, is_answer))

    def go_on(self, sender: str) -> None:
        """A hole closed: what waited goes."""
        items, self._waiting[sender] = self._waiting[sender], []
        for item in items:
            self.send(sender, item)


class Net:
    """All streams, the holes between workers, and those to and from the master (named "")."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self._rng = rng
        self.holes: set[tuple[str, str]] = set()
        self.delay_s_max = 0.004
        self.streams: dict[tuple[str, str], Stream] = {}

    def delay_s(self) -> float:
        """Most packets are fast."""
        return 0.000_1 + self.delay_s_max * self._rng.random() ** 3

    def dial(self, opener: str, other: str) -> None:
        """Opens a stream as soon as that is possible."""
        workers = self.world.workers
        if (opener, other) in self.streams or not workers[opener].is_up:
            return
        if workers[other].is_up and not self.holes & {(opener, other), (other, opener)}:
            stream = self.streams[opener, other] = Stream(self, opener, other)
            workers[opener].enqueue(lambda worker: worker.connected(stream))
        else:
            self.world.after(REDIAL_S, lambda: self.dial(opener, other))

    def drop(self, stream: Stream, *, after_s: float = 0.0) -> None:
        """A stream ends with all that is on its way; its opener hears of it and dials again."""
        if not stream.is_open:
            return
        stream.is_open = False
        key = (stream.opener, stream.other)

        def tell() -> None:
            if self.streams.get(key) is stream:
                del self.streams[key]
                self.world.workers[stream.opener].enqueue(lambda worker: worker.disconnected(stream))
                self.world.after(REDIAL_S, lambda: self.dial(*key))

        self.world.after(after_s + self.delay_s(), tell)

    def drop_of(self, name: str, *, is_silent: bool) -> None:
        """A worker's process is gone; without a word its peers notice after a while."""
        for stream in list(self.streams.values()):
            if name == stream.opener:
                stream.is_open = False
                del self.streams[stream.opener, stream.other]
            elif name == stream.other:
                self.drop(stream, after_s=SILENCE_S_MAX if is_silent else 0.0)

    def open_holes(self, directions: set[tuple[str, str]], seconds: float) -> None:
        """Nothing passes in these directions for a while; streams that hear nothing for too long are given up."""
        self.holes |= directions
        concerned = [
            stream
            for stream in self.streams.values()
            if {(stream.opener, stream.other), (stream.other, stream.opener)} & directions
        ]
        if seconds > SILENCE_S_MAX:
            for stream in concerned:
                self.world.after(SILENCE_S_MAX, lambda stream=stream: self.drop(stream))  # type: ignore[misc]
        self.world.after(seconds, lambda: self.close_holes(directions))

    def close_holes(self, directions: set[tuple[str, str]]) -> None:
        """Everything passes again."""
        closed = self.holes & directions
        self.holes -= directions
        for stream in list(self.streams.values()):
            for sender, receiver in ((stream.opener, stream.other), (stream.other, stream.opener)):
                if (sender, receiver) in closed:
                    stream.go_on(sender)
