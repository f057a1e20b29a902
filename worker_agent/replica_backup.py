"""A replica that follows: it takes records, rows and the commit point of a primary, and says what it has on disk.

See replica.py for the protocol. What is kept here:

- **Acknowledged means verified and durable.** `matched` is how far this log is known to be that of the primary of this
  epoch; an acknowledgement names the lower one of that and what is on disk.
- **A record goes only for another one in its place** (or because the primary's log ends before it). A log that is cut
  and written again might lose, by a crash in between, what made a write committed.
- **Applied is committed.** Nothing is applied that the primary has not called committed, and nothing is ever cut that
  is applied.
- **An answer waits for the epoch** that it shows to be on disk.
- A copy is begun only where this worker's own assignment says that it joins: no late message wipes a whole store.
"""

from __future__ import annotations

import math
from itertools import dropwhile

from coordinator.api.v1 import replication_pb2
from coordinator.model import Monotonic
from worker_agent.replica_core import Core
from worker_agent.replica_messages import (
    checksum_of,
    chunk_from_proto,
    digest_from_proto,
    record_from_proto,
    standing_of,
    to_us,
)
from worker_agent.shard_interface import (
    AppendRecords,
    ApplyLog,
    BeginCopy,
    FinishCopy,
    MergeChunk,
    ReadLog,
    ReplicaRole,
    StoreDone,
    TruncateLog,
)
from worker_agent.store_interface import Digest, LogRecord


