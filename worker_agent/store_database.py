"""The SQLite database of one store: its tables, its connections, and what its errors mean.

**One connection writes** and one, on the event loop's thread, reads. Nothing here depends on two writers of one file.

**What is durable.** The writing connection commits at two levels, which `Writer` sets between transactions:

- FULL: the write-ahead log is synced before the commit returns, *all* of it, so everything committed earlier is on
  disk too. Log records, epochs and the end of a copy go this way.
- NORMAL: nothing is synced. Applied and copied rows go this way; the reader sees them at once.

After a power cut SQLite takes the frames of the write-ahead log up to the first one whose running checksum does not
fit. So what comes back is a *prefix* of the commits, and it reaches at least to the last FULL one. A lost NORMAL commit
takes its rows and its `applied` with it, both in one transaction, and the log, which is FULL, applies again from there.
A checkpoint syncs the write-ahead log before it writes to the database, and the database before the log may begin
again from its start; then the new header is synced before its first frame. All three hold at FULL and at NORMAL, and
none at OFF: so OFF is never used. Checkpoints are made by `Writer` alone and not by SQLite itself, which would hide
their errors.

After a sync that failed nobody knows what is on disk: the kernel has dropped the pages, and the next sync would claim
success. The writer then refuses everything until the store is opened again. A full disk changes nothing and is told
as StoreFull; the same call may be made again later.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from zlib import crc32

from google.protobuf.message import DecodeError

from worker_agent.store_files import beside, damaged
from worker_agent.store_interface import StoreFull

FORMAT_VERSION = 1
ROOM_BYTES_MIN = 1 << 20
"""With less room than this an I/O error that names no cause is taken for a full disk."""

SCHEMA = """
CREATE TABLE meta(
    id INTEGER PRIMARY KEY CHECK (id = 1), format INTEGER, shard_id INTEGER, lo INTEGER, through INTEGER,
    epoch_seen INTEGER, applied INTEGER, applied_epoch INTEGER, is_complete INTEGER, copy_start INTEGER,
    copy_cursor BLOB, copy_read_at INTEGER, users INTEGER, rows INTEGER, bytes INTEGER, tombstones INTEGER,
    digest INTEGER, requests INTEGER, newest_ms INTEGER, crc INTEGER);
CREATE TABLE entries(
    hash INTEGER, user BLOB, key BLOB, version INTEGER NOT NULL, value BLOB, digest INTEGER NOT NULL,
    PRIMARY KEY (hash, user, key)) WITHOUT ROWID;
CREATE INDEX tombstones ON entries(hash, user, key) WHERE value IS NULL;
CREATE TABLE users(
    hash INTEGER, user BLOB, keys INTEGER NOT NULL, bytes INTEGER NOT NULL, digest INTEGER NOT NULL,
    proof INTEGER NOT NULL, PRIMARY KEY (hash, user)) WITHOUT ROWID;
CREATE TABLE requests(
    hash INTEGER, user BLOB, request_id BLOB, version INTEGER NOT NULL, time_ms INTEGER NOT NULL,
    digest INTEGER NOT NULL, PRIMARY KEY (hash, user, request_id)) WITHOUT ROWID;
CREATE INDEX requests_by_time ON requests(time_ms, version);
CREATE TABLE log(
    sequence INTEGER PRIMARY KEY, epoch INTEGER NOT NULL, time_ms INTEGER NOT NULL, payload BLOB NOT NULL,
    crc INTEGER NOT NULL);
"""

_SYNC_FAILED = {sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_NOT_DAMAGE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_AUTH, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL, sqlite3.SQLITE_NOLFS,
    sqlite3.SQLITE_INTERRUPT,
}  # fmt: skip


class SyncFailed(OSError):
    """A sync failed: what is on disk is not known until the store is opened again."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The one row of `meta`, without its checksum. Numbers of 64 bits are as stored."""

    format: int
    shard_id: int
    lo: int
    through: int
    """Last key hash of the range."""
    epoch_seen: int = 0
    applied: int = 0
    applied_epoch: int = 0
    is_complete: int = 1
    copy_start: int = 0
    copy_cursor: bytes = b""
    copy_read_at: int = 0
    users: int = 0
    rows: int = 0
    bytes: int = 0
    tombstones: int = 0
    digest: int = -(1 << 63)
    requests: int = 0
    newest_ms: int = 0
    """Latest time of any applied record; what is remembered of requests ages by it."""


_META_FIELDS = tuple(field.name for field in fields(Meta))
_META_COLUMNS = ", ".join(_META_FIELDS)
_meta_values = attrgetter(*_META_FIELDS)
_META_INSERT = f"INSERT OR REPLACE INTO meta(id, {_META_COLUMNS}, crc) VALUES (1{', ?' * (len(_META_FIELDS) + 1)})"


def write_meta(connection: sqlite3.Connection, meta: Meta) -> None:
    """Replaces the row, inside a transaction."""
    values = _meta_values(meta)
    connection.execute(_META_INSERT, (*values, crc32(repr(values).encode())))


