"""Reading a store's rows in order: the chunks of a copy, and the scrub that looks for damage.

Both go by cursors (store_codec.py) and read one stretch per call, so that neither stops writes for long.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from coordinator.api.v1 import replication_pb2
from worker_agent.store_codec import (
    CURSOR_END,
    ROW_BYTES,
    TABLE_ENTRIES,
    TABLE_REQUESTS,
    add_digests,
    entry_row,
    from_stored,
    make_cursor,
    read_cursor,
    request_digest,
    request_row,
    row_digest,
    size_digest,
    to_stored,
    user_hash,
)
from worker_agent.store_database import read_meta
from worker_agent.store_files import damaged
from worker_agent.store_interface import CopyChunk
from worker_agent.store_log import log_records
from worker_agent.store_rows import Size

SCRUB_ROWS = 2_000
"""Rows that one step of a scrub reads at least, where there are as many."""
_TABLE_LOG = 3
"""In the cursors of a scrub only: its hash is a sequence."""

_ENTRIES = (
    "SELECT hash, user, key, version, value, digest FROM entries WHERE (hash, user, key) > (?, ?, ?)"
    " ORDER BY hash, user, key"
)
_REQUESTS = (
    "SELECT hash, user, request_id, version, time_ms, digest FROM requests WHERE (hash, user, request_id) > (?, ?, ?)"
    " ORDER BY hash, user, request_id"
)
_ENTRIES_OF_USERS = (
    "SELECT hash, user, key, version, value, digest FROM entries WHERE (hash, user) > (?, ?)"
    " ORDER BY hash, user, key"
)
_USERS = "SELECT hash, user, keys, bytes, digest, proof FROM users WHERE (hash, user) > (?, ?) ORDER BY hash, user"
# A digest is summed in halves, which cannot overflow; each is stored less 2^63.
_TOTALS = (
    "SELECT count(*), coalesce(sum(keys), 0), coalesce(sum(bytes), 0),"
    " coalesce(sum(digest >> 32), 0), coalesce(sum(digest & 4294967295), 0) FROM users"
)


def read_chunk(connection: sqlite3.Connection, path: Path, cursor: bytes, bytes_max: int, read_at: int) -> CopyChunk:
    """Rows behind the cursor, one at least where there is one. Raises Damaged, and ValueError for a faulty cursor."""
    table, *where = read_cursor(cursor)
    rows: list[replication_pb2.Row] = []
    size = 0
    if table == TABLE_ENTRIES:
        for stored, user, key, version, value, digest in connection.execute(_ENTRIES, where):
            if row_digest(user, key, version, value) != from_stored(digest):
                raise damaged(path, f"key {key!r} of user {user!r} does not match its checksum")
            rows.append(entry_row(user, key, version, value))
            size += ROW_BYTES + len(user) + len(key) + (0 if value is None else len(value))
            if size >= bytes_max:
                return CopyChunk(cursor, make_cursor(TABLE_ENTRIES, stored, user, key), False, read_at, rows)
        table, where = TABLE_REQUESTS, [to_stored(0), b"", b""]
    if table == TABLE_REQUESTS:
        for stored, user, request_id, version, time_ms, digest in connection.execute(_REQUESTS, where):
            if request_digest(user, request_id, version, time_ms) != from_stored(digest):
                raise damaged(path, f"request {request_id!r} of user {user!r} does not match its checksum")
            rows.append(request_row(user, request_id, version, time_ms))
            size += ROW_BYTES + len(user) + len(request_id)
            if size >= bytes_max:
                return CopyChunk(cursor, make_cursor(TABLE_REQUESTS, stored, user, request_id), False, read_at, rows)
    return CopyChunk(cursor, CURSOR_END, True, read_at, rows)


def scrub(connection: sqlite3.Connection, path: Path, cursor: bytes) -> tuple[bytes, int]:
    """Checks a stretch behind the cursor, in one read transaction; returns where the next one begins, and the bytes.

    The former is empty at the end of a round. First the sums over all users, then rows against the sizes and digests of
    their users, then requests, then the log. The connection has to be a fresh one, for what an older one has in its
    cache is not what is on disk. Raises Damaged; ValueError for a faulty cursor.
    """
    table, stored, user, key = read_cursor(cursor)
    connection.execute("BEGIN")
    try:
        if not cursor:
            _scrub_totals(connection, path)
        if table == TABLE_ENTRIES:
            return _scrub_users(connection, path, stored, user)
        if table == TABLE_REQUESTS:
            return _scrub_requests(connection, path, (stored, user, key))
        return _scrub_log(connection, path, from_stored(stored))
    finally:
        connection.execute("ROLLBACK")


def sum_users(connection: sqlite3.Connection) -> tuple[int, int, int, int]:
    """Users, rows, bytes and digest, added up over the table of users."""
    users, rows, size_bytes, high, low = connection.execute(_TOTALS).fetchone()
    return users, rows, size_bytes, add_digests((high << 32) + low, users << 63)


def _scrub_totals(connection: sqlite3.Connection, path: Path) -> None:
    meta = read_meta(connection, path)
    if sum_users(connection) != (meta.users, meta.rows, meta.bytes, from_stored(meta.digest)):
        raise damaged(path, "the sums over all users do not match those that were kept")


def _scrub_users(
    connection: sqlite3.Connection, path: Path, after_hash: int, after_user: bytes
) -> tuple[bytes, int]:
    checked = 0
    found: dict[tuple[int, bytes], Size] = {}
    place, rows, is_end = (after_hash, after_user, b""), 0, True
    for stored, user, key, version, value, digest in connection.execute(_ENTRIES_OF_USERS, (after_hash, after_user)):
        if rows >= SCRUB_ROWS and (stored, user) != place[:2]:
            is_end = False
            break
        if row_digest(user, key, version, value) != from_stored(digest) or user_hash(user) != stored:
            raise damaged(path, f"key {key!r} of user {user!r} does not match its checksum")
        if (stored, user, key) <= place:
            raise damaged(path, f"key {key!r} of user {user!r} is out of order")
        place, rows = (stored, user, key), rows + 1
        checked += ROW_BYTES + len(user) + len(key) + (0 if value is None else len(value))
        size = found.setdefault((stored, user), Size())
        if value is not None:
            size.change(1, len(key) + len(value), from_stored(digest))
    for stored, user, keys, size_bytes, digest, proof in connection.execute(_USERS, (after_hash, after_user)):
        if not is_end and (stored, user) > place[:2]:
            break
        size = found.pop((stored, user), Size())
        if (keys, size_bytes, digest) != (size.keys, size.bytes, to_stored(size.digest)) or not keys:
            raise damaged(path, f"the rows of user {user!r} do not match the digest that was kept")
        if size_digest(user, keys, size_bytes, size.digest) != from_stored(proof):
            raise damaged(path, f"the size of user {user!r} does not match its checksum")
    for (_, user), size in found.items():
        if size.keys:
            raise damaged(path, f"the rows of user {user!r} have no digest that was kept")
    if is_end:
        return make_cursor(TABLE_REQUESTS, to_stored(0), b"", b""), checked
    return make_cursor(TABLE_ENTRIES, place[0], place[1], b""), checked


def _scrub_requests(
    connection: sqlite3.Connection, path: Path, place: tuple[int, bytes, bytes]
) -> tuple[bytes, int]:
    rows = checked = 0
    for stored, user, request_id, version, time_ms, digest in connection.execute(_REQUESTS, place):
        if rows >= SCRUB_ROWS:
            return make_cursor(TABLE_REQUESTS, *place), checked
        if request_digest(user, request_id, version, time_ms) != from_stored(digest) or user_hash(user) != stored:
            raise damaged(path, f"request {request_id!r} of user {user!r} does not match its checksum")
        if (stored, user, request_id) <= place:
            raise damaged(path, f"request {request_id!r} of user {user!r} is out of order")
        place, rows = (stored, user, request_id), rows + 1
        checked += ROW_BYTES + len(user) + len(request_id)
    return make_cursor(_TABLE_LOG, to_stored(0), b"", b""), checked


def _scrub_log(connection: sqlite3.Connection, path: Path, after: int) -> tuple[bytes, int]:
    rows = checked = 0
    for record in log_records(connection, path, after + 1):
        after, rows = record.sequence, rows + 1
        checked += ROW_BYTES + len(record.payload)
        if rows >= SCRUB_ROWS:
            return make_cursor(_TABLE_LOG, to_stored(after), b"", b""), checked
    return b"", checked
