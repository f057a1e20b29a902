"""The other replicas of a shard, as its primary feeds them: records, rows of a copy, the commit point, leases.

Order rules (DESIGN.md section 7; the first one is the sum of it):

1. The set whose answers the primary needs grows before the command and shrinks after it. A joining replica that follows
   closely is *counted* (its disk for every commit, its lease for every read); once it has all that was committed
   before it was counted, and its digest is equal, the leader is *told*. What was told stays counted for the epoch.
2. A replica is fed from a record that both logs have: its last one where the epochs are equal, else what it has
   applied, which is in every log.
3. What replicas are told to be committed is what is applied here, with the digest of just that. So each of them passes
   through the same place and compares, and none is ahead of the digest that it is sent.
4. Chunks of a copy are read only while serving, so never below what the copy began at; records stream beside them.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.api.v1 import replication_pb2
from coordinator.model import Monotonic
from worker_agent.replica_core import LONG_AGO, Core
from worker_agent.replica_follower import COPY_CHUNKS_MAX, Copy, Follower, Phase, Tail, bounded
from worker_agent.replica_messages import fill_chunk, records_to_proto, rows_bytes, to_us
from worker_agent.shard_interface import ReadChunk, ReadLog, ShardView, StoreDone
from worker_agent.store_interface import LogRecord

LOG_FOR_EMPTY_MAX = 100
"""Records that a new replica is given from the log; where there are more it is copied to."""
COPY_PATIENCE = 3.0
"""Times `lagging_s` that a chunk of a copy may take before its receiver is asked where it stands."""


class Streams:
    """The followers of one primary."""

    def __init__(self, core: Core, tail: Tail) -> None:
        self._core = core
        self._tail = tail
        self.epoch = 0
        """What messages carry; 0 until the epoch is on disk."""
        self.followers: dict[str, Follower] = {}
        self.needed: list[Follower] = []
        self.is_serving = False
        """Copies are sent only while it is."""
        self.is_hurried = False
        """A seal waits until everybody has applied everything."""
        self.committed = 0
        """Everything up to here is on all needed disks."""
        self.told_count = 0
        """Times that a replica was told of; a change says that there is something new to report."""
        self._grace_until = LONG_AGO
        self._message: tuple[object, replication_pb2.ShardMessage] = (None, core.message(0))

    def follow_view(self, now: Monotonic, view: ShardView) -> None:
        """Takes over who there is; what was told before stays counted while it joins."""
        own = self._core.node_id
        before, self.followers = self.followers, {}
        for node_id in (*view.in_sync, *view.joining):
            if node_id == own:
                continue
            follower = before.get(node_id)
            if follower is None or (node_id in view.joining and not follower.is_joining):
                follower = Follower(node_id, waits_since=now)
                if node_id in self._core.connected:
                    follower.probe_from(now)
            follower.is_joining = node_id in view.joining
            if not follower.is_joining:
                # What was in flight while it joined was not waited for.
                follower.is_counted = follower.is_told = False
            self.followers[node_id] = follower
        self._choose_needed()

    def _choose_needed(self) -> None:
        self.needed = [each for each in self.followers.values() if not each.is_joining or each.is_counted]

    def excuse(self, now: Monotonic) -> None:
        """This process slept: what looks like silence of the others may be waiting to be read."""
        self._grace_until = Monotonic(now + self._core.times.lagging_s)
        for follower in self.followers.values():
            follower.moved_at = LONG_AGO

    # What the primary asks

    def durable(self) -> int:
        """Everything up to here is on all needed disks but its own."""
        return min((follower.durable for follower in self.needed), default=self._tail.last)

    def have_leases(self, now: Monotonic) -> bool:
        """True while all needed replicas hold off for this primary; the masters do, where none is needed."""
        if not self.needed:
            return self._core.has_session_lease(now)
        return all(follower.lease_until > now for follower in self.needed)

    def all_answered(self, since_us: int) -> bool:
        """True when all needed replicas have answered something that was sent at or after then."""
        return all(follower.answered_us >= since_us for follower in self.needed)

    def told(self) -> tuple[str, ...]:
        """Joining replicas that the leader may promote."""
        return tuple(sorted(each.node_id for each in self.followers.values() if each.is_joining and each.is_told))

    def lagging(self, now: Monotonic) -> dict[str, str]:
        """Replicas that are needed and do not follow, and joining ones that get no further, with why."""
        if now < self._grace_until:
            return {}
        times = self._core.times
        joining = (each for each in self.followers.values() if each.is_joining)
        reasons = {each.node_id: each.stall_reason(now, times.stall_s) for each in joining}
        reasons |= {each.node_id: each.lag_reason(now, times) for each in self.needed}
        return {node_id: reason for node_id, reason in sorted(reasons.items()) if reason}

    # What comes in

    def on_connected(self, now: Monotonic, node_id: str) -> None:
        """A stream to it is open."""
        follower = self.followers.get(node_id)
        if follower is not None:
            follower.lose(now)
            follower.probe_from(now)

    def on_lost(self, now: Monotonic, node_id: str) -> None:
        """Its stream ended."""
        follower = self.followers.get(node_id)
        if follower is not None:
            follower.lose(now)

    def on_message(self, now: Monotonic, follower: Follower, message: replication_pb2.ShardMessage) -> None:
        """An answer of this primary's time."""
        match message.WhichOneof("message"):
            case "standing":
                if follower.phase is not Phase.AWAY:
                    self._take_standing(now, follower, message.standing)
            case "acknowledge":
                self._take_acknowledge(now, follower, message.acknowledge)
            case "copy_acknowledge":
                self._take_copy_acknowledge(now, follower, message.copy_acknowledge)
            case "ceded_acknowledge":
                follower.has_ceded_word = True
            case "refuse":
                # It does not hold the shard, or has not heard of it yet, or is about to open its store.
                if message.refuse.is_opening:
                    follower.opening_at = now
                if follower.phase is not Phase.AWAY:
                    follower.probe_from(now)
                    follower.probe_at = Monotonic(now + self._core.times.probe_s)
            case _:
                pass

    def _take_standing(self, now: Monotonic, follower: Follower, standing: replication_pb2.Standing) -> None:
        disk = self._core.disk
        follower.forget_sent()
        follower.phase = Phase.STREAMING
        follower.waits_since = now
        follower.sent_at = LONG_AGO
        follower.has_acknowledged = False
        follower.is_complete = standing.is_complete
        follower.applied = standing.applied_sequence
        common, epoch = standing.last_sequence, disk.epoch_at(standing.last_sequence)
        if common > self._tail.last or epoch is None or epoch != standing.last_epoch:
            common, epoch = standing.applied_sequence, disk.epoch_at(standing.applied_sequence)
        reaches = disk.position.first <= common + 1 <= self._tail.last + 1
        # A new store gets rows, which the throttle and the figures count, instead of a log that happens to reach back.
        is_new = follower.is_joining and not follower.is_counted and not standing.last_sequence and common < disk.last
        reaches = reaches and not (standing.is_complete and (follower.wants_copy or is_new))
        has_copy = standing.is_complete or standing.copy_start_sequence > 0
        if common >= disk.last:
            follower.behind_since = None
        # A store without anything gets rows rather than a long log, which may say of one row many times what it is.
        is_to_be_copied = follower.is_joining and not follower.is_counted and self.is_serving
        is_far = standing.last_sequence == 0 and standing.is_complete and self._tail.last > LOG_FOR_EMPTY_MAX
        if reaches and has_copy and not (is_to_be_copied and is_far):
            follower.durable, follower.next, follower.previous_epoch = common, common + 1, epoch or 0
            if not standing.is_complete:
                start = standing.copy_start_sequence
                follower.copy = Copy(start, 0, standing.copy_cursor, is_begun=True, moved_at=now)
        elif follower.is_joining and not follower.is_counted:
            if not self.is_serving:
                follower.probe_from(now)
                follower.probe_at = Monotonic(now + self._core.times.probe_s)
                return
            self._begin_copy(now, follower)
        else:
            follower.phase = Phase.STUCK
            follower.stuck_reason = "lost its rows" if not has_copy else "cannot be fed from the log any more"

    def _begin_copy(self, now: Monotonic, follower: Follower) -> None:
        position = self._core.disk.position
        follower.copy = Copy(position.applied, position.applied_epoch, b"", moved_at=now)
        follower.copied_rows = follower.copied_bytes = 0
        follower.is_complete = False
        follower.compared_until, follower.is_different = 0, False
        follower.durable = position.applied
        follower.next, follower.previous_epoch = position.applied + 1, position.applied_epoch

    def _take_acknowledge(
        self, now: Monotonic, follower: Follower, acknowledge: replication_pb2.Acknowledge
    ) -> None:
        sent_s = acknowledge.sent_at_us / 1e6
        follower.answered_us = max(follower.answered_us, acknowledge.sent_at_us)
        follower.heard_at_us = max(follower.heard_at_us, acknowledge.answered_at_us)
        if acknowledge.lease_s > 0:
            follower.lease_until = Monotonic(max(follower.lease_until, sent_s + acknowledge.lease_s))
        if follower.phase is not Phase.STREAMING:
            return
        follower.has_acknowledged = True
        follower.waits_since = None if acknowledge.sent_at_us >= follower.sent_us else Monotonic(sent_s)
        # It may have taken what was on its way when it said where it stood; that will be sent once more.
        follower.note_durable(now, min(acknowledge.durable_sequence, follower.next - 1))
        follower.applied = acknowledge.applied_sequence
        follower.compared_until = acknowledge.compared_until
        follower.is_different = acknowledge.is_different
        if follower.is_different and follower.copy is None and follower.is_joining and not follower.is_counted:
            # Its log is this one's, and yet its rows are not: nothing but a whole copy makes them equal.
            follower.wants_copy = True
            follower.probe_from(now)

    def _take_copy_acknowledge(
        self, now: Monotonic, follower: Follower, acknowledge: replication_pb2.CopyAcknowledge
    ) -> None:
        copy = follower.copy
        if copy is None:
            return
        copy.moved_at = follower.moved_at = now
        follower.wants_copy = False
        while acknowledge.cursor in copy.unacknowledged and copy.unacknowledged.popleft() != acknowledge.cursor:
            pass
        if acknowledge.is_complete and copy.is_read:
            follower.is_complete, follower.copy = True, None
            follower.sent_at = LONG_AGO

    def on_records(self, now: Monotonic, event: StoreDone, operation: ReadLog) -> None:
        """Records were read from the log."""
        follower = self.followers.get(operation.node_id)
        if follower is None:
            return
        follower.is_reading = False
        records = [record for record in event.records if record.sequence <= self._core.disk.last]
        fits = follower.phase is Phase.STREAMING and follower.next == operation.first
        if fits and records and records[0].sequence == follower.next:
            self._send_records(now, follower, bounded(records))

    def on_unreadable(self, now: Monotonic, node_id: str) -> None:
        """The log does not reach back to what a follower needs any more."""
        follower = self.followers.get(node_id)
        if follower is not None and follower.phase is Phase.STREAMING:
            follower.is_reading = False
            follower.probe_from(now)

    def ask_again(self, now: Monotonic) -> None:
        """Asks everybody anew where he stands."""
        for follower in self.followers.values():
            if follower.phase in (Phase.STREAMING, Phase.STUCK):
                follower.probe_from(now)

    def on_store_failed(self) -> None:
        """Whatever was being read will not come."""
        for follower in self.followers.values():
            follower.is_reading = False
            if follower.copy is not None:
                follower.copy.is_reading = False

    def on_chunk(self, now: Monotonic, event: StoreDone, operation: ReadChunk) -> None:
        """Rows were read."""
        follower, chunk = self.followers.get(operation.node_id), event.chunk
        if follower is None or follower.copy is None or chunk is None:
            return
        copy = follower.copy
        if not copy.is_reading or copy.cursor != operation.cursor or follower.phase is not Phase.STREAMING:
            return
        copy.is_reading = False
        if chunk.read_at < copy.start:
            # Read for an earlier attempt: what was committed since then does not stream to this one.
            return
        message = self._core.message(self.epoch)
        fill_chunk(message.copy_chunk, chunk, copy.start, copy.start_epoch)
        copy.cursor, copy.is_begun, copy.is_read, copy.moved_at = chunk.next_cursor, True, chunk.is_last, now
        copy.unacknowledged.append(chunk.next_cursor)
        follower.copied_rows += len(chunk.rows)
        follower.copied_bytes += rows_bytes(chunk.rows)
        self._core.send(follower.node_id, message, is_answer=False)

    def on_chunk_failed(self, operation: ReadChunk, reason: str) -> None:
        """Rows cannot be read, so this copy cannot be made; a later one may."""
        follower = self.followers.get(operation.node_id)
        if follower is not None and follower.copy is not None and follower.phase is Phase.STREAMING:
            follower.forget_sent()
            follower.phase, follower.stuck_reason = Phase.STUCK, f"cannot be given a copy: {reason}"

    # What goes out

    def pump(self, now: Monotonic) -> None:
        """Sends everything that may be sent now."""
        for follower in self.followers.values():
            if follower.phase is Phase.PROBING:
                self._probe(now, follower)
            elif follower.phase is Phase.STREAMING:
                self._feed(now, follower)

    def _probe(self, now: Monotonic, follower: Follower) -> None:
        if self._core.has_seen_durably and now >= follower.probe_at:
            message = self._core.message(self.epoch)
            message.probe.sent_at_us = to_us(now)
            follower.probe_at = Monotonic(now + self._core.times.probe_s)
            self._core.send(follower.node_id, message, is_answer=False)

    def _feed(self, now: Monotonic, follower: Follower) -> None:
        disk = self._core.disk
        copy = follower.copy
        if copy is not None:
            if now - copy.moved_at > COPY_PATIENCE * self._core.times.lagging_s and copy.unacknowledged:
                follower.probe_from(now)
                return
            waiting = len(copy.unacknowledged)
            if self.is_serving and not copy.is_read and not copy.is_reading and waiting < COPY_CHUNKS_MAX:
                copy.is_reading = True
                disk.do(ReadChunk(follower.node_id, copy.cursor))
            if not copy.is_begun:
                # It begins with its first chunk: records before that would not fit to what is there.
                return
        while follower.next <= disk.last and follower.has_room and not follower.is_reading:
            records = self._tail.slice(follower.next, disk.last)
            if records:
                self._send_records(now, follower, records)
            else:
                follower.is_reading = True
                disk.do(ReadLog(follower.node_id, follower.next))
        if now >= self.beat_at(follower):
            self._send_records(now, follower, [])

    def beat_at(self, follower: Follower) -> float:
        """When it is sent something at the latest."""
        return follower.beat_at(self._core.times, is_hurried=self.is_hurried)

    def beat(self, now: Monotonic, followers: Iterable[Follower]) -> None:
        """Sends a heartbeat ahead of its time."""
        for follower in followers:
            if follower.phase is Phase.STREAMING:
                self._send_records(now, follower, [])

    def _send_records(self, now: Monotonic, follower: Follower, records: list[LogRecord]) -> None:
        now_us = to_us(now)
        last = records[-1].sequence if records else 0
        position = self._core.disk.position
        key = (now_us, follower.next, follower.previous_epoch, last, position.applied, self.epoch, self._core.disk.last)
        if self._message[0] != key:
            self._message = (key, self._append_message(now, follower, records))
        follower.note_sent(now, now_us, records)
        # Followers that stand at the same place share one message; nobody changes it any more.
        self._core.send(follower.node_id, self._message[1], is_answer=False)

    def _append_message(
        self, now: Monotonic, follower: Follower, records: list[LogRecord]
    ) -> replication_pb2.ShardMessage:
        disk = self._core.disk
        message = self._core.message(self.epoch)
        append = message.append
        append.previous_sequence = follower.next - 1
        append.previous_epoch = follower.previous_epoch
        append.records.extend(records_to_proto(records))
        append.sent_at_us = to_us(now)
        append.last_sequence = self._tail.last
        append.committed_sequence = disk.position.applied
        if disk.digest is not None and disk.digest.sequence == disk.position.applied:
            append.has_digest = True
            append.digest_sequence = disk.digest.sequence
            append.digest = disk.digest.value
            append.digest_rows = disk.digest.rows
        if self.is_serving and self.have_leases(now):
            append.heard_at_us.update({each.node_id: each.heard_at_us for each in self.followers.values()})
        return message

    # Joining replicas

    def judge_joining(self, now: Monotonic) -> None:
        """Counts joining replicas that follow closely, and tells of those that have everything (order rule 1)."""
        disk = self._core.disk
        for follower in self.followers.values():
            if not follower.is_joining or follower.is_told:
                continue
            follower.look_whether_it_moves(now)
            is_fit = follower.next > disk.last and follower.follows_closely(now, self._core.times)
            if is_fit and not follower.is_counted and self._core.protections.needs_before_report:
                follower.is_counted = True
                self._choose_needed()
            elif not is_fit and follower.is_counted:
                # Nobody knows of it yet, so it may go back to where it was.
                follower.is_counted = False
                self._choose_needed()
            if is_fit and follower.durable >= self.committed:
                follower.is_told = True
                self.told_count += 1
