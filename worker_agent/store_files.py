"""The files of one store: names, the lock, the mark, and making and removing them so that a crash does no harm.

    shard-7.db        the database; complete from the moment it has this name
    shard-7.db-wal    SQLite's write-ahead log; a part of the database
    shard-7.db-shm    SQLite's index of that; worth nothing
    shard-7.db-mark   locked while the store is open; how far the store once was
    shard-7.db-new    a database that is being made; worth nothing

**The mark.** SQLite takes the write-ahead log up to the first frame that does not fit and silently drops the rest:
right after a torn write, but a flipped bit, or a file that is gone, would take acknowledged records away with nobody
noticing. So after each durable call the mark says what is now on disk: the last record, the highest epoch, and whether
the store is complete. It is written without a sync, so it costs a microsecond and may be old after a power cut, but
what it says *was* on disk: a store that has less than its mark is damaged. What takes records away (a truncation, a
copy begun anew) lowers the mark first, with a sync. A mark that cannot be read says nothing.
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from coordinator.model.errors import Damaged, DefiniteError
from coordinator.raft.files import sync_directory
from coordinator.server.lock import lock_file

ADVICE = "the replica is copied anew from another one"
"""What becomes of a damaged store."""

_CONTENT = struct.Struct("<4sQQQ?")
_CHECKSUM = struct.Struct("<I")
_MAGIC = b"mrk1"


class StoreInUse(DefiniteError):
    """The store's files are open already, here or in another process."""

    GRPC_STATUS = "FAILED_PRECONDITION"


def damaged(path: Path, what: str) -> Damaged:
    """Which file, what is wrong, what becomes of it."""
    return Damaged(f"{path}: {what}; {ADVICE}")


def beside(path: Path, ending: str) -> Path:
    """A store's file next to its database: `wal`, `shm`, `mark`, `new` or `old`."""
    return path.with_name(f"{path.name}-{ending}")


@dataclass(frozen=True, slots=True)
class Mark:
    """What was once on disk."""

    last: int = 0
    last_epoch: int = 0
    epoch_seen: int = 0
    is_complete: bool = False


class MarkFile:
    """The file with the mark; locked from the beginning to `close`. Raises StoreInUse, OSError."""

    def __init__(self, path: Path) -> None:
        """`path` is the database's."""
        mark_path = beside(path, "mark")
        self._file: BinaryIO = os.fdopen(
            os.open(mark_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600), "r+b", buffering=0
        )
        try:
            lock_file(self._file)
        except OSError:
            self._file.close()
            raise StoreInUse(f"{path} is open already, in this process or another; close that one first") from None

    def read(self) -> Mark:
        """The mark; one that says nothing where it cannot be read."""
        self._file.seek(0)
        data = self._file.read(_CONTENT.size + _CHECKSUM.size)
        if len(data) < _CONTENT.size + _CHECKSUM.size:
            return Mark()
        content = data[: _CONTENT.size]
        magic, last, last_epoch, epoch_seen, is_complete = _CONTENT.unpack(content)
        if magic != _MAGIC or data[_CONTENT.size :] != _CHECKSUM.pack(crc32(content)):
            return Mark()
        return Mark(last, last_epoch, epoch_seen, is_complete)

    def write(self, mark: Mark, *, sync: bool = False) -> None:
        """Replaces it. A single small write, which no crash of the process can cut."""
        content = _CONTENT.pack(_MAGIC, mark.last, mark.last_epoch, mark.epoch_seen, mark.is_complete)
        self._file.seek(0)
        self._file.write(content + _CHECKSUM.pack(crc32(content)))
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Gives the lock back."""
        self._file.close()


def publish(new_path: Path, path: Path) -> None:
    """Gives a database that is whole, closed and without a write-ahead log its name, durably. Raises OSError."""
    descriptor = os.open(new_path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    # Leftovers of a store that had the name before: SQLite would play the old log into the new database.
    for ending in ("wal", "shm", "mark"):
        beside(path, ending).unlink(missing_ok=True)
    sync_directory(path.parent)
    os.replace(new_path, path)
    sync_directory(path.parent)


def remove_files(path: Path) -> None:
    """Removes a database and what belongs to it, but not the mark; whatever stops it, there is all of it or none."""
    old_path = beside(path, "old")
    # First the name, in one step: a database without its write-ahead log would look sound and lack what is in there.
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, old_path)
        sync_directory(path.parent)
    for ending in ("wal", "shm", "new", "new-journal", "new-wal", "new-shm", "old"):
        beside(path, ending).unlink(missing_ok=True)
    sync_directory(path.parent)
