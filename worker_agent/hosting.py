"""What the worker holds: from assignments to the shards in force. A passive machine.

What it keeps (DESIGN.md section 5):

- **In force only when on disk.** So whatever the worker has shown to anybody it still knows after a crash. Taking a
  role away may wait for the disk too: what a role allows is decided by epochs and leases (replica.py), not here.
- **Epochs never go back.** Per shard, an assignment below the highest epoch seen is not followed.
- **A restart confirms nothing.** What an earlier process left on disk counts as seen, never as held: roles
  come only from an assignment that this process received.

One assignment is being written at a time. Of those that come in meanwhile only the newest counts, since
each one is whole; the one being written still comes into force, so that a stream of assignments cannot hold
everything back for ever.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from coordinator.api.v1 import session_pb2
from coordinator.model.errors import Damaged
from worker_agent.shard_interface import ReplicaRole, ShardView

MAGIC = b"WASSIGN1"
_HEADER = struct.Struct(">8sIII")
"""Magic, bytes of the cluster id, bytes of the assignment, CRC-32 of the two."""
_ROLES = {role.value: role for role in ReplicaRole}


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
    """What a persisted assignment changed: what is in force now, and what to write next."""

    generation: int
    views: tuple[ShardView, ...]
    """The shards, sorted by id."""
    peers: Mapping[str, str]
    """host:port of the other workers that the shards name, by id."""
    copy_bytes_per_s: int
    """How fast copies may be sent; 0 for no limit."""
    next_write: Persist | None
    ignored: tuple[str, ...]
    """One sentence for each entry that was not followed."""


class Hosting:
    """What one process of the worker holds. `stored` is what `decode` made of the file, None when there is no file."""

    def __init__(self, stored: Stored | None = None) -> None:
        self._views: dict[int, ShardView] = {}
        self._lines: dict[int, tuple[session_pb2.ShardAssignment, ShardView]] = {}
        """What was made of each line of the assignment in force: of many shards one has changed, mostly."""
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
    def views(self) -> tuple[ShardView, ...]:
        """The shards of the assignment in force, sorted by id."""
        return tuple(self._views[shard_id] for shard_id in sorted(self._views))

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

    def news(self, assignment: session_pb2.Assignment) -> dict[int, int]:
        """Epochs that an arriving assignment has above all that were seen, by shard; for who holds it until then.

        Not of a shard that the assignment that is being written gives up: it is closed before it comes back, and what
        opens it then takes an epoch that is in its store already for one that an earlier process may have used.
        """
        shards = [entry.shard for entry in assignment.shards]
        if self._writing is not None:
            staying = {entry.shard.id for entry in self._writing.assignment.shards}
            shards = [shard for shard in shards if shard.id in staying]
        return {shard.id: shard.epoch for shard in shards if shard.epoch > self._epochs.get(shard.id, 0)}

    def validate(self) -> None:
        """Raises AssertionError when an invariant is broken."""
        assert self._waiting is None or self._writing is not None, "nothing waits while nothing is written"
        for view in self._views.values():
            assert view.epoch <= self.epoch_seen(view.shard_id), f"shard {view.shard_id} has an epoch that was not seen"
            assert 0 <= view.lo < view.hi <= 1 << 64, f"shard {view.shard_id} has no range"

    # What happens

    def on_assignment(self, assignment: session_pb2.Assignment, cluster_id: str) -> Persist | None:
        """Takes an assignment in that the session has accepted; None while an earlier one is still being written."""
        arrived = Stored(cluster_id, assignment)
        if self._writing is not None:
            self._waiting = arrived
            return None
        return self._write(arrived)

    def on_persisted(self) -> Outcome:
        """The assignment that was to be written is on disk: it comes into force."""
        assert self._writing is not None, "on_persisted answers a Persist"
        assignment, self._writing = self._writing.assignment, None
        self._views, ignored = self._follow(assignment)
        self._see(assignment)
        self._jobs = tuple(assignment.jobs)
        self._generation = assignment.generation
        next_write = None
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            next_write = self._write(waiting)
        return Outcome(
            generation=assignment.generation,
            views=self.views,
            peers={peer.node_id: peer.grpc_address for peer in assignment.peers},
            copy_bytes_per_s=assignment.copy_bytes_per_s,
            next_write=next_write,
            ignored=ignored,
        )

    def _write(self, stored: Stored) -> Persist:
        self._writing = stored
        return Persist(stored.assignment.generation, encode(stored))

    def _see(self, assignment: session_pb2.Assignment) -> None:
        for entry in assignment.shards:
            self._epochs[entry.shard.id] = max(self.epoch_seen(entry.shard.id), entry.shard.epoch)

    def _follow(self, assignment: session_pb2.Assignment) -> tuple[dict[int, ShardView], tuple[str, ...]]:
        """The shards to hold by an assignment, and why some of its entries are not followed."""
        views: dict[int, ShardView] = {}
        ignored: list[str] = []
        before, self._lines = self._lines, {}
        for entry in assignment.shards:
            shard = entry.shard
            known = before.get(shard.id)
            if known is not None and known[0] == entry:
                self._lines[shard.id], views[shard.id] = known, known[1]
                continue
            seen = self.epoch_seen(shard.id)
            if shard.epoch < seen:
                ignored.append(f"shard {shard.id} is assigned at epoch {shard.epoch}, but epoch {seen} was seen before")
                continue
            role = _ROLES.get(entry.role)
            if role is None:
                ignored.append(f"shard {shard.id} is assigned in role {entry.role}, which this version does not know")
                continue
            view = views[shard.id] = ShardView(
                shard_id=shard.id,
                lo=shard.lo,
                hi=shard.hi or 1 << 64,
                epoch=shard.epoch,
                role=role,
                primary=shard.primary,
                in_sync=tuple(shard.in_sync),
                joining=tuple(shard.joining),
                is_formed=entry.formed,
                cede_to=entry.cede_to,
                is_sealed=entry.seal,
                parents=tuple(entry.parents),
                move_id=entry.move_id,
            )
            self._lines[shard.id] = (entry, view)
        return views, tuple(ignored)


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
