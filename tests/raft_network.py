"""Masters without sockets or waiting: real Consensus, PySyncObj, journal and snapshots, in virtual time.

Messages travel as real frames, in order per link, when the test says so; a cut link loses what is on it.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pysyncobj.syncobj
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from coordinator.api.v1 import command_pb2
from coordinator.config import RaftSettings
from coordinator.model import ManualClock
from coordinator.raft.consensus import Consensus
from coordinator.raft.elections import Protections
from coordinator.raft.frames import Message, pack, parse, to_frame, to_message
from coordinator.raft.journal import Journal
from coordinator.raft.snapshot import SnapshotStore
from coordinator.raft.voters import Membership
from tests.raft_machine import MACHINE, command

STEP_S = 0.01


class InlineExecutor(Executor):
    """Runs at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class MemoryLinks(Transport):  # type: ignore[misc]
    """The transport of one master on a `Network`."""

    def __init__(self, network: Network, self_id: str, peers: list[str]) -> None:
        super().__init__(None, None, None)
        self._network = network
        self.self_id = self_id
        self.nodes = {id: Node(id) for id in peers}
        self.on_unsent: Callable[[Node, Message], None] = lambda node, message: None

    def send(self, node: Node, message: Message) -> bool:
        if not self._network.is_linked(self.self_id, node.id):
            self.on_unsent(node, message)
            return False
        self._network.queue(self.self_id, node.id).append(pack(to_frame(message)))
        return True

    def is_congested(self, node: Node) -> bool:
        return not self._network.is_linked(self.self_id, node.id)

    def receive(self, from_id: str, frame: bytes) -> None:
        """Hands over one frame."""
        message = to_message(parse(frame[4:]))
        assert message is not None
        self._onMessageReceived(self.nodes[from_id], message)

    def disk_of(self, id: str) -> str:
        return self._network.disks.get(id, "")

    def connected(self, id: str) -> None:
        """The link to a peer is up."""
        self._onNodeConnected(self.nodes[id])

    def disconnected(self, id: str) -> None:
        """The link to a peer is down."""
        self._onNodeDisconnected(self.nodes[id])


