"""What a shard's store keeps and answers: records, rows, digests, positions, and the two protocols.

`Store` is used by one thread at a time, its `Reader` on the event loop beside it. store.py is the one on disk,
tests/model_store.py the one of the simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from coordinator.api.v1 import replication_pb2
from coordinator.model import WallMs
from coordinator.model.errors import CoordinatorError


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One position of a shard's log."""

    sequence: int
    epoch: int
    """Epoch in which it was made. Two logs that have the same (sequence, epoch) somewhere are equal up to there."""
    time_ms: WallMs
    payload: bytes
    """What it does; the shard's kind knows how. For users' state a serialized replication_pb2.Effects."""


@dataclass(frozen=True, slots=True)
class Digest:
    """A digest of all rows of a shard, independent of their order, as of one sequence."""

    sequence: int
    value: int
    rows: int


@dataclass(frozen=True, slots=True)
class StorePosition:
    """Where a store stands."""

    epoch_seen: int
    """Highest epoch that was ever shown to anybody."""
    first: int
    """Sequence of the first record that the log still has; `last` + 1 when it has none."""
    last: int
    last_epoch: int
    applied: int
    """Everything up to here is in the tables."""
    applied_epoch: int
    """Epoch of the record at `applied`."""
    is_complete: bool
    """False while a copy is being received: rows are missing."""
    copy_start: int = 0
    """While incomplete: sequence at which the copy began; 0 when none was begun."""
    copy_cursor: bytes = b""
    copy_read_at: int = 0
    """While incomplete: highest sequence at which the sender had read a chunk; complete only once applied up to it."""


@dataclass(frozen=True, slots=True)
class CopyChunk:
    """Rows of a copy, in the store's order."""

    cursor: bytes
    next_cursor: bytes
    is_last: bool
    read_at: int
    """Applied sequence of the store when it was read."""
    rows: Sequence[replication_pb2.Row]


@dataclass(frozen=True, slots=True)
class StateItem:
    """One key of one user."""

    key: str
    value: bytes
    version: int


@dataclass(frozen=True, slots=True)
class UserSize:
    """How much a user keeps."""

    keys: int = 0
    bytes: int = 0


class StoreFull(CoordinatorError):
    """The disk has no room for a write; nothing of it was kept."""

    GRPC_STATUS = "RESOURCE_EXHAUSTED"
    DEFINITE = True


class Reader(Protocol):
    """Reads what a store has applied and committed to its database; for the event loop's thread, cheap calls only."""

    def get(self, user: str, keys: Sequence[str]) -> list[StateItem]:
        """The keys that exist, in the order asked."""
        ...

    def moment(self) -> AbstractContextManager[None]:
        """All that is asked inside is as of one moment; for a few calls, without an `await` between them."""
        ...

    def users(self, after: str, limit: int) -> list[str]:
        """Users with at least one key, in the order of their hashes, from behind `after` on (empty for the first ones),
        at most `limit`."""
        ...

    def scan(self, user: str, from_key: str, prefix: str, limit: int) -> list[StateItem]:
        """Items in the order of the keys' UTF-8 bytes, at most `limit`."""
        ...

    def size(self, user: str) -> UserSize:
        """How much the user keeps."""
        ...

    def request(self, user: str, request_id: str) -> int | None:
        """Version that an earlier write with this request id got; None when it is not known (any more)."""
        ...

    def applied(self) -> int:
        """Sequence that these answers show."""
        ...


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """How much a store holds."""

    users: int
    rows: int
    bytes: int
    """Of keys and values."""
    median_hash: int
    """Key hash below which half of the users lie; 0 with fewer than two users."""
    log_records: int
    requests: int
    """Remembered ones."""


class Store(Protocol):
    """What one shard keeps on disk. Every call may block; what it changes is durable when it returns, or it says so.

    Raises Damaged when what is on disk cannot be trusted, StoreFull when there is no room, OSError for other faults.
    """

    def position(self) -> StorePosition: ...

    def see_epoch(self, epoch: int) -> None:
        """Remembers an epoch for good; a lower one than known changes nothing."""

    def append(self, records: Sequence[LogRecord]) -> None:
        """Adds records behind `last`, without gaps; all or none, with one sync."""

    def truncate(self, last: int) -> None:
        """Drops the records behind `last`, which is not below `applied`."""

    def apply(self, up_to: int, *, keeps_tombstones: bool) -> Digest:
        """Applies the log up to there; visible to the reader when it returns. Durable only with the next append: after
        a power cut the log applies again. `keeps_tombstones` while the shard has a joining replica, or is one."""

    def read_log(self, first: int, *, records_max: int, bytes_max: int) -> list[LogRecord]:
        """Records from there on; empty when there are none. Raises KeyError when the log begins later."""

    def read_chunk(self, cursor: bytes, *, bytes_max: int) -> CopyChunk:
        """Rows behind the cursor (empty for the first), as applied now, tombstones among them."""

    def begin_copy(self, start: int, start_epoch: int) -> None:
        """Forgets all rows and records: incomplete, applied and last are `start`."""

    def merge_chunk(self, chunk: CopyChunk) -> None:
        """Takes rows in; of two versions of one row the higher stays. Advances `copy_cursor` and `copy_read_at`.

        Durable only with the next append, epoch or end of the copy: after a power cut the copy goes on at an earlier
        cursor."""

    def finish_copy(self) -> None:
        """From now on it is complete."""

    def digest(self) -> Digest:
        """Of what is applied."""

    def figures(self) -> StoreFigures:
        """How much it holds; cheap enough for every few seconds."""

    def scrub(self, cursor: bytes) -> bytes:
        """Checks a stretch of what is on disk against its checksums and digests, and returns where the next one begins;
        empty for the first, and at the end of a round. Raises Damaged."""

    def reader(self) -> Reader:
        """Always the same one; closed with the store."""

    def close(self) -> None: ...
