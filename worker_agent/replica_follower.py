"""What a primary knows of one other replica, and the newest part of its own log in memory.

    AWAY       no stream                                        PeerConnected -> PROBING
    PROBING    asked where it stands                            Standing -> STREAMING or STUCK; PeerLost -> AWAY
    STREAMING  records flow; beside them rows, while it copies  PeerLost -> AWAY
    STUCK      the log cannot be continued, or rows not be      PeerLost -> AWAY; removed, or given up, by a command
               read that it is to be given

What it may have unacknowledged is bounded by WINDOW_RECORDS and WINDOW_BYTES; beyond that it is fed from the log as it
acknowledges.

Who is needed and lags holds up writes, so it has `lagging_s`; only one that says all the time that it is still opening
its store has longer, for to take it out would cost a whole copy. Who joins holds nothing up, and has `stall_s` for each
step forward; but time in which it waits for this side (a throttle, a slow disk here) is not counted against it.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from coordinator.model import Monotonic
from worker_agent.replica_core import LONG_AGO
from worker_agent.replica_messages import record_bytes
from worker_agent.shard_interface import ReplicaTimes
from worker_agent.store_interface import LogRecord

WINDOW_RECORDS = 2_048
WINDOW_BYTES = 4 << 20
MESSAGE_RECORDS_MAX = 512
MESSAGE_BYTES_MAX = 1 << 20
"""Of the records of one Append, one record at least: a gRPC message may have 4 MiB."""
COPY_CHUNKS_MAX = 3
"""Chunks of a copy that are being read or not acknowledged."""
HURRIED_BEAT_S = 0.01
BEAT_MOMENTS = 4
"""Common moments in the time of one heartbeat."""
BEAT_EARLY_S = 0.002
"""So much earlier a heartbeat may leave: timers ring a little early or late."""
TAIL_RECORDS_MAX = 4_096
TAIL_BYTES_MAX = 8 << 20


class Tail:
    """The newest records of a log, so that peers that follow closely are fed without reading the disk.

    Invariant: the records are contiguous and end at `last`.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self._records: list[LogRecord] = []
        self._gone = 0
        """Records at the front of the list that count no more; they are deleted in one go from time to time."""
        self._bytes = 0

    @property
    def first(self) -> int:
        """Sequence of the first record here; `last` + 1 when there is none."""
        return self.last - (len(self._records) - self._gone) + 1

    def append(self, record: LogRecord) -> None:
        """Takes the next record."""
        self._records.append(record)
        self.last = record.sequence
        self._bytes += record_bytes(record)

    def trim(self, keep_from: int) -> None:
        """Forgets the oldest beyond the bounds, though none from `keep_from` on."""
        count = len(self._records) - self._gone
        while self.first < keep_from and (count > TAIL_RECORDS_MAX or self._bytes > TAIL_BYTES_MAX):
            self._bytes -= record_bytes(self._records[self._gone])
            self._gone += 1
            count -= 1
        if self._gone > TAIL_RECORDS_MAX:
            del self._records[: self._gone]
            self._gone = 0

    def reset(self, last: int) -> None:
        """Begins anew, without records."""
        self._records.clear()
        self.last, self._gone, self._bytes = last, 0, 0

    def cut(self, last: int) -> None:
        """Drops what is behind `last`."""
        while self.last > last:
            self._bytes -= record_bytes(self._records.pop())
            self.last -= 1

    def slice(self, first: int, last: int) -> list[LogRecord]:
        """The records of one message from `first` on, at most up to `last`; empty when `first` is not here any more."""
        if first < self.first:
            return []
        start = self._gone + first - self.first
        return bounded(self._records[start : start + min(last - first + 1, MESSAGE_RECORDS_MAX)])

    def all_from(self, first: int) -> tuple[LogRecord, ...]:
        """All records from there on."""
        return tuple(self._records[self._gone + max(first - self.first, 0) :])


def bounded(records: Sequence[LogRecord]) -> list[LogRecord]:
    """As many as one message takes, one at least."""
    size = 0
    for number, record in enumerate(records):
        size += record_bytes(record)
        if number and (size > MESSAGE_BYTES_MAX or number >= MESSAGE_RECORDS_MAX):
            return list(records[:number])
    return list(records)