class Backup:
    """One replica while it is not primary."""

    def __init__(self, core: Core, now: Monotonic, fresh_at: Monotonic) -> None:
        self._core = core
        self._disk = core.disk
        self._leader = ""
        """Who is primary in epoch `core.seen`, once it has spoken."""
        self._matched = 0
        self._pending: list[LogRecord] = []
        """Taken, and waiting for the append that is on its way."""
        self._committed = core.disk.applying
        self._told: Digest | None = None
        self._compared_until = 0
        self.is_different = False
        self._standing_us: int | None = None
        self._answered_us = 0
        self._owes_answer = False
        self._ceded_epoch = 0
        self._owes_ceded_word = False
        self._cursor: bytes | None = None
        """While a copy is received: where it goes on once all that was asked of the store is done."""
        self._has_last_chunk = False
        self.fresh_at = fresh_at
        self._fresh_next: tuple[int, Monotonic] | None = None
        self._disk.ask_for_tail(core.node_id)

    # What others may ask

    @property
    def leader(self) -> str:
        """The primary that it follows; empty when none has spoken."""
        return self._leader

    def age_s(self, now: Monotonic) -> float:
        """How long ago it last knew itself to have applied everything that was committed."""
        return now - self.fresh_at if self._disk.position.is_complete else math.inf

    def validate(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert not self._pending or self._pending[0].sequence == self._disk.last + 1, "what waits goes on where it ends"

    def end(self) -> None:
        """It is a backup no more: what nobody was told of is forgotten."""
        self._drop_pending()

    # Messages

    def on_message(self, now: Monotonic, node_id: str, message: replication_pb2.ShardMessage) -> None:
        """A message of somebody who takes himself for the primary."""
        core = self._core
        if message.epoch < core.seen or (message.epoch == core.seen and self._leader not in ("", node_id)):
            self._refuse(node_id, message.epoch)
            return
        if message.epoch > core.seen or not self._leader:
            self._follow(node_id)
            core.see(message.epoch)
        match message.WhichOneof("message"):
            case "probe":
                self._standing_us = message.probe.sent_at_us
            case "append":
                if self._standing_us is None:
                    self._take_append(now, message.append)
            case "copy_chunk":
                if self._standing_us is None:
                    self._take_chunk(message.copy_chunk)
            case "ceded":
                self._take_ceded(now)
            case _:
                pass
        self.pump(now)

    def _follow(self, node_id: str) -> None:
        self._leader = node_id
        self._matched = 0
        self._drop_pending()
        self._told = None
        self._compared_until = 0
        self.is_different = False
        self._standing_us = None
        self._answered_us = 0
        self._owes_answer = self._owes_ceded_word = False
        self._fresh_next = None

    def _refuse(self, node_id: str, epoch: int) -> None:
        if self._disk.position.epoch_seen <= epoch and self._core.protections.persists_epoch:
            # The epoch that it is refused for is not on disk yet, so it is not shown; it will ask again.
            return
        message = self._core.message(epoch)
        message.refuse.epoch_seen = self._core.seen
        message.refuse.reason = f"shard {self._core.shard_id} is at epoch {self._core.seen} here"
        self._core.send(node_id, message, is_answer=True)

    def _take_ceded(self, now: Monotonic) -> None:
        core = self._core
        core.promised_until = min(core.promised_until, now)
        self._ceded_epoch = core.seen
        self._owes_ceded_word = True

    def _answer_ceded(self) -> None:
        core, self._owes_ceded_word = self._core, False
        message = core.message(core.seen)
        message.ceded_acknowledge.applied_sequence = self._disk.position.applied
        core.send(self._leader, message, is_answer=True)

    # Records

    @property
    def _end(self) -> int:
        return self._pending[-1].sequence if self._pending else self._disk.last

    def _drop_pending(self) -> None:
        if self._pending:
            self._pending.clear()
            self._disk.cut(self._disk.last)

    def _take_append(self, now: Monotonic, append: replication_pb2.Append) -> None:
        disk = self._disk
        previous = append.previous_sequence
        if disk.knows_its_tail and now < self._core.blocked_until and append.records:
            # Nothing can be written now: the lease goes on, what is not acknowledged will be sent again.
            self._note_sent(append.sent_at_us)
            self._acknowledge(now)
            return
        is_known = previous <= disk.applying or disk.epoch_at(previous) == append.previous_epoch
        if previous > self._end or not is_known or not disk.knows_its_tail:
            self._standing_us = 0
            return
        self._note_sent(append.sent_at_us)
        self._take_records(append)
        self._matched = max(self._matched, previous + len(append.records))
        limit = max(append.last_sequence, self._matched, disk.applying)
        if self._end > limit and self._core.protections.truncates_conflicts:
            self._cut(limit)
        self._committed = max(self._committed, append.committed_sequence)
        self._told = digest_from_proto(append)
        heard_at = Monotonic(append.heard_at_us.get(self._core.node_id, 0) / 1e6)
        if self._fresh_next is None and self.fresh_at < heard_at <= now:
            self._fresh_next = (append.committed_sequence, heard_at)
        # New records are acknowledged once they are on disk; a heartbeat does not wait for them.
        if not append.records or not (self._pending or disk.pending(AppendRecords)):
            self._owes_answer = True

    def _note_sent(self, sent_at_us: int) -> None:
        self._answered_us = max(self._answered_us, sent_at_us)

    def _take_records(self, append: replication_pb2.Append) -> None:
        disk = self._disk
        new = append.records
        if new and new[0].sequence <= self._end:
            new = list(dropwhile(self._has, new))  # type: ignore[assignment]
            if new and new[0].sequence <= self._end:
                self._cut(new[0].sequence - 1)
        for record in new:
            disk.learn(record.sequence, record.epoch)
            self._pending.append(record_from_proto(record))

    def _has(self, record: replication_pb2.Record) -> bool:
        """True when this log has the record, so that it is not written again."""
        if record.sequence > self._end:
            return False
        if record.sequence <= self._disk.applying or not self._core.protections.truncates_conflicts:
            return True
        return self._disk.epoch_at(record.sequence) == record.epoch

    def _cut(self, last: int) -> None:
        """Drops the records behind `last`: the primary has others, or none."""
        disk = self._disk
        assert last >= disk.applying, f"{last} is below {disk.applying}, which is committed"
        while self._pending and self._pending[-1].sequence > last:
            self._pending.pop()
        if disk.last > last:
            disk.do(TruncateLog(last))
        elif disk.known_until > last:
            disk.cut(last)

    def _acknowledge(self, now: Monotonic) -> None:
        core, position = self._core, self._disk.position
        if not self._leader or not core.has_seen_durably:
            return
        message = core.message(core.seen)
        acknowledge = message.acknowledge
        acknowledge.durable_sequence = min(position.last, self._matched)
        acknowledge.applied_sequence = position.applied
        acknowledge.sent_at_us = self._answered_us
        acknowledge.lease_s = 0.0 if self._ceded_epoch == core.seen else core.promise(now)
        acknowledge.is_different = self.is_different
        acknowledge.compared_until = self._compared_until
        acknowledge.answered_at_us = to_us(now)
        core.send(self._leader, message, is_answer=True)

    # Rows of a copy

    def _take_chunk(self, proto: replication_pb2.CopyChunk) -> None:
        core, disk = self._core, self._disk
        view = core.view
        is_joining = view is not None and view.role is ReplicaRole.JOINING
        if not is_joining or checksum_of(proto.rows) != proto.checksum:
            return
        position = disk.position
        start = position.copy_start
        for operation in disk.operations:
            if isinstance(operation, BeginCopy):
                start = operation.start
        is_ours = self._cursor is not None and start == proto.start_sequence
        if not proto.cursor and not (is_ours and self._cursor == b""):
            if not self._may_begin(proto):
                return
            self._drop_pending()
            disk.do(BeginCopy(proto.start_sequence, proto.start_epoch))
            self._committed = self._matched = proto.start_sequence
            self._compared_until, self.is_different = 0, False
        elif not is_ours or self._cursor != proto.cursor:
            if not disk.position.is_complete:
                self._standing_us = 0
            return
        self._cursor = proto.next_cursor
        self._has_last_chunk = proto.is_last
        disk.do(MergeChunk(chunk_from_proto(proto)))

    def _may_begin(self, proto: replication_pb2.CopyChunk) -> bool:
        # A copy from an older place than what is applied here would take committed records back.
        return proto.start_sequence >= self._disk.applying or not self._disk.position.is_complete

    def _answer_chunk(self, cursor: bytes) -> None:
        core = self._core
        if self._leader and core.has_seen_durably:
            message = core.message(core.seen)
            message.copy_acknowledge.cursor = cursor
            message.copy_acknowledge.is_complete = self._disk.position.is_complete
            core.send(self._leader, message, is_answer=True)

    # Store

    def on_done(self, now: Monotonic, event: StoreDone) -> None:
        """An operation of the store has ended well."""
        match event.operation:
            case ReadLog(node_id) if node_id == self._core.node_id:
                self._disk.take_tail(event.records)
                self._disk.ask_for_tail(self._core.node_id)
            case AppendRecords() | TruncateLog():
                self._owes_answer = True
            case MergeChunk(chunk):
                self._answer_chunk(chunk.next_cursor)
            case FinishCopy():
                self._answer_chunk(b"")
            case _:
                pass
        self.pump(now)

    def on_failed(self, now: Monotonic) -> None:
        """The store failed, and stands where `disk` says."""
        self._pending.clear()
        self._matched = min(self._matched, self._disk.position.last)
        self._has_last_chunk = False
        self._cursor = None
        self._disk.ask_for_tail(self._core.node_id)

    # What follows from it

    def pump(self, now: Monotonic) -> None:
        """Everything that can be done now."""
        core, disk = self._core, self._disk
        if now >= core.blocked_until:
            core.persist_epoch()
            self._write()
        if self._owes_ceded_word and core.has_seen_durably:
            # The promotion brings the epoch and the wish to cede at once, so this mostly waits for the epoch's sync.
            self._answer_ceded()
        self._note_fresh()
        self._compare()
        if self._standing_us is not None:
            self._answer_standing()
        elif self._owes_answer and core.has_seen_durably and not disk.pending(TruncateLog):
            self._owes_answer = False
            self._acknowledge(now)

    def _write(self) -> None:
        disk, core = self._disk, self._core
        if self._pending and not disk.pending(AppendRecords):
            records, self._pending = tuple(self._pending), []
            disk.do(AppendRecords(records))
        if not disk.pending(ApplyLog):
            up_to = min(self._committed, self._matched, disk.last)
            if up_to > disk.applying:
                disk.do(ApplyLog(up_to, core.keeps_tombstones))
            elif self._wants_digest():
                disk.do(ApplyLog(disk.applying, core.keeps_tombstones))
        if self._has_last_chunk and not disk.pending(MergeChunk) and not disk.pending(FinishCopy):
            position = disk.position
            if position.applied >= position.copy_read_at:
                self._has_last_chunk, self._cursor = False, None
                disk.do(FinishCopy())

    def _wants_digest(self) -> bool:
        """True when the primary's digest is of what is applied here, and its own is not known."""
        disk, told = self._disk, self._told
        if told is None or not disk.position.is_complete or disk.operations or told.sequence != disk.applying:
            return False
        return disk.digest is None and self._compared_until <= told.sequence and not self.is_different

    def _compare(self) -> None:
        told, own = self._told, self._disk.digest
        if told is None or own is None or own.sequence != told.sequence or not self._disk.position.is_complete:
            return
        if self.is_different or self._compared_until > told.sequence:
            return
        view = self._core.view
        if own != told:
            self.is_different = self._owes_answer = True
        else:
            # Nobody waits to hear that an in-sync replica is equal; the next answer says it.
            self._owes_answer |= self._compared_until == 0 or view is None or view.role is ReplicaRole.JOINING
            self._compared_until = told.sequence + 1

    def _note_fresh(self) -> None:
        if self._fresh_next is not None and self._disk.position.is_complete:
            committed, at = self._fresh_next
            if self._disk.position.applied >= committed:
                self.fresh_at, self._fresh_next = at, None

    def _answer_standing(self) -> None:
        """Says where it stands, once that stands still."""
        core, disk = self._core, self._disk
        if disk.operations or self._pending or not disk.knows_its_tail or not core.has_seen_durably:
            return
        if not self._leader or self._standing_us is None:
            return
        position = disk.position
        self._cursor = None if position.is_complete else position.copy_cursor
        message = core.message(core.seen)
        message.standing.CopyFrom(standing_of(position, self._standing_us))
        self._standing_us = None
        core.send(self._leader, message, is_answer=True)
