"""What a store's rows look like: as numbers in its database, in a copy, and in its digests.

A key hash is an unsigned 64-bit number, SQLite's integers are signed: `to_stored` subtracts 2^63, so that the order
stays. Digests are stored the same way. Names and keys are kept as UTF-8 bytes, which SQLite orders as bytes.

Every row carries a digest of its own, XXH3-64 over lengths, version, user, key and value. It is checked whenever the
row is read, so that a flipped bit is never served, and added up (modulo 2^64) over the live rows it is the digest of a
user and of the shard: equal for equal rows, whatever the order in which they came. Tombstones count for nothing.
"""

from __future__ import annotations

import struct
from zlib import crc32

from xxhash import xxh3_64_intdigest

from coordinator.api.v1 import replication_pb2
from coordinator.model.keys import HASH_SPACE
from worker_agent.store_interface import LogRecord

TABLE_ENTRIES = 1
"""Row.table of the users' keys; the value is empty for a tombstone, else one byte 1 and the value."""
TABLE_REQUESTS = 2
"""Row.table of remembered requests; the value is the time of the record."""
CURSOR_END = b"\xff"
"""`next_cursor` of a copy's last chunk: behind every row."""

ROW_BYTES = 16
"""What a row adds to the size of a chunk, besides its key and value."""
_HALF = HASH_SPACE >> 1
_MASK = HASH_SPACE - 1
_ROW_HEAD = struct.Struct("<iiQ")
_SIZE_HEAD = struct.Struct("<QQQ")
_RECORD_HEAD = struct.Struct("<QQq")
_CURSOR_HEAD = struct.Struct(">BQ")
_USER_LENGTH = struct.Struct(">H")
_TIME = struct.Struct(">q")


def to_stored(number: int) -> int:
    """An unsigned 64-bit number as a signed one that sorts alike."""
    return number - _HALF


def from_stored(stored: int) -> int:
    """The unsigned number again."""
    return stored + _HALF


def user_hash(user: bytes) -> int:
    """Key hash of a user, as stored."""
    return xxh3_64_intdigest(user) - _HALF


def add_digests(first: int, second: int) -> int:
    """Sum modulo 2^64; a negative `second` takes away."""
    return (first + second) & _MASK


def row_digest(user: bytes, key: bytes, version: int, value: bytes | None) -> int:
    """Digest of one row; a tombstone has one too, for checking it alone."""
    if value is None:
        return xxh3_64_intdigest(_ROW_HEAD.pack(len(user), -1, version) + user + key)
    return xxh3_64_intdigest(_ROW_HEAD.pack(len(user), len(value), version) + user + key + value)


def request_digest(user: bytes, request_id: bytes, version: int, time_ms: int) -> int:
    """Digest of one remembered request."""
    return row_digest(user, request_id, version, _TIME.pack(time_ms))


def size_digest(user: bytes, keys: int, size_bytes: int, digest: int) -> int:
    """Digest of one user's size and digest."""
    return xxh3_64_intdigest(_SIZE_HEAD.pack(keys, size_bytes, digest) + user)


def record_crc(record: LogRecord) -> int:
    """CRC-32 of a log record with its position."""
    return crc32(record.payload, crc32(_RECORD_HEAD.pack(record.sequence, record.epoch, record.time_ms)))


def entry_row(user: bytes, key: bytes, version: int, value: bytes | None) -> replication_pb2.Row:
    """One key of one user, or its tombstone, for a copy."""
    return replication_pb2.Row(
        table=TABLE_ENTRIES,
        key=_USER_LENGTH.pack(len(user)) + user + key,
        value=b"" if value is None else b"\x01" + value,
        version=version,
    )


def request_row(user: bytes, request_id: bytes, version: int, time_ms: int) -> replication_pb2.Row:
    """One remembered request, for a copy."""
    return replication_pb2.Row(
        table=TABLE_REQUESTS,
        key=_USER_LENGTH.pack(len(user)) + user + request_id,
        value=_TIME.pack(time_ms),
        version=version,
    )


def split_row_key(key: bytes) -> tuple[bytes, bytes]:
    """User, and key or request id, of a row of a copy. Raises ValueError."""
    if len(key) < 2 or len(key) < 2 + (length := _USER_LENGTH.unpack_from(key)[0]):
        raise ValueError(f"a row of a copy has the key {key!r}, which no store makes")
    return key[2 : 2 + length], key[2 + length :]


def row_value(row: replication_pb2.Row) -> bytes | None:
    """Value of an entry in a copy; None for a tombstone."""
    return row.value[1:] if row.value else None


def row_time_ms(row: replication_pb2.Row) -> int:
    """Time of a request in a copy. Raises ValueError."""
    if len(row.value) != _TIME.size:
        raise ValueError(f"a remembered request of a copy has {len(row.value)} bytes of time, not {_TIME.size}")
    time_ms: int = _TIME.unpack(row.value)[0]
    return time_ms


def make_cursor(table: int, stored_hash: int, user: bytes, key: bytes) -> bytes:
    """Place right behind one row."""
    return _CURSOR_HEAD.pack(table, from_stored(stored_hash)) + _USER_LENGTH.pack(len(user)) + user + key


def read_cursor(cursor: bytes) -> tuple[int, int, bytes, bytes]:
    """Table, stored hash, user and key of a place; the empty cursor is before all. Raises ValueError."""
    if not cursor:
        return TABLE_ENTRIES, to_stored(0), b"", b""
    if cursor == CURSOR_END:
        return TABLE_REQUESTS + 1, to_stored(0), b"", b""
    if len(cursor) < _CURSOR_HEAD.size:
        raise ValueError(f"cursor {cursor!r} was not made by a store")
    table, number = _CURSOR_HEAD.unpack_from(cursor)
    user, key = split_row_key(cursor[_CURSOR_HEAD.size :])
    return table, to_stored(number), user, key
