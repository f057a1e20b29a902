"""What one shard keeps on disk: its log and its users' rows in one SQLite database.

Theory of operation. Invariants, in memory and on disk alike:

    first - 1 <= applied <= last        what is applied may leave the log, what is not stays
    log = records first..last           without a gap; empty only when applied = last
    tables = all effects up to applied  (of a complete store); each row at its highest version, which is its sequence

Order rules. A record and an epoch are on disk before the call that brings them returns: one sync for all of a call.
Applied rows are visible at once and on disk with the next sync; a power cut before that takes them back together with
`applied`, and the log applies them again (store_database.py says why that holds). Copied rows likewise, together with
their cursor: the copy goes on there; that it is complete is synced, and all rows with it. What takes something
away, a truncation or a copy begun anew, first takes it off the mark (store_files.py), which notices lost records at
the next opening.

Nothing reads a clock: remembered requests age by the times in the records, so that all replicas agree.

Where things are: store_files.py names, lock and mark; store_database.py connections, durability, errors; store_codec.py
bytes and digests; store_log.py the log; store_rows.py how rows merge; store_scan.py copies and the scrub;
store_reader.py reads beside; store_cut.py split and merge.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.api.v1 import replication_pb2
from coordinator.model.keys import HASH_SPACE
from worker_agent.store_codec import CURSOR_END, from_stored, to_stored
from worker_agent.store_database import (
    FORMAT_VERSION,
    Meta,
    Writer,
    close_made,
    connect_reader,
    connect_writer,
    make_database,
    read_meta,
    told,
    write_meta,
)
from worker_agent.store_files import Mark, MarkFile, beside, damaged, publish, remove_files
from worker_agent.store_interface import CopyChunk, Digest, LogRecord, StoreFigures, StorePosition
from worker_agent.store_log import add_records, drop_behind, log_bounds, log_records, trim
from worker_agent.store_reader import StoreReader
from worker_agent.store_rows import Tables
from worker_agent.store_scan import read_chunk, scrub


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """What one process may choose for its stores; replicas of a shard need not agree on any but the first two."""

    remembered_ms: int = 3_600_000
    """How long the result of a request is remembered, by the times in the records."""
    requests_kept: int = 100_000
    """Remembered requests of a shard at most; the oldest are forgotten, some hundreds at a time."""
    log_records_kept: int = 10_000
    """Applied records that stay in the log at most, for replicas that catch up; an eighth goes at a time."""
    log_bytes_kept: int = 16 << 20
    """Bytes of their payloads at most."""
    checkpoint_pages: int = 2_000
    """Changed pages after which the write-ahead log moves into the database: 8 MB, some 10 ms."""


DEFAULT_SETTINGS = StoreSettings()
REQUESTS_FORGOTTEN_MAX = 1_000
"""In one call, besides as many as it added."""


def create_store(
    path: Path, shard_id: int, lo: int, hi: int, settings: StoreSettings = DEFAULT_SETTINGS
) -> ShardStore:
    """Makes an empty store, complete as of sequence 0, and opens it. Raises FileExistsError, StoreFull, OSError."""
    if path.exists():
        raise FileExistsError(f"{path} is there already; open it, or delete it first")
    new_path = beside(path, "new")
    with told(path):
        close_made(make_database(new_path, new_meta(shard_id, lo, hi)))
        publish(new_path, path)
    return open_store(path, shard_id, lo, hi, settings)


def open_store(path: Path, shard_id: int, lo: int, hi: int, settings: StoreSettings = DEFAULT_SETTINGS) -> ShardStore:
    """Opens the store of this shard and range.

    Raises FileNotFoundError, StoreInUse, Damaged (also when it is another shard's), StoreFull (SQLite needs 32 KiB for
    its index), OSError.
    """
    store = ShardStore(path, settings)
    if (store.shard_id, store.lo, store.hi) != (shard_id, lo, hi):
        has = f"shard {store.shard_id} from {store.lo:#x} to {store.hi:#x}"
        store.close()
        raise damaged(path, f"it holds {has}, not shard {shard_id} from {lo:#x} to {hi:#x}")
    return store


def delete_store(path: Path) -> None:
    """Removes a store that is not open, and what a crash has left of one. Raises StoreInUse, OSError."""
    mark_file = MarkFile(path)
    try:
        remove_files(path)
    finally:
        mark_file.close()
    beside(path, "mark").unlink(missing_ok=True)


def new_meta(shard_id: int, lo: int, hi: int) -> Meta:
    """An empty store's. Raises ValueError for a range that is none."""
    if not 0 <= lo < hi <= HASH_SPACE:
        raise ValueError(f"shard {shard_id} cannot have the range {lo:#x} to {hi:#x}")
    return Meta(FORMAT_VERSION, shard_id, to_stored(lo), to_stored(hi - 1))


