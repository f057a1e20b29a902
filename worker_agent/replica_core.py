"""What both roles of a replica share: its view of the store, the epoch it has seen, its promises. See replica.py.

`Disk` is what the machine knows of its store. Operations are asked for in order and end in order, so it keeps two
places: `position`, durable as the last end said it, and `last`/`applying`, where the store will be once all that was
asked for is done. An operation that fails takes those behind it along, and everything starts again from what the
store says: no role keeps a wish that cannot be derived from its own state once more.

Epochs of the log are kept as runs: they never fall along a log, and change a few times in its life. They are known
from `applied` of the start on: further down logs of replicas never differ, so nobody asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.api.v1 import replication_pb2
from coordinator.model import Monotonic
from worker_agent.shard_interface import (
    AppendRecords,
    ApplyLog,
    BeginCopy,
    FinishCopy,
    MergeChunk,
    ReadChunk,
    ReadLog,
    ReplicaAction,
    ReplicaTimes,
    SeeEpoch,
    SendToPeer,
    ShardView,
    StoreDone,
    StoreOperation,
    TruncateLog,
)
from worker_agent.store_interface import Digest, LogRecord, StorePosition

STORE_RETRY_S = 0.5
"""How long after a failure of the store (a full disk) it is tried again."""
NEVER = Monotonic(float("inf"))
LONG_AGO = Monotonic(float("-inf"))
EMPTY = StorePosition(epoch_seen=0, first=1, last=0, last_epoch=0, applied=0, applied_epoch=0, is_complete=False)


@dataclass(frozen=True, slots=True)
class Protections:
    """What the protocol rests on, each to be switched off by the tests that show why it is there."""

    waits_out_promise: bool = True
    """A new primary waits until the lease that it granted has run out."""
    needs_before_report: bool = True
    """A joining replica is needed from before the leader hears that it has caught up."""
    checks_lease: bool = True
    """A primary answers only while its leases hold."""
    truncates_conflicts: bool = True
    """A replica drops records of its own that the primary has otherwise."""
    persists_epoch: bool = True
    """An epoch is on disk before it is shown."""


class Disk:
    """The store as its replica knows it.

    Invariant: position.applied <= applying <= last; position.last <= last unless a truncation is on its way.
    """

    def __init__(self, act: Callable[[StoreOperation], object]) -> None:
        self._act = act
        self.position = EMPTY
        self.last = 0
        self.last_epoch = 0
        self.applying = 0
        self.digest: Digest | None = None
        """Of the last application, or of the last time that it was asked for."""
        self.operations: deque[StoreOperation] = deque()
        self._counts: dict[type, int] = {}
        self._runs: list[tuple[int, int]] = [(0, 0)]
        """(first sequence, epoch), ascending; the first one is of `applied` at the start."""
        self.known_until = 0
        """The epochs of the log are known up to here; below `last` only after a start with a tail."""

    def load(self, position: StorePosition) -> None:
        """Starts with a store."""
        self._forget_operations()
        self.digest = None
        self._rest_at(position)
        self._runs = [(position.applied, position.applied_epoch)]
        self.known_until = position.applied
        if position.last == position.applied or position.last_epoch == position.applied_epoch:
            # Epochs never fall along a log: equal at both ends, equal between them.
            self.known_until = position.last
        elif position.last == position.applied + 1:
            self.learn(position.last, position.last_epoch)

    def _rest_at(self, position: StorePosition) -> None:
        self.position = position
        self.last, self.last_epoch, self.applying = position.last, position.last_epoch, position.applied

    def _forget_operations(self) -> None:
        self.operations.clear()
        self._counts.clear()

    # Operations

    def do(self, operation: StoreOperation) -> None:
        """Asks for an operation."""
        match operation:
            case AppendRecords(records):
                self.last, self.last_epoch = records[-1].sequence, records[-1].epoch
                for record in records:
                    if record.sequence > self.known_until:
                        self.learn(record.sequence, record.epoch)
            case TruncateLog(last):
                self.cut(last)
            case ApplyLog(up_to):
                self.applying = up_to
            case BeginCopy(start, start_epoch):
                self.last, self.last_epoch, self.applying = start, start_epoch, start
                self._runs, self.known_until = [(start, start_epoch)], start
                self.digest = None
            case _:
                pass
        if not isinstance(operation, ReadChunk):
            self.operations.append(operation)
        self._counts[type(operation)] = self.pending(type(operation)) + 1
        self._act(operation)

    def pending(self, kind: type) -> int:
        """Operations of a kind that have not ended."""
        return self._counts.get(kind, 0)

    def done(self, event: StoreDone) -> None:
        """An operation has ended well."""
        operation = event.operation
        if not isinstance(operation, ReadChunk):
            expected = self.operations.popleft()
            assert operation is expected or operation == expected, f"{expected} was to end, not {operation}"
        self._counts[type(operation)] -= 1
        if isinstance(operation, ReadChunk):
            return  # Read beside the others: it does not say which of those have ended.
        self.position = event.position
        if event.digest is not None:
            self.digest = event.digest
        elif isinstance(operation, MergeChunk | FinishCopy):
            self.digest = None

    def read_failed(self) -> None:
        """The first operation, a ReadLog, came too late; nothing is wrong, and the others are asked for again."""
        self._counts[ReadLog] -= 1
        self.operations.popleft()
        for operation in self.operations:
            self._act(operation)

    def chunk_failed(self) -> None:
        """A ReadChunk failed; all others go on."""
        self._counts[ReadChunk] -= 1

    def failed(self, position: StorePosition) -> None:
        """An operation has failed, and all others were dropped."""
        self._forget_operations()
        self._rest_at(position)
        self.known_until = min(self.known_until, position.last)
        self._cut_runs(position.last)

    # Epochs of the log

    @property
    def knows_its_tail(self) -> bool:
        """True once the epoch of every record is known."""
        return self.known_until >= self.last

    def learn(self, sequence: int, epoch: int) -> None:
        """The record behind `known_until` has this epoch."""
        assert sequence == self.known_until + 1, f"{sequence} is not behind {self.known_until}"
        if epoch != self._runs[-1][1]:
            self._runs.append((sequence, epoch))
        self.known_until = sequence

    def ask_for_tail(self, node_id: str) -> None:
        """Reads on where the epochs are not known, unless that is on its way."""
        if not self.knows_its_tail and not self.pending(ReadLog):
            self.do(ReadLog(node_id, self.known_until + 1))

    def take_tail(self, records: Sequence[LogRecord]) -> None:
        """Learns from records that were read."""
        for record in records:
            if record.sequence == self.known_until + 1:
                self.learn(record.sequence, record.epoch)

    def epoch_at(self, sequence: int) -> int | None:
        """Epoch of a record, or None where it is not known."""
        if sequence > self.known_until:
            return None
        for first, epoch in reversed(self._runs):
            if first <= sequence:
                return epoch
        return None

    def cut(self, last: int) -> None:
        """Forgets what is known behind `last`."""
        epoch = self.epoch_at(last)
        assert epoch is not None, f"nothing is known of record {last}"
        self.last, self.last_epoch = min(self.last, last), epoch
        self.known_until = min(self.known_until, last)
        self._cut_runs(last)

    def _cut_runs(self, last: int) -> None:
        while len(self._runs) > 1 and self._runs[-1][0] > last:
            self._runs.pop()


class Core:
    """What the roles of one replica have in common."""

    def __init__(
        self,
        node_id: str,
        shard_id: int,
        times: ReplicaTimes,
        has_session_lease: Callable[[Monotonic], bool],
        started_at: Monotonic,
        protections: Protections,
    ) -> None:
        self.node_id = node_id
        self.shard_id = shard_id
        self.times = times
        self.has_session_lease = has_session_lease
        self.protections = protections
        self.actions: list[ReplicaAction] = []
        self.disk = Disk(self.actions.append)
        self.view: ShardView | None = None
        self.connected: dict[str, None] = {}
        self.seen = 0
        """Highest epoch that this process knows of."""
        self.used_epoch = 0
        """Highest epoch in which this worker may have made records as primary."""
        self.promised_until = Monotonic(started_at + times.replica_lease_s * times.lease_margin)
        """Until then somebody else may rely on a lease of this worker; a new process has forgotten which it gave."""
        self.blocked_until = LONG_AGO
        """The store is not written before; it failed."""
        self.block_reason = ""
        self._is_blocked_by_epoch = False

    # Epochs

    def see(self, epoch: int) -> None:
        """Takes note of an epoch; it may be shown once `has_seen_durably` says so."""
        self.seen = max(self.seen, epoch)
        self.persist_epoch()

    def persist_epoch(self) -> None:
        """Asks for the epoch to be written where it is not, and is not about to be."""
        # A store that knows no epoch at all would count as lost, which is not what the switch is to show.
        is_written = self.protections.persists_epoch or self.disk.position.epoch_seen == 0
        if is_written and self.disk.position.epoch_seen < self.seen and not self.disk.pending(SeeEpoch):
            self.disk.do(SeeEpoch(self.seen))

    def foresee(self, epoch: int) -> None:
        """Writes an epoch ahead of the assignment that brings it: then nobody waits for the disk when it is in force.

        It changes nothing else: what is shown and followed is `seen`. To know more epochs than were shown does no harm
        after a crash, for this one was committed by the masters, and a new process gets a higher one.
        """
        is_late = epoch <= self.disk.position.epoch_seen or not self.protections.persists_epoch
        if not is_late and self.view is not None and not self.disk.pending(SeeEpoch):
            self.disk.do(SeeEpoch(epoch))

    @property
    def has_seen_durably(self) -> bool:
        """True when the highest epoch known is on disk."""
        return self.disk.position.epoch_seen >= self.seen or not self.protections.persists_epoch

    # Leases

    def promise(self, now: Monotonic) -> float:
        """Grants a lease; returns its length by the holder's clock."""
        until = now + self.times.replica_lease_s * self.times.lease_margin
        self.promised_until = Monotonic(max(self.promised_until, until))
        return self.times.replica_lease_s

    # Store

    def block(self, now: Monotonic, operation: StoreOperation, reason: str) -> None:
        """The store failed: it is left alone for a while."""
        self.blocked_until = Monotonic(now + STORE_RETRY_S)
        self.block_reason = reason
        self._is_blocked_by_epoch = isinstance(operation, SeeEpoch)

    def unblock(self, operation: StoreOperation) -> None:
        """An operation ended well. Where records found no room, reading shows nothing, and an epoch takes none."""
        if isinstance(operation, SeeEpoch) and not self._is_blocked_by_epoch:
            return
        if not isinstance(operation, ReadLog | ReadChunk):
            self.block_reason = ""

    @property
    def keeps_tombstones(self) -> bool:
        """True while a deleted row must be remembered as such."""
        view = self.view
        return view is None or bool(view.joining) or not self.disk.position.is_complete

    def send(self, node_id: str, message: replication_pb2.ShardMessage, *, is_answer: bool) -> None:
        """Sends a message."""
        self.actions.append(SendToPeer(node_id, message, is_answer))

    def message(self, epoch: int) -> replication_pb2.ShardMessage:
        """A message to be filled."""
        return replication_pb2.ShardMessage(shard_id=self.shard_id, epoch=epoch)