class Network:
    """Some masters, their links and their time. Use through `network`."""

    def __init__(
        self, directory: Path, ids: tuple[str, ...], settings: RaftSettings, seed: int, protections: Protections
    ) -> None:
        self.directory = directory
        self.ids = ids
        self.settings = settings
        self.protections = protections
        self.clocks = {id: ManualClock() for id in ids}
        self.masters: dict[str, Consensus] = {}
        self.links: dict[str, MemoryLinks] = {}
        self.disks: dict[str, str] = {}
        """Names of the masters' disks, where a test gives them any."""
        self.now_s = 1_000.0
        self._seed = seed
        self._lives: Counter[str] = Counter()
        self._queues: dict[tuple[str, str], deque[bytes]] = {}
        self._cut: set[frozenset[str]] = set()
        for id in ids:
            self.start(id)

    def start(self, id: str, membership: Membership | None = None) -> Consensus:
        """Starts a master on what its directory holds."""
        directory = self.directory / id
        directory.mkdir(exist_ok=True)
        self._lives[id] += 1
        life = f" {self._lives[id]}" if self._lives[id] > 1 else ""
        links = MemoryLinks(self, id, [other for other in self.ids if other != id])
        self.links[id] = links
        self.masters[id] = Consensus(
            transport=links,
            journal=Journal(directory, f"test/{id}"),
            snapshots=SnapshotStore(directory, InlineExecutor(), MACHINE.encode, MACHINE.decode),
            apply=MACHINE.apply,
            settings=self.settings,
            wall_ms=self.clocks[id].wall_ms,
            rng=random.Random(f"{self._seed} {id}{life}"),
            protections=self.protections,
            membership=membership,
        )
        for other in self.masters:
            if other != id and frozenset((id, other)) not in self._cut:
                links.connected(other)
                self.links[other].connected(id)
        return self.masters[id]

    def stop(self, id: str) -> None:
        """Ends a master as a kill does: no goodbye, and what is on its links is lost."""
        self.masters.pop(id).close()
        for other in self.masters:
            self._drop(id, other)
            if frozenset((id, other)) not in self._cut:
                self.links[other].disconnected(id)

    def cut(self, one: str, other: str) -> None:
        """Cuts a link."""
        self._cut.add(frozenset((one, other)))
        self._drop(one, other)
        self.links[one].disconnected(other)
        self.links[other].disconnected(one)

    def mend(self, one: str, other: str) -> None:
        """Mends a link."""
        self._cut.discard(frozenset((one, other)))
        self.links[one].connected(other)
        self.links[other].connected(one)

    def _drop(self, one: str, other: str) -> None:
        self.queue(one, other).clear()
        self.queue(other, one).clear()

    def is_linked(self, one: str, other: str) -> bool:
        """True while both run and the link is up."""
        return {one, other} <= self.masters.keys() and frozenset((one, other)) not in self._cut

    def queue(self, from_id: str, to_id: str) -> deque[bytes]:
        """What is on its way; a test may look at it, and take from it."""
        return self._queues.setdefault((from_id, to_id), deque())

    def deliver(self) -> None:
        """Delivers what is on its way now, and what that causes."""
        while any(self._queues.values()):
            for (from_id, to_id), queue in list(self._queues.items()):
                if queue:
                    self.links[to_id].receive(from_id, queue.popleft())

    def turn(self, seconds: float = STEP_S) -> None:
        """Lets time pass, steps every master and delivers everything."""
        self.now_s += seconds
        for id in sorted(self.masters):
            self.clocks[id].advance(seconds)
            self.masters[id].step()
        self.deliver()

    def run(self, condition: Callable[[], object], seconds: float = 5.0) -> None:
        """Turns until the condition holds; fails after so much virtual time."""
        end_s = self.now_s + seconds
        while not condition():
            assert self.now_s < end_s, f"not within {seconds:g} s of virtual time"
            self.turn()

    def elect(self) -> str:
        """Turns until somebody leads and all that run know it."""
        self.run(self._agrees_on_leader)
        found = self.leader()
        assert found is not None
        return found

    def _agrees_on_leader(self) -> bool:
        found = self.leader()
        return found is not None and all(master.leader_id == found for master in self.masters.values())

    def leader(self) -> str | None:
        """The master that leads whole in the highest term."""
        leading = [(master.term, id) for id, master in self.masters.items() if master.leads_whole]
        return max(leading)[1] if leading else None

    def propose(self, id: str, cause: str) -> list[tuple[command_pb2.CommandResult | None, int]]:
        """Proposes at a master; the outcome appears in the list."""
        outcome: list[tuple[command_pb2.CommandResult | None, int]] = []
        payload = command(cause).SerializeToString()
        self.masters[id].propose(payload, lambda result, reason: outcome.append((result, reason)))
        return outcome

    def commit(self, id: str, cause: str) -> int:
        """Proposes and waits for the commit; the index."""
        outcome = self.propose(id, cause)
        self.run(lambda: outcome)
        result, reason = outcome[0]
        assert reason == 0
        assert result is not None
        return result.applied.index


@contextmanager
def network(
    directory: Path,
    ids: tuple[str, ...] = ("m1", "m2", "m3"),
    settings: RaftSettings | None = None,
    seed: int = 1,
    protections: Protections | None = None,
) -> Iterator[Network]:
    """A network whose time is PySyncObj's time while the block runs."""
    real = pysyncobj.syncobj.monotonicTime
    made: list[Network] = []
    pysyncobj.syncobj.monotonicTime = lambda: made[0].now_s if made else 1_000.0
    try:
        made.append(Network(directory, ids, settings or RaftSettings(), seed, protections or Protections()))
        yield made[0]
        for id in list(made[0].masters):
            made[0].stop(id)
    finally:
        pysyncobj.syncobj.monotonicTime = real