class ShardStore:
    """`Store` of a shard of users' state. Used by one thread at a time; its reader by one other, read_chunk by any."""

    def __init__(self, path: Path, settings: StoreSettings = DEFAULT_SETTINGS) -> None:
        """Opens what is there, whichever shard it is. Raises FileNotFoundError, StoreInUse, Damaged, OSError."""
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
        self.path = path
        self._settings = settings
        self._mark_file = MarkFile(path)
        self._reader: StoreReader | None = None
        try:
            with told(path):
                connection = connect_writer(path)
                self._writer = Writer(path, connection, settings.checkpoint_pages)
        except BaseException:
            self._mark_file.close()
            raise
        try:
            with told(path):
                self._load(connection)
        except BaseException:
            self._writer.close()
            self._mark_file.close()
            raise

    def _load(self, connection: sqlite3.Connection) -> None:
        self._meta = read_meta(connection, self.path)
        self.shard_id = self._meta.shard_id
        self.lo, self.hi = from_stored(self._meta.lo), from_stored(self._meta.through) + 1
        self._median: tuple[int, int] | None = None
        applied = self._meta.applied
        self._first, self._last, self._log_bytes = log_bounds(connection, self.path, applied)
        self._last_epoch = self._meta.applied_epoch
        for record in log_records(connection, self.path, applied):
            if record.sequence > applied:
                self._last_epoch = record.epoch
            elif record.epoch != self._meta.applied_epoch:
                raise damaged(self.path, f"log record {applied} has epoch {record.epoch}, another one was applied")
        self._compare_with_mark(connection)
        self._set_mark()

    def _compare_with_mark(self, connection: sqlite3.Connection) -> None:
        mark = self._mark_file.read()
        what = ""
        if self._last < mark.last:
            what = f"it ends with record {self._last}, but once had record {mark.last} on disk"
        elif self._meta.epoch_seen < mark.epoch_seen:
            what = f"it knows epoch {self._meta.epoch_seen}, but once had epoch {mark.epoch_seen} on disk"
        elif mark.is_complete and not self._meta.is_complete:
            what = "it is an unfinished copy, but was complete once"
        elif self._first <= mark.last:
            records = list(log_records(connection, self.path, mark.last, mark.last))
            if records and records[0].epoch < mark.last_epoch:
                what = f"record {mark.last} is of epoch {records[0].epoch}, but one of {mark.last_epoch} was on disk"
        if what:
            raise damaged(self.path, what)

    # What is there

    def position(self) -> StorePosition:
        """Where it stands; from memory."""
        meta = self._meta
        return StorePosition(
            meta.epoch_seen, self._first, self._last, self._last_epoch, meta.applied, meta.applied_epoch,
            bool(meta.is_complete), meta.copy_start, meta.copy_cursor, meta.copy_read_at,
        )  # fmt: skip

    @property
    def newest_ms(self) -> int:
        """Latest time of any applied record."""
        return self._meta.newest_ms

    def digest(self) -> Digest:
        """Of what is applied; from memory."""
        return Digest(self._meta.applied, from_stored(self._meta.digest), self._meta.rows)

    def figures(self) -> StoreFigures:
        """How much it holds; from memory but for the median, which is looked up when something was applied since."""
        meta, median = self._meta, 0
        if meta.users >= 2:
            if self._median is None:
                with told(self.path):
                    query = "SELECT hash FROM users ORDER BY hash LIMIT 1 OFFSET ?"
                    found = self._writer.connection.execute(query, (meta.users // 2,)).fetchone()
                if found is None:
                    raise damaged(self.path, f"it has less than the {meta.users} users that it counted")
                self._median = (meta.applied, from_stored(found[0]))
            median = self._median[1]
        log_records_held = self._last + 1 - self._first
        return StoreFigures(meta.users, meta.rows, meta.bytes, median, log_records_held, meta.requests)

    def reader(self) -> StoreReader:
        """The reader; always the same one."""
        if self._reader is None:
            with told(self.path):
                self._reader = StoreReader(self.path)
        return self._reader

    def read_log(self, first: int, *, records_max: int, bytes_max: int) -> list[LogRecord]:
        """Records from there on, one at least where there is one. Raises KeyError when the log begins later."""
        if first < self._first:
            raise KeyError(first)
        records: list[LogRecord] = []
        size = 0
        with told(self.path):
            for record in log_records(self._writer.connection, self.path, first, first + records_max - 1):
                size += len(record.payload)
                if records and size > bytes_max:
                    break
                records.append(record)
        if first <= self._last and (not records or records[0].sequence != first):
            raise damaged(self.path, f"log record {first} is missing")
        return records

    def read_chunk(self, cursor: bytes, *, bytes_max: int) -> CopyChunk:
        """Rows behind the cursor, tombstones among them, one at least where there is one.

        Any thread may call it, beside one that uses the rest: the rows, and what was applied when, are of one moment.
        """
        with told(self.path):
            with closing(connect_reader(self.path)) as connection:
                connection.execute("BEGIN")
                applied = read_meta(connection, self.path).applied
                return read_chunk(connection, self.path, cursor, bytes_max, applied)

    def scrub(self, cursor: bytes) -> bytes:
        """Checks a stretch of what is on disk; returns where the next begins, empty at the end. Raises Damaged."""
        return self.scrub_stretch(cursor)[0]

    def scrub_stretch(self, cursor: bytes) -> tuple[bytes, int]:
        """The same, and the bytes that were checked."""
        with told(self.path):
            with closing(connect_reader(self.path)) as connection:
                return scrub(connection, self.path, cursor)

    # What changes the log

    def see_epoch(self, epoch: int) -> None:
        """Remembers an epoch for good; a lower one than known changes nothing."""
        if epoch > self._meta.epoch_seen:
            with self._writer.transaction(is_durable=True) as connection:
                meta = replace(self._meta, epoch_seen=epoch)
                write_meta(connection, meta)
            self._meta = meta
            self._set_mark()

    def append(self, records: Sequence[LogRecord]) -> None:
        """Adds records behind `last`; all or none, with one sync. Raises ValueError for a gap or an overlap."""
        if not records:
            return
        for place, record in enumerate(records, self._last + 1):
            if record.sequence != place:
                raise ValueError(f"{self.path}: record {record.sequence} cannot follow {place - 1}")
        with self._writer.transaction(is_durable=True) as connection:
            add_records(connection, records)
        self._last, self._last_epoch = records[-1].sequence, records[-1].epoch
        self._set_mark()
        self._writer.checkpoint_if_due()

    def truncate(self, last: int) -> None:
        """Drops the records behind `last`. Raises ValueError when it is below `applied`."""
        if last < self._meta.applied:
            raise ValueError(f"{self.path}: the log cannot end at {last}, {self._meta.applied} is applied")
        if last >= self._last:
            return
        last_epoch = self._meta.applied_epoch
        if last > self._meta.applied:
            last_epoch = self.read_log(last, records_max=1, bytes_max=1)[0].epoch
        self._lower_mark(Mark(last, last_epoch, self._meta.epoch_seen, bool(self._meta.is_complete)))
        with self._writer.transaction(is_durable=True) as connection:
            drop_behind(connection, last)
        self._last, self._last_epoch = last, last_epoch

    # What changes the tables

    def apply(self, up_to: int, *, keeps_tombstones: bool) -> Digest:
        """Applies the log up to there, visible to the reader when it returns, durable with the next append.

        Raises ValueError when the log does not reach so far.
        """
        if up_to > self._last:
            raise ValueError(f"{self.path}: record {up_to} cannot be applied, the last one is {self._last}")
        meta = self._meta
        if up_to <= meta.applied and (keeps_tombstones or not meta.tombstones):
            return self.digest()
        settings = self._settings
        with self._writer.transaction(is_durable=False) as connection:
            records = list(log_records(connection, self.path, meta.applied + 1, up_to))
            if len(records) != max(0, up_to - meta.applied):
                raise damaged(self.path, f"records are missing between {meta.applied} and {up_to}")
            tables = Tables(connection, self.path, meta, keeps_tombstones=keeps_tombstones)
            if records:
                tables.meta = replace(
                    meta, applied=up_to, applied_epoch=records[-1].epoch,
                    newest_ms=max(meta.newest_ms, max(record.time_ms for record in records)),
                )  # fmt: skip
            effects = [(record, replication_pb2.Effects.FromString(record.payload)) for record in records]
            tables.put_effects((record.sequence, effect) for record, effect in effects)
            tables.put_requests(
                (effect.user.encode(), effect.request_id.encode(), record.sequence, record.time_ms)
                for record, effect in effects if effect.request_id
            )  # fmt: skip
            limit = REQUESTS_FORGOTTEN_MAX + len(records)
            tables.forget_requests(settings.remembered_ms, settings.requests_kept, limit)
            tables.drop_tombstones()
            write_meta(connection, tables.meta)
            log_bytes = self._log_bytes + sum(len(record.payload) for record in records)
            first, log_bytes = trim(
                connection, self._first, tables.meta.applied, log_bytes,
                records_kept=settings.log_records_kept, bytes_kept=settings.log_bytes_kept,
            )  # fmt: skip
        self._meta, self._first, self._log_bytes, self._median = tables.meta, first, log_bytes, None
        self._writer.checkpoint_if_due()
        return self.digest()

    def begin_copy(self, start: int, start_epoch: int) -> None:
        """Forgets all rows and records: incomplete, applied and last are `start`."""
        meta = Meta(
            FORMAT_VERSION, self._meta.shard_id, self._meta.lo, self._meta.through, epoch_seen=self._meta.epoch_seen,
            applied=start, applied_epoch=start_epoch, is_complete=0, copy_start=start,
        )  # fmt: skip
        self._lower_mark(Mark(epoch_seen=meta.epoch_seen))
        with self._writer.transaction(is_durable=True) as connection:
            for table in ("entries", "users", "requests", "log"):
                connection.execute(f"DELETE FROM {table}")
            write_meta(connection, meta)
        self._meta, self._median, self._log_bytes = meta, None, 0
        self._first, self._last, self._last_epoch = start + 1, start, start_epoch
        self._set_mark()

    def merge_chunk(self, chunk: CopyChunk) -> None:
        """Takes rows in; of two versions of one row the higher stays. Raises ValueError when it is not the next one."""
        meta = self._meta
        if meta.is_complete or chunk.cursor != meta.copy_cursor:
            raise ValueError(f"{self.path}: a chunk from {chunk.cursor!r} cannot follow {meta.copy_cursor!r}")
        size = sum(len(row.key) + len(row.value) for row in chunk.rows)
        # The rows of a chunk lie together: about as many pages as their bytes need, and those of their users.
        with self._writer.transaction(is_durable=False, pages=size // 2_048 + len(chunk.rows) // 20 + 4) as connection:
            tables = Tables(connection, self.path, meta, keeps_tombstones=True)
            tables.put_rows(chunk.rows)
            meta = replace(
                tables.meta, copy_cursor=chunk.next_cursor, copy_read_at=max(meta.copy_read_at, chunk.read_at)
            )
            write_meta(connection, meta)
        self._meta, self._median = meta, None
        self._writer.checkpoint_if_due()

    def finish_copy(self) -> None:
        """From now on it is complete. Raises ValueError before the last chunk, or before all that its rows saw."""
        meta = self._meta
        if meta.is_complete or meta.copy_cursor != CURSOR_END or meta.applied < meta.copy_read_at:
            raise ValueError(
                f"{self.path}: the copy is not whole: at {meta.copy_cursor!r}, applied {meta.applied} of"
                f" {meta.copy_read_at}"
            )
        with self._writer.transaction(is_durable=True) as connection:
            meta = replace(meta, is_complete=1, copy_start=0, copy_cursor=b"", copy_read_at=0)
            write_meta(connection, meta)
        self._meta = meta
        self._set_mark()

    # How

    def _set_mark(self) -> None:
        meta = self._meta
        # The mark is a second look: a full disk may keep it from being right, never from being used.
        with suppress(OSError):
            self._mark_file.write(Mark(self._last, self._last_epoch, meta.epoch_seen, bool(meta.is_complete)))

    def _lower_mark(self, mark: Mark) -> None:
        with told(self.path):
            self._mark_file.write(mark, sync=True)

    def close(self) -> None:
        """Closes; what was applied is then on disk too. Closing twice does nothing."""
        try:
            if self._reader is not None:
                self._reader.close()
            self._writer.close()
        finally:
            self._mark_file.close()
