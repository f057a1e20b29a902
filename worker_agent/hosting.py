"""What the worker holds: from assignments to roles in force and to replica reports. A passive machine.

What it keeps (DESIGN.md sections 5 and 7):

- **Shrinks at once, grows after the disk.** A role that an assignment takes away is gone the moment the
  assignment arrives; one that it gives is in force, and reported, only when the assignment is on disk. So
  whatever the worker has shown to anybody, an epoch above all, it still knows after a crash.
- **Epochs never go back.** Per shard, an assignment below the highest epoch seen is not followed.
- **Ceded stays ceded.** A primary that has ceded answers again only at a higher epoch; the masters raise
  the epoch when they roll a move back, too.
- **A restart confirms nothing.** What an earlier process left on disk counts as seen, never as held: roles
  come only from an assignment that this process received.

One assignment is being written at a time. Of those that come in meanwhile only the newest counts, since
each one is whole; the one being written still comes into force, so that a stream of assignments cannot hold
the reports back for ever.

In this version a shard is its assignment: a joining replica has caught up as soon as that is on disk, so its
primary says so at once; a primary has ceded, or is sealed, as soon as it stopped. The data of a shard hangs on
the same events: `replica.py` will report in its own time.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from coordinator.api.v1 import session_pb2
from coordinator.model import Monotonic
from coordinator.model.errors import Damaged

ACCEPTED = session_pb2.REPLICA_PROGRESS_ACCEPTED
CAUGHT_UP = session_pb2.REPLICA_PROGRESS_CAUGHT_UP
CEDED = session_pb2.REPLICA_PROGRESS_CEDED

MAGIC = b"WASSIGN1"
_HEADER = struct.Struct(">8sIII")
"""Magic, bytes of the cluster id, bytes of the assignment, CRC-32 of the two."""


class Role(enum.Enum):
    """A worker's role in one shard; the value is the number in session.proto."""

    PRIMARY = 1
    IN_SYNC = 2
    JOINING = 3


@dataclass(frozen=True, slots=True)
class Held:
    """One shard as the worker holds it."""

    shard_id: int
    lo: int
    hi: int
    """First key hash after the range, at most 2^64."""
    epoch: int
    role: Role
    cede_to: str = ""
    """For a primary: the worker that it has ceded to."""
    move_id: int = 0
    joining: tuple[str, ...] = ()
    is_sealed: bool = False
    """For a primary: it has stopped, because the shard is to be cut or joined."""

    @property
    def has_stopped(self) -> bool:
        """True for a primary that has ceded or is sealed."""
        return bool(self.cede_to) or self.is_sealed

    @property
    def progress(self) -> session_pb2.ReplicaProgress.ValueType:
        """How far it is, as the leader wants to hear it."""
        if self.role is Role.JOINING:
            return CAUGHT_UP
        return CEDED if self.has_stopped else ACCEPTED


@dataclass(frozen=True, slots=True)
class Stored:
    """What the file holds: the last assignment that an earlier process put in force, and whose it is."""

    cluster_id: str
    assignment: session_pb2.Assignment


