"""A few replica machines of one shard with stores in memory, moved by hand; for unit tests that look at every step.

Store operations are done when the test says so (`work`), messages travel when it says so (`deliver`); `settle` does
both until nothing is left to do, `pass_time` lets the clocks of all run and the machines wake when they asked for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from coordinator.api.v1 import replication_pb2
from coordinator.model import Monotonic
from tests.model_store import ModelStore
from tests.sim.replica_store import SimStore, payload_of
from worker_agent.replica import Replica
from worker_agent.replica_core import Protections
from worker_agent.shard_interface import (
    AppendRecords,
    ApplyLog,
    Assigned,
    BeginCopy,
    FinishCopy,
    MergeChunk,
    PeerConnected,
    PeerLost,
    PeerSaid,
    ReadChunk,
    ReadLog,
    ReplicaAction,
    ReplicaEvent,
    ReplicaRole,
    ReplicaTimes,
    ReportReplica,
    SeeEpoch,
    SendToPeer,
    Settle,
    ShardView,
    StoreDone,
    StoreFailed,
    StoreOperation,
    Submit,
    TruncateLog,
)
from worker_agent.store_interface import Digest

SHARD = 7
TIMES = ReplicaTimes()


def perform(store: SimStore | ModelStore, operation: StoreOperation) -> StoreDone:
    """Does one operation of the store."""
    digest: Digest | None = None
    match operation:
        case SeeEpoch(epoch):
            store.see_epoch(epoch)
        case AppendRecords(records):
            store.append(records)
        case TruncateLog(last):
            store.truncate(last)
        case ApplyLog(up_to, keeps_tombstones):
            digest = store.apply(up_to, keeps_tombstones=keeps_tombstones)
        case ReadLog(_, first):
            records = tuple(store.read_log(first, records_max=16, bytes_max=1 << 20))
            return StoreDone(operation, store.position(), records=records)
        case ReadChunk(_, cursor):
            return StoreDone(operation, store.position(), chunk=store.read_chunk(cursor, bytes_max=1 << 20))
        case BeginCopy(start, start_epoch):
            store.begin_copy(start, start_epoch)
        case MergeChunk(chunk):
            store.merge_chunk(chunk)
        case FinishCopy():
            store.finish_copy()
    return StoreDone(operation, store.position(), digest)


class Node:
    """One worker with its replica of the shard."""

    def __init__(self, cluster: Cluster, name: str, store: SimStore) -> None:
        self.cluster = cluster
        self.name = name
        self.store = store
        self.has_session = True
        self.is_stuck = False
        """Its disk hangs: nothing that it is asked for ends."""
        self.holds_chunks = False
        """Chunks of a copy are not read yet, as by the throttle."""
        self.queue: deque[StoreOperation] = deque()
        self.actions: list[ReplicaAction] = []
        """Everything but store operations and messages, in order."""
        self.replica = self._make()
        self.next_wake: Monotonic | None = None

    def _make(self) -> Replica:
        started_at = self.cluster.now
        return Replica(self.name, SHARD, TIMES, lambda now: self.has_session, started_at, self.cluster.protections)

    def restart(self, view: ShardView) -> None:
        """A new process with what is on disk."""
        self.queue.clear()
        self.cluster.drop(self.name)
        self.replica = self._make()
        self.assign(view)

    def assign(self, view: ShardView) -> None:
        """A view of the shard arrives; the first one of a machine with the position of its store."""
        is_first = self.replica.epoch == 0 and self.replica.state == "new"
        self.feed(Assigned(view, self.store.position() if is_first else None))
        if is_first:
            for other in self.cluster.nodes:
                if other != self.name and (self.name, other) not in self.cluster.cuts:
                    self.feed(PeerConnected(other))

    def feed(self, event: ReplicaEvent) -> list[ReplicaAction]:
        """An event; returns what came of it."""
        step = self.replica.on_event(self.cluster.now, event)
        return self._take(step.actions, step.next_wake)

    def advance(self) -> list[ReplicaAction]:
        """Time has passed."""
        step = self.replica.on_advance(self.cluster.now)
        return self._take(step.actions, step.next_wake)

    def _take(self, actions: tuple[ReplicaAction, ...], next_wake: Monotonic | None) -> list[ReplicaAction]:
        self.next_wake = next_wake
        self.replica.validate()
        for action in actions:
            match action:
                case SendToPeer():
                    self.cluster.post(self.name, action)
                case Settle() | ReportReplica():
                    self.actions.append(action)
                case _:
                    self.queue.append(action)
        return list(actions)

    def work(self, count: int = 1_000_000) -> int:
        """Does store operations that were asked for; returns how many."""
        done = 0
        held: list[StoreOperation] = []
        while self.queue and done < count and not self.is_stuck:
            operation = self.queue.popleft()
            if self.holds_chunks and isinstance(operation, ReadChunk):
                held.append(operation)
                continue
            done += 1
            try:
                end = perform(self.store, operation)
            except Exception as error:
                self.queue.clear()
                self.feed(StoreFailed(operation, error, self.store.position()))
                continue
            self.feed(end)
        self.queue.extend(held)
        return done

    def submit(self, token: int, register: str = "a", value: str | None = None) -> list[ReplicaAction]:
        """A write of a client."""
        return self.feed(Submit(token, payload_of(register, value or f"v{token}", f"r{token}")))

    @property
    def settled(self) -> dict[int, Settle]:
        """What became of submits and barriers."""
        return {action.token: action for action in self.actions if isinstance(action, Settle)}

    @property
    def report(self) -> ReportReplica:
        """The latest report."""
        return next(action for action in reversed(self.actions) if isinstance(action, ReportReplica))


class Cluster:
    """Some nodes and what is on its way between them."""

    def __init__(self, *names: str, protections: Protections | None = None) -> None:
        self.now = Monotonic(100.0)
        self.protections = protections or Protections()
        self.cuts: set[tuple[str, str]] = set()
        """(opener, other) of streams that are not open."""
        self.mail: deque[tuple[str, SendToPeer]] = deque()
        self.nodes: dict[str, Node] = {}
        for name in names:
            self.add(name)

    def add(self, name: str, store: SimStore | None = None) -> Node:
        """Another worker."""
        node = self.nodes[name] = Node(self, name, store or SimStore())
        for other in self.nodes.values():
            if other is not node and other.replica.state != "new":
                other.feed(PeerConnected(name))
        return node

    def view(self, epoch: int, primary: str, *in_sync: str, joining: tuple[str, ...] = (), **more: object) -> ShardView:
        """The shard as the primary has it; `of` makes it another's."""
        everybody = tuple(sorted({primary, *in_sync}))
        return ShardView(SHARD, 0, 1 << 64, epoch, ReplicaRole.PRIMARY, primary, everybody, joining, **more)  # type: ignore[arg-type]

    def assign(self, view: ShardView, *names: str) -> None:
        """Tells workers what the shard is now; all of its replicas when none is named."""
        for name in names or (*view.in_sync, *view.joining):
            role = ReplicaRole.JOINING if name in view.joining else ReplicaRole.IN_SYNC
            role = ReplicaRole.PRIMARY if name == view.primary else role
            own = ShardView(
                view.shard_id, view.lo, view.hi, view.epoch, role, view.primary, view.in_sync, view.joining,
                view.is_formed, view.cede_to if role is ReplicaRole.PRIMARY else "", view.is_sealed, view.parents,
            )
            self.nodes[name].assign(own)

    def form(self, primary: str, *others: str) -> Node:
        """A new shard that serves."""
        self.assign(self.view(1, primary, *others, is_formed=False))
        self.settle()
        self.assign(self.view(1, primary, *others))
        self.pass_time(TIMES.replica_lease_s * TIMES.lease_margin + 0.1)
        assert self.nodes[primary].replica.is_serving, self.nodes[primary].replica.state
        return self.nodes[primary]

    def post(self, sender: str, action: SendToPeer) -> None:
        """A message sets out; its bytes are taken at once, as they are sent."""
        opener = (action.node_id, sender) if action.is_answer else (sender, action.node_id)
        if opener not in self.cuts:
            self.mail.append((sender, action))

    def cut(self, opener: str, other: str) -> None:
        """A stream breaks, with all that is on its way."""
        self.cuts.add((opener, other))
        self._lose(lambda up, down: (up, down) == (opener, other))
        self.nodes[opener].feed(PeerLost(other))

    def mend(self, opener: str, other: str) -> None:
        """A stream is open again."""
        self.cuts.discard((opener, other))
        self.nodes[opener].feed(PeerConnected(other))

    def drop(self, name: str) -> None:
        """A process ended: its streams end, and open again."""
        self._lose(lambda up, down: name in (up, down))
        for other, node in self.nodes.items():
            if other != name and (other, name) not in self.cuts and node.replica.state != "new":
                node.feed(PeerLost(name))
                node.feed(PeerConnected(name))

    def _lose(self, is_lost: Callable[[str, str], bool]) -> None:
        def of(sender: str, action: SendToPeer) -> tuple[str, str]:
            return (action.node_id, sender) if action.is_answer else (sender, action.node_id)

        self.mail = deque((sender, action) for sender, action in self.mail if not is_lost(*of(sender, action)))

    def deliver(self, count: int = 1_000_000) -> list[tuple[str, str, replication_pb2.ShardMessage]]:
        """Messages on their way arrive; returns (from, to, message) of them."""
        arrived: list[tuple[str, str, replication_pb2.ShardMessage]] = []
        while self.mail and len(arrived) < count:
            sender, action = self.mail.popleft()
            arrived.append((sender, action.node_id, action.message))
            self.nodes[action.node_id].feed(PeerSaid(sender, action.message, action.is_answer))
        return arrived

    def settle(self) -> None:
        """Messages and store operations until there are none."""
        for _ in range(10_000):
            moved = len(self.deliver())
            moved += sum(node.work() for node in self.nodes.values())
            if not moved:
                return
        raise AssertionError("it never comes to rest")

    def pass_time(self, seconds: float) -> None:
        """Lets time pass, with everything that happens in it."""
        end = self.now + seconds
        self.settle()
        while self.now < end:
            wakes = [node.next_wake for node in self.nodes.values() if node.next_wake is not None]
            self.now = Monotonic(min([end, *(max(wake, self.now + 0.001) for wake in wakes)]))
            for node in self.nodes.values():
                if node.next_wake is not None and node.next_wake <= self.now:
                    node.advance()
            self.settle()