def read_meta(connection: sqlite3.Connection, path: Path) -> Meta:
    """The row. Raises Damaged."""
    row = connection.execute(f"SELECT {_META_COLUMNS}, crc FROM meta").fetchone()
    if row is None or crc32(repr(row[:-1]).encode()) != row[-1]:
        raise damaged(path, "table meta: its checksum does not match")
    meta = Meta(*row[:-1])
    if meta.format != FORMAT_VERSION:
        raise damaged(path, f"it has format {meta.format}, this version reads {FORMAT_VERSION}")
    return meta


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Says what SQLite's errors mean: Damaged, StoreFull, or OSError. Bugs pass."""
    try:
        yield
    except sqlite3.Error as error:
        raise meaning(path, error) from error
    except (struct.error, DecodeError, UnicodeDecodeError, TypeError) as error:
        # A value of another type or shape than any that was written.
        raise damaged(path, f"a row cannot be read: {error}") from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _full(path) from error
        raise


def meaning(path: Path, error: sqlite3.Error) -> Exception:
    """The error that callers know for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return error  # Not from the library: a wrong use of it.
    match code & 0xFF:
        case sqlite3.SQLITE_FULL:
            return _full(path)
        case sqlite3.SQLITE_IOERR if code in _SYNC_FAILED:
            return SyncFailed(errno.EIO, f"the disk could not sync ({error}); open the store again", str(path))
        case sqlite3.SQLITE_IOERR if _has_no_room(path):
            return _full(path)
        case primary if primary in _NOT_DAMAGE:
            return OSError(errno.EIO, f"{error} ({error.sqlite_errorname})", str(path))
    return damaged(path, f"{error} ({error.sqlite_errorname})")


def _full(path: Path) -> StoreFull:
    return StoreFull(f"{path}: the disk is full, nothing of the write was kept; make room and try again")


def _has_no_room(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < ROOM_BYTES_MIN
    except OSError:
        return False


def connect_reader(path: Path) -> sqlite3.Connection:
    """A connection that only reads, for one thread at a time. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.executescript("PRAGMA query_only=ON; PRAGMA cell_size_check=ON; PRAGMA trusted_schema=OFF")
    return connection


def connect_writer(path: Path) -> sqlite3.Connection:
    """The connection that writes to a database that is there. Raises sqlite3.Error."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, check_same_thread=False
    )
    try:
        # The write-ahead log is written over from its start after a checkpoint: a file that keeps its size syncs in
        # half the time of one that grows. Only one that grew far is cut.
        connection.executescript(
            "PRAGMA wal_autocheckpoint=0; PRAGMA journal_size_limit=67108864; PRAGMA secure_delete=OFF;"
            "PRAGMA cell_size_check=ON; PRAGMA trusted_schema=OFF; PRAGMA temp_store=MEMORY; PRAGMA cache_size=-8192"
        )
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise OSError(errno.ENOTSUP, "the file system does not allow a write-ahead log", str(path))
    except BaseException:
        connection.close()
        raise
    return connection


def make_database(new_path: Path, meta: Meta) -> sqlite3.Connection:
    """A new database under a name that counts for nothing: no sync, no log; `close_made` ends that."""
    for leftover in (new_path, new_path.with_name(new_path.name + "-journal")):
        leftover.unlink(missing_ok=True)
    connection = sqlite3.connect(
        f"{new_path.absolute().as_uri()}?mode=rwc", uri=True, isolation_level=None, check_same_thread=False
    )
    try:
        connection.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY;" + SCHEMA)
        write_meta(connection, meta)
    except BaseException:
        connection.close()
        raise
    return connection


def close_made(connection: sqlite3.Connection) -> None:
    """Turns the write-ahead log on, which the file then says, and closes; the caller syncs."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


class Writer:
    """Transactions of the writing connection, at the level asked."""

    def __init__(self, path: Path, connection: sqlite3.Connection, checkpoint_pages: int) -> None:
        self._path = path
        self.connection = connection
        self._checkpoint_pages = checkpoint_pages
        self._is_full = False
        wal_path = beside(path, "wal")
        self._pages = wal_path.stat().st_size >> 12 if wal_path.exists() else 0
        """Pages that the write-ahead log may have by now, rather too many: after a crash those that were left."""
        self._failure: SyncFailed | None = None
        connection.executescript("PRAGMA synchronous=NORMAL")

    @contextmanager
    def transaction(self, *, is_durable: bool, pages: int | None = None) -> Iterator[sqlite3.Connection]:
        """All or nothing. `pages`: how many it is thought to change; not given, as many as rows."""
        if self._failure is not None:
            raise SyncFailed(*self._failure.args)
        try:
            with told(self._path):
                yield from self._run(is_durable, pages)
        except SyncFailed as error:
            self._failure = error
            raise

    def _run(self, is_durable: bool, pages: int | None) -> Iterator[sqlite3.Connection]:
        connection = self.connection
        if is_durable is not self._is_full:
            # A script, for a statement that was prepared earlier would be stepped again without doing anything.
            connection.executescript(f"PRAGMA synchronous={'FULL' if is_durable else 'NORMAL'}")
            self._is_full = is_durable
        changes = connection.total_changes
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._pages += 2 + (connection.total_changes - changes if pages is None else pages)

    def checkpoint_if_due(self) -> None:
        """Moves the write-ahead log into the database once it is long. What was committed stays so if that fails."""
        if self._pages < self._checkpoint_pages or self._failure is not None:
            return
        self._pages = 0
        try:
            with told(self._path):
                self.connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except SyncFailed as error:
            self._failure = error
        except (StoreFull, OSError):
            pass  # The write-ahead log stays; the next one tries again.

    def close(self) -> None:
        """Closes; as the last connection it also makes a checkpoint, where the disk lets it."""
        try:
            self.connection.close()
        except sqlite3.Error as error:
            raise meaning(self._path, error) from error