@dataclass(frozen=True, slots=True)
class Persist:
    """Write `content` to the file, atomically and durably, then call `on_persisted`."""

    generation: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a persisted assignment changed: the generation in force, what to report, and what to write next."""

    generation: int
    reports: tuple[session_pb2.ReplicaReport, ...]
    next_write: Persist | None
    ignored: tuple[str, ...]
    """One sentence for each entry that was not followed."""


class Hosting:
    """What one process of the worker holds.

    `has_lease` is the session's lease check. `stored` is what `decode` made of the file, None when there is no file.
    """

    def __init__(self, has_lease: Callable[[Monotonic], bool], stored: Stored | None = None) -> None:
        self._has_lease = has_lease
        self._held: dict[int, Held] = {}
        self._primaries: set[int] = set()
        """Shards that this worker answers for, the lease permitting."""
        self._epochs: dict[int, int] = {}
        self._jobs: tuple[session_pb2.JobAssignment, ...] = ()
        self._generation = 0
        self._writing: Stored | None = None
        self._waiting: Stored | None = None
        if stored is not None:
            self._see(stored.assignment)

    # What others may ask

    @property
    def generation(self) -> int:
        """Generation of the assignment in force; 0 before the first one of this process."""
        return self._generation

    @property
    def held(self) -> tuple[Held, ...]:
        """The shards of the assignment in force, sorted by id."""
        return tuple(self._held[shard_id] for shard_id in sorted(self._held))

    @property
    def jobs_owned(self) -> tuple[str, ...]:
        """Jobs that this worker owns, sorted."""
        return tuple(sorted(job.job_id for job in self._jobs if job.rank == 0))

    @property
    def jobs_backed(self) -> tuple[str, ...]:
        """Jobs that this worker is a backup of, sorted."""
        return tuple(sorted(job.job_id for job in self._jobs if job.rank > 0))

    def epoch_seen(self, shard_id: int) -> int:
        """Highest epoch of the shard that was ever seen; 0 when none was."""
        return self._epochs.get(shard_id, 0)

    def may_answer(self, shard_id: int, now: Monotonic) -> bool:
        """True when this worker may answer for the shard as its primary, now.

        The session lease is what a single copy needs; with more copies, replica leases are to be asked beside it.
        """
        return shard_id in self._primaries and self._has_lease(now)

    def primary_count(self) -> int:
        """Shards that this worker answers for, the lease permitting."""
        return len(self._primaries)

    def reports(self) -> tuple[session_pb2.ReplicaReport, ...]:
        """How far every shard is, sorted by id; what a new session is told."""
        return tuple(_report(held, held.progress) for held in self.held)

    def validate(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert self._waiting is None or self._writing is not None, "nothing waits while nothing is written"
        for shard_id in self._primaries:
            held = self._held[shard_id]
            assert held.role is Role.PRIMARY, f"shard {shard_id} is answered for without being primary"
            assert not held.has_stopped, f"shard {shard_id} is answered for after it was ceded"
        for held in self._held.values():
            assert held.epoch <= self.epoch_seen(held.shard_id), f"shard {held.shard_id} has an epoch that was not seen"
            assert 0 <= held.lo < held.hi <= 1 << 64, f"shard {held.shard_id} has no range"

    # What happens

    def on_assignment(self, assignment: session_pb2.Assignment, cluster_id: str) -> Persist | None:
        """Takes an assignment in that the session has accepted; None while an earlier one is still being written."""
        self._primaries -= self._lost_by(assignment)
        arrived = Stored(cluster_id, assignment)
        if self._writing is not None:
            self._waiting = arrived
            return None
        return self._write(arrived)

    def on_persisted(self) -> Outcome:
        """The assignment that was to be written is on disk: it comes into force."""
        assert self._writing is not None, "on_persisted answers a Persist"
        assignment, self._writing = self._writing.assignment, None
        held, ignored = self._follow(assignment)
        before, self._held = self._held, held
        self._see(assignment)
        self._jobs = tuple(assignment.jobs)
        self._generation = assignment.generation
        self._primaries = {
            shard.shard_id for shard in held.values() if shard.role is Role.PRIMARY and not shard.has_stopped
        }
        if self._waiting is not None:
            self._primaries -= self._lost_by(self._waiting.assignment)
        next_write = None
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            next_write = self._write(waiting)
        return Outcome(assignment.generation, tuple(_changed(before, held)), next_write, ignored)

    def _write(self, stored: Stored) -> Persist:
        self._writing = stored
        return Persist(stored.assignment.generation, encode(stored))

    def _see(self, assignment: session_pb2.Assignment) -> None:
        for entry in assignment.shards:
            self._epochs[entry.shard.id] = max(self.epoch_seen(entry.shard.id), entry.shard.epoch)

    def _lost_by(self, assignment: session_pb2.Assignment) -> set[int]:
        """Shards that this worker answers for and that the assignment takes away, or asks it to cede."""
        kept = {
            entry.shard.id
            for entry in assignment.shards
            if entry.role == session_pb2.REPLICA_ROLE_PRIMARY and not (entry.cede_to or entry.seal)
        }
        return self._primaries - kept

    def _follow(self, assignment: session_pb2.Assignment) -> tuple[dict[int, Held], tuple[str, ...]]:
        """The shards to hold by an assignment, and why some of its entries are not followed."""
        held: dict[int, Held] = {}
        ignored: list[str] = []
        for entry in assignment.shards:
            shard = entry.shard
            seen = self.epoch_seen(shard.id)
            if shard.epoch < seen:
                ignored.append(f"shard {shard.id} is assigned at epoch {shard.epoch}, but epoch {seen} was seen before")
                continue
            if entry.role not in (Role.PRIMARY.value, Role.IN_SYNC.value, Role.JOINING.value):
                ignored.append(f"shard {shard.id} is assigned in role {entry.role}, which this version does not know")
                continue
            before = self._held.get(shard.id)
            is_same_epoch = before is not None and before.epoch == shard.epoch
            ceded_to = before.cede_to if before is not None and is_same_epoch else ""
            was_sealed = before is not None and is_same_epoch and before.is_sealed
            held[shard.id] = Held(
                shard_id=shard.id,
                lo=shard.lo,
                hi=shard.hi or 1 << 64,
                epoch=shard.epoch,
                role=Role(entry.role),
                cede_to=entry.cede_to or ceded_to,
                move_id=entry.move_id,
                joining=tuple(shard.joining),
                is_sealed=entry.seal or was_sealed,
            )
        return held, tuple(ignored)


def _report(held: Held, progress: session_pb2.ReplicaProgress.ValueType) -> session_pb2.ReplicaReport:
    caught_up = held.joining if held.role is Role.PRIMARY else ()
    return session_pb2.ReplicaReport(
        shard_id=held.shard_id, epoch=held.epoch, progress=progress, caught_up=caught_up
    )


def _changed(before: dict[int, Held], after: dict[int, Held]) -> Iterable[session_pb2.ReplicaReport]:
    """Reports of the shards that are new or further than before: first that it was accepted, then how far it is."""
    for shard_id in sorted(after):
        held, old = after[shard_id], before.get(shard_id)
        if old is None or (old.epoch, old.role) != (held.epoch, held.role):
            yield _report(held, ACCEPTED)
            if held.progress != ACCEPTED:
                yield _report(held, held.progress)
        elif old.progress != held.progress:
            yield _report(held, held.progress)


def encode(stored: Stored) -> bytes:
    """The bytes of the file."""
    cluster_id = stored.cluster_id.encode("utf-8")
    assignment = stored.assignment.SerializeToString(deterministic=True)
    checksum = zlib.crc32(assignment, zlib.crc32(cluster_id))
    return _HEADER.pack(MAGIC, len(cluster_id), len(assignment), checksum) + cluster_id + assignment


def decode(content: bytes, name: str) -> Stored:
    """What the file holds. Raises Damaged; `name` is the file's name for the message."""
    advice = f"{name} is damaged; move the file away, and the worker starts without its memory of assignments"
    if len(content) < _HEADER.size:
        raise Damaged(f"{advice} ({len(content)} bytes, fewer than its header has)")
    magic, cluster_id_bytes, assignment_bytes, checksum = _HEADER.unpack_from(content)
    body = content[_HEADER.size :]
    if magic != MAGIC:
        raise Damaged(f"{advice} (it begins with {magic!r} instead of {MAGIC!r})")
    if len(body) != cluster_id_bytes + assignment_bytes:
        raise Damaged(f"{advice} ({len(body)} bytes where {cluster_id_bytes + assignment_bytes} should be)")
    if zlib.crc32(body) != checksum:
        raise Damaged(f"{advice} (its checksum is wrong)")
    try:
        cluster_id = body[:cluster_id_bytes].decode("utf-8")
        assignment = session_pb2.Assignment.FromString(body[cluster_id_bytes:])
    except (UnicodeDecodeError, DecodeError) as error:
        raise Damaged(f"{advice} ({error})") from None
    return Stored(cluster_id, assignment)
