"""The log's table in a store: what is in it, adding, cutting, and letting go of what is no longer needed.

Every record carries a CRC-32 over its position, its time and its payload, and is checked whenever it is read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.model import WallMs
from worker_agent.store_codec import record_crc
from worker_agent.store_files import damaged
from worker_agent.store_interface import LogRecord

SEQUENCE_MAX = (1 << 63) - 1

_READ = "SELECT sequence, epoch, time_ms, payload, crc FROM log WHERE sequence BETWEEN ? AND ? ORDER BY sequence"
_ADD = "INSERT INTO log(sequence, epoch, time_ms, payload, crc) VALUES (?, ?, ?, ?, ?)"


def log_bounds(connection: sqlite3.Connection, path: Path, applied: int) -> tuple[int, int, int]:
    """First and last sequence, and bytes of the applied payloads. Raises Damaged where records are missing."""
    first, last, count = connection.execute("SELECT min(sequence), max(sequence), count(*) FROM log").fetchone()
    if not count:
        return applied + 1, applied, 0
    if count != last - first + 1 or first > applied + 1 or last < applied:
        raise damaged(path, f"the log has {count} records from {first} to {last}, applied are {applied}")
    sizes = "SELECT coalesce(sum(length(payload)), 0) FROM log WHERE sequence <= ?"
    return first, last, connection.execute(sizes, (applied,)).fetchone()[0]


def log_records(
    connection: sqlite3.Connection, path: Path, first: int, last: int = SEQUENCE_MAX
) -> Iterator[LogRecord]:
    """Records from `first` to `last`, as many as there are, each checked. Raises Damaged, also for a gap."""
    previous = 0
    for sequence, epoch, time_ms, payload, crc in connection.execute(_READ, (first, last)):
        record = LogRecord(sequence, epoch, WallMs(time_ms), payload)
        if record_crc(record) != crc or (previous and sequence != previous + 1):
            raise damaged(path, f"log record {sequence} does not match its checksum or its place")
        previous = sequence
        yield record


def add_records(connection: sqlite3.Connection, records: Sequence[LogRecord]) -> None:
    """Inside a transaction; that they follow is the caller's."""
    connection.executemany(
        _ADD,
        [(record.sequence, record.epoch, record.time_ms, record.payload, record_crc(record)) for record in records],
    )


def drop_behind(connection: sqlite3.Connection, last: int) -> None:
    """Inside a transaction: drops the records behind `last`."""
    connection.execute("DELETE FROM log WHERE sequence > ?", (last,))


def trim(
    connection: sqlite3.Connection, first: int, applied: int, log_bytes: int, *, records_kept: int, bytes_kept: int
) -> tuple[int, int]:
    """Inside a transaction: drops the first applied records where there are too many or too large ones.

    Returns the first sequence left and the bytes of the applied records left. More go than have to, an eighth of what
    is kept, so that this is rare.
    """
    if applied + 1 - first <= records_kept and log_bytes <= bytes_kept:
        return first, log_bytes
    records_kept, bytes_kept = records_kept * 7 // 8, bytes_kept * 7 // 8
    sizes = connection.execute("SELECT length(payload) FROM log WHERE sequence <= ? ORDER BY sequence", (applied,))
    while applied + 1 - first > records_kept or log_bytes > bytes_kept:
        log_bytes -= sizes.fetchone()[0]
        first += 1
    sizes.close()
    connection.execute("DELETE FROM log WHERE sequence < ?", (first,))
    return first, log_bytes