class Phase(enum.Enum):
    """See above."""

    AWAY = 0
    PROBING = 1
    STREAMING = 2
    STUCK = 3


@dataclass(frozen=True, slots=True)
class CopyFigure:
    """How far the copy to a joining replica is, for others."""

    node_id: str
    rows: int
    bytes: int
    is_complete: bool


@dataclass(slots=True)
class Copy:
    """A copy on its way to a joining replica."""

    start: int
    start_epoch: int
    cursor: bytes
    """Where the next chunk begins that is to be read."""
    is_begun: bool = False
    """True once the receiver has begun it: its first chunk was sent, or an earlier attempt's."""
    is_reading: bool = False
    is_read: bool = False
    """True when the last chunk has been read."""
    unacknowledged: deque[bytes] = field(default_factory=deque)
    """`next_cursor` of the chunks that were sent."""
    moved_at: Monotonic = LONG_AGO
    """When a chunk was last sent or acknowledged."""


@dataclass(slots=True)
class Follower:
    """One other replica. Invariant: durable < next; what it was sent ends before `next`."""

    node_id: str
    phase: Phase = Phase.AWAY
    is_joining: bool = False
    is_counted: bool = False
    """A joining replica whose disk and lease the primary needs already."""
    is_told: bool = False
    """The leader has been told that it has caught up, so `is_counted` stays for this epoch."""
    is_complete: bool = False
    is_different: bool = False
    compared_until: int = 0
    wants_copy: bool = False
    """It joins and its rows differ: it is copied anew, however far its log reaches."""
    has_acknowledged: bool = False
    """It has answered an Append since it said where it stands, so its log has no end of its own."""
    next: int = 1
    previous_epoch: int = 0
    """Epoch of the record before `next`; 0 where the receiver does not ask."""
    durable: int = 0
    applied: int = 0
    unacknowledged: deque[tuple[int, int, Monotonic]] = field(default_factory=deque)
    """(last sequence, bytes, when) of every Append with records that is not acknowledged."""
    unacknowledged_bytes: int = 0
    behind_since: Monotonic | None = None
    """Since when it has not written what it was sent."""
    is_reading: bool = False
    """A ReadLog for it is on its way."""
    answered_us: int = 0
    heard_at_us: int = 0
    """Its clock when it sent its latest acknowledgement on this stream."""
    lease_until: Monotonic = LONG_AGO
    sent_at: Monotonic = LONG_AGO
    sent_us: int = 0
    probe_at: Monotonic = LONG_AGO
    waits_since: Monotonic | None = None
    """Since when it owes an answer, or since when it is away."""
    opening_at: Monotonic = LONG_AGO
    """When it last said that its store is not open yet."""
    moved_at: Monotonic = LONG_AGO
    """While it joins a primary that serves: when it last got further, or had to wait for this side."""
    copy: Copy | None = None
    copied_rows: int = 0
    copied_bytes: int = 0
    has_ceded_word: bool = False
    """It has acknowledged that this primary has ceded."""
    stuck_reason: str = ""

    def lose(self, now: Monotonic) -> None:
        """Its stream ended."""
        self.phase = Phase.AWAY
        self.forget_sent()
        if self.waits_since is None:
            self.waits_since = now

    def probe_from(self, now: Monotonic) -> None:
        """Asks where it stands, from now on."""
        self.phase = Phase.PROBING
        self.probe_at = now
        self.forget_sent()
        if self.waits_since is None:
            self.waits_since = now

    def forget_sent(self) -> None:
        """What was sent and is not acknowledged will be sent again."""
        self.unacknowledged.clear()
        self.unacknowledged_bytes = 0
        self.copy = None
        self.heard_at_us = 0

    def note_sent(self, now: Monotonic, now_us: int, records: Sequence[LogRecord]) -> None:
        """An Append went out."""
        self.sent_at, self.sent_us = now, now_us
        if self.waits_since is None:
            self.waits_since = now
        if records:
            size = sum(map(record_bytes, records))
            self.next, self.previous_epoch = records[-1].sequence + 1, records[-1].epoch
            self.unacknowledged.append((records[-1].sequence, size, now))
            self.unacknowledged_bytes += size
            if self.behind_since is None:
                self.behind_since = now

    def note_durable(self, now: Monotonic, durable: int) -> None:
        """It has everything up to there on disk."""
        if durable <= self.durable:
            return
        self.durable, self.moved_at = durable, now
        while self.unacknowledged and self.unacknowledged[0][0] <= durable:
            self.unacknowledged_bytes -= self.unacknowledged.popleft()[1]
        self.behind_since = self.unacknowledged[0][2] if self.unacknowledged else None

    @property
    def has_room(self) -> bool:
        """True while more records may be sent to it."""
        return self.next - self.durable <= WINDOW_RECORDS and self.unacknowledged_bytes < WINDOW_BYTES

    def _is_opening(self, now: Monotonic, times: ReplicaTimes) -> bool:
        """True while it says that its store is being opened or made, and that does not take too long."""
        is_said = now - self.opening_at <= max(times.lagging_s, 3 * times.probe_s)
        return is_said and self.waits_since is not None and now - self.waits_since <= times.opening_s

    def lag_reason(self, now: Monotonic, times: ReplicaTimes) -> str:
        """Why it is to be taken out of the in-sync set; empty when it is not."""
        if self.is_different:
            return f"the rows of {self.node_id} differ"
        if self.phase is Phase.STUCK:
            return f"{self.node_id} {self.stuck_reason}"
        if self._is_opening(now, times):
            return ""
        if self.waits_since is not None and now - self.waits_since > times.lagging_s:
            is_opening = self.opening_at >= self.waits_since
            return f"{self.node_id} {'takes too long to open its store' if is_opening else 'does not answer'}"
        if self.behind_since is not None and now - self.behind_since > times.lagging_s:
            return f"{self.node_id} does not write what it is sent"
        return ""

    def follows_closely(self, now: Monotonic, times: ReplicaTimes) -> bool:
        """True when it has equal rows, grants its lease and answers: so it may be needed."""
        is_equal = self.is_complete and not self.is_different and self.compared_until > 0
        is_streaming = self.phase is Phase.STREAMING and self.lease_until > now
        return is_equal and is_streaming and not self.lag_reason(now, times)

    def beat_at(self, times: ReplicaTimes, *, is_hurried: bool) -> float:
        """When it is sent something at the latest; sooner while a move waits for it.

        Heartbeats fall on moments that all shards of the process have in common, a little early rather than late: those
        of many shards leave in one frame, and are answered in one.
        """
        if self.sent_at == LONG_AGO:
            return LONG_AGO
        if is_hurried:
            return self.sent_at + HURRIED_BEAT_S
        if self.is_joining and self.is_complete and not self.is_told:
            return self.sent_at + times.probe_s
        moment_s = times.heartbeat_s / BEAT_MOMENTS
        due = self.sent_at + times.heartbeat_s + BEAT_EARLY_S
        return math.floor(due / moment_s) * moment_s - BEAT_EARLY_S

    def look_whether_it_moves(self, now: Monotonic) -> None:
        """Starts the time anew that it has for the next step forward, while the step is not its own."""
        copy = self.copy
        is_read_here = self.is_reading or (copy is not None and copy.is_reading and not copy.unacknowledged)
        if is_read_here or self.moved_at == LONG_AGO:
            self.moved_at = now

    def stall_reason(self, now: Monotonic, stall_s: float) -> str:
        """Why a joining replica is to be given up; empty when it is not."""
        if self.phase is Phase.STUCK:
            return f"{self.node_id} {self.stuck_reason}"
        if self.is_told or self.moved_at == LONG_AGO or now - self.moved_at <= stall_s:
            return ""
        match self.phase:
            case Phase.AWAY:
                why = "cannot be reached"
            case Phase.PROBING if self.copy is None and self.opening_at > self.moved_at:
                why = "does not open its store"
            case Phase.STREAMING if self.is_different:
                why = "has other rows"
            case _:
                why = "does not write what it is sent"
        return f"{self.node_id} got no further for {stall_s:g} s: it {why}"
