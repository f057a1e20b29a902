"""Taking rows into a store's tables: users' keys, users' sizes, remembered requests; with their digests and counts.

One rule for a log that is applied, for one that is applied again, and for a copy that arrives beside it: of two
versions of one row the higher one stays. So all three may come in any order and as often as they like. It needs the
tombstones while a copy may still bring an older row; `keeps_tombstones` says so, and without it they are dropped.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from coordinator.api.v1 import replication_pb2
from worker_agent.store_codec import (
    TABLE_ENTRIES,
    TABLE_REQUESTS,
    add_digests,
    from_stored,
    request_digest,
    row_digest,
    row_time_ms,
    row_value,
    size_digest,
    split_row_key,
    to_stored,
    user_hash,
)
from worker_agent.store_database import Meta
from worker_agent.store_files import damaged

TOMBSTONES_DROPPED_MAX = 1_000
"""In one call, so that the end of a move does not stop writes; the next calls go on."""

Change = tuple[int, bytes, bytes, int, bytes | None]
"""Stored hash, user, key, version, value; a tombstone has no value."""
Held = tuple[int, int | None, int]
"""Version, length of the value and digest of a row that is there; a tombstone has no length."""

_HELD_BETWEEN = (
    "SELECT user, key, version, length(value), digest FROM entries"
    " WHERE (hash, user, key) >= (?, ?, ?) AND (hash, user, key) <= (?, ?, ?)"
)
# A cross join looks up each wanted place by the primary key; to ask with IN would read the whole table.
_HELD_OF = (
    "WITH wanted(hash, user, key) AS (VALUES {})"
    " SELECT entries.user, entries.key, version, length(value), digest FROM wanted CROSS JOIN entries"
    " ON entries.hash = wanted.hash AND entries.user = wanted.user AND entries.key = wanted.key"
)
_SIZES_OF = (
    "WITH wanted(hash, user) AS (VALUES {})"
    " SELECT users.hash, users.user, keys, bytes, digest, proof FROM wanted CROSS JOIN users"
    " ON users.hash = wanted.hash AND users.user = wanted.user"
)
LOOKED_UP_AT_ONCE = (64, 8, 1)
"""Rows that one statement looks up: of few sizes, so that each is prepared once. Each statement costs a hop between
Python's threads, which is more than what it finds."""
_PUT = (
    "INSERT INTO entries(hash, user, key, version, value, digest) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT(hash, user, key) DO UPDATE SET version = excluded.version, value = excluded.value,"
    " digest = excluded.digest"
)
_REMOVE = "DELETE FROM entries WHERE hash = ? AND user = ? AND key = ?"
_SIZES_BETWEEN = (
    "SELECT hash, user, keys, bytes, digest, proof FROM users WHERE (hash, user) >= (?, ?) AND (hash, user) <= (?, ?)"
)
_PUT_SIZE = (
    "INSERT INTO users(hash, user, keys, bytes, digest, proof) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT(hash, user) DO UPDATE SET keys = excluded.keys, bytes = excluded.bytes,"
    " digest = excluded.digest, proof = excluded.proof"
)
_REMOVE_SIZE = "DELETE FROM users WHERE hash = ? AND user = ?"
_ADD_REQUEST = (
    "INSERT OR IGNORE INTO requests(hash, user, request_id, version, time_ms, digest) VALUES (?, ?, ?, ?, ?, ?)"
)
_RAISE_REQUEST = (
    "UPDATE requests SET version = ?4, time_ms = ?5, digest = ?6"
    " WHERE hash = ?1 AND user = ?2 AND request_id = ?3 AND version < ?4"
)
_OLDEST_REQUESTS = (
    "SELECT hash, user, request_id, time_ms FROM requests"
    " ORDER BY time_ms, version, hash, user, request_id LIMIT ?"
)
_REMOVE_REQUEST = "DELETE FROM requests WHERE hash = ? AND user = ? AND request_id = ?"
_TOMBSTONES = "SELECT hash, user, key FROM entries WHERE value IS NULL ORDER BY hash, user, key LIMIT ?"


@cache
def _statement(select: str, columns: int, count: int) -> str:
    """The statement for so many places."""
    return select.format(", ".join([f"({', '.join('?' * columns)})"] * count))


@dataclass(slots=True)
class Size:
    """One user in the making; digests are unsigned."""

    keys: int = 0
    bytes: int = 0
    digest: int = 0
    keys_before: int = 0
    bytes_before: int = 0
    digest_before: int = 0

    def change(self, keys: int, size_bytes: int, digest: int) -> None:
        """Adds; what is taken away is negative."""
        self.keys += keys
        self.bytes += size_bytes
        self.digest = add_digests(self.digest, digest)


class Tables:
    """One transaction's view of the tables; `meta` is what the counts have become, and is not written here."""

    def __init__(self, connection: sqlite3.Connection, path: Path, meta: Meta, *, keeps_tombstones: bool) -> None:
        self._connection = connection
        self._path = path
        self._keeps_tombstones = keeps_tombstones
        self.meta = meta

    def put_effects(self, effects: Iterable[tuple[int, replication_pb2.Effects]]) -> None:
        """Rows of applied records with their sequences, in order; their requests come through `put_requests`."""
        latest: dict[tuple[bytes, bytes], Change] = {}
        for sequence, record in effects:
            user = record.user.encode()
            stored = user_hash(user)
            for effect in record.effects:
                key = effect.key.encode()
                value = effect.value if effect.HasField("value") else None
                latest[user, key] = (stored, user, key, sequence, value)
        held: dict[tuple[bytes, bytes], Held] = {}
        for user, key, *found in self._look_up(_HELD_OF, [change[:3] for change in latest.values()]):
            held[user, key] = (found[0], found[1], found[2])
        users = list(dict.fromkeys(change[:2] for change in latest.values()))
        sizes = {(stored, user): self._size(user, *size) for stored, user, *size in self._look_up(_SIZES_OF, users)}
        self._put(latest.values(), held, sizes)

    def _look_up(self, select: str, places: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What the statement finds at each of the places, in any order."""
        first = 0
        for count in LOOKED_UP_AT_ONCE:
            while len(places) - first >= count:
                wanted = [one for place in places[first : first + count] for one in place]
                yield from self._connection.execute(_statement(select, len(wanted) // count, count), wanted)
                first += count

    def put_rows(self, rows: Sequence[replication_pb2.Row]) -> None:
        """Rows of a copy; those of entries are near each other. Raises ValueError for what is no row of this shard."""
        changes: list[Change] = []
        requests: list[tuple[bytes, bytes, int, int]] = []
        user_before, stored = None, 0
        for row in rows:
            user, key = split_row_key(row.key)
            if row.table == TABLE_ENTRIES:
                if user != user_before:
                    user_before, stored = user, user_hash(user)
                    if not self.meta.lo <= stored <= self.meta.through:
                        raise ValueError(f"a row of a copy is of user {user!r}, who does not belong to this shard")
                changes.append((stored, user, key, row.version, row_value(row)))
            elif row.table == TABLE_REQUESTS:
                requests.append((user, key, row.version, row_time_ms(row)))
            else:
                raise ValueError(f"a row of a copy is of table {row.table}, which this version does not know")
        if changes:
            places = [change[:3] for change in changes]
            first, last = min(places), max(places)
            held = self._connection.execute(_HELD_BETWEEN, (*first, *last))
            sizes = self._connection.execute(_SIZES_BETWEEN, (*first[:2], *last[:2]))
            self._put(
                changes,
                {(user, key): (version, length, digest) for user, key, version, length, digest in held},
                {(stored, user): self._size(user, *size) for stored, user, *size in sizes},
            )
        self.put_requests(requests)

    def put_requests(self, requests: Iterable[tuple[bytes, bytes, int, int]]) -> None:
        """User, request id, version and time of requests that were answered."""
        rows = [
            (user_hash(user), user, request_id, version, time_ms,
             to_stored(request_digest(user, request_id, version, time_ms)))
            for user, request_id, version, time_ms in requests
        ]  # fmt: skip
        if not rows:
            return
        added = self._connection.executemany(_ADD_REQUEST, rows).rowcount
        if added < len(rows):
            self._connection.executemany(_RAISE_REQUEST, rows)
        newest_ms = max(self.meta.newest_ms, max(row[4] for row in rows))
        self.meta = replace(self.meta, requests=self.meta.requests + added, newest_ms=newest_ms)

    def forget_requests(self, remembered_ms: int, requests_kept: int, limit: int) -> None:
        """Forgets the oldest requests that are too old, by the time of the latest record, or too many."""
        count, oldest_ms = self.meta.requests, self.meta.newest_ms - remembered_ms
        if not count:
            return
        found = self._connection.execute(_OLDEST_REQUESTS, (1,)).fetchone()
        if count <= requests_kept and (found is None or found[3] > oldest_ms):
            return
        leaving: list[tuple[int, bytes, bytes]] = []
        for stored, user, request_id, time_ms in self._connection.execute(_OLDEST_REQUESTS, (limit,)).fetchall():
            if time_ms > oldest_ms and count - len(leaving) <= requests_kept:
                break
            leaving.append((stored, user, request_id))
        self._connection.executemany(_REMOVE_REQUEST, leaving)
        self.meta = replace(self.meta, requests=count - len(leaving))

    def drop_tombstones(self) -> None:
        """Drops the first of them, unless they are kept."""
        if self._keeps_tombstones or not self.meta.tombstones:
            return
        leaving = self._connection.execute(_TOMBSTONES, (TOMBSTONES_DROPPED_MAX,)).fetchall()
        self._connection.executemany(_REMOVE, leaving)
        self.meta = replace(self.meta, tombstones=self.meta.tombstones - len(leaving))

    def _put(
        self, changes: Iterable[Change], held: dict[tuple[bytes, bytes], Held], sizes: dict[tuple[int, bytes], Size]
    ) -> None:
        """`held` and `sizes` are what is there of the rows and users of `changes`, and maybe of others."""
        puts: list[tuple[int, bytes, bytes, int, bytes | None, int]] = []
        removals: list[tuple[int, bytes, bytes]] = []
        tombstones = 0
        for stored, user, key, version, value in changes:
            found = held.get((user, key))
            if found is not None and found[0] >= version:
                continue
            size = sizes.get((stored, user)) or sizes.setdefault((stored, user), Size())
            if found is not None and found[1] is not None:
                size.change(-1, -len(key) - found[1], -from_stored(found[2]))
            elif found is not None:
                tombstones -= 1
            digest = row_digest(user, key, version, value)
            if value is not None:
                size.change(1, len(key) + len(value), digest)
            elif not self._keeps_tombstones:
                if found is not None:
                    removals.append((stored, user, key))
                continue
            else:
                tombstones += 1
            puts.append((stored, user, key, version, value, to_stored(digest)))
        self._connection.executemany(_REMOVE, removals)
        self._connection.executemany(_PUT, puts)
        self._put_sizes(sizes, tombstones)

    def _size(self, user: bytes, keys: int, size_bytes: int, digest: int, proof: int) -> Size:
        if size_digest(user, keys, size_bytes, from_stored(digest)) != from_stored(proof):
            raise damaged(self._path, f"the size of user {user!r} does not match its checksum")
        return Size(keys, size_bytes, from_stored(digest), keys, size_bytes, from_stored(digest))

    def _put_sizes(self, sizes: dict[tuple[int, bytes], Size], tombstones: int) -> None:
        users, rows, total_bytes, digest = self.meta.users, self.meta.rows, self.meta.bytes, self.meta.digest
        puts: list[tuple[int, bytes, int, int, int, int]] = []
        removals: list[tuple[int, bytes]] = []
        for (stored, user), size in sizes.items():
            if (size.keys, size.bytes, size.digest) == (size.keys_before, size.bytes_before, size.digest_before):
                continue
            rows += size.keys - size.keys_before
            total_bytes += size.bytes - size.bytes_before
            digest = to_stored(add_digests(from_stored(digest), size.digest - size.digest_before))
            users += (size.keys > 0) - (size.keys_before > 0)
            if size.keys > 0:
                proof = to_stored(size_digest(user, size.keys, size.bytes, size.digest))
                puts.append((stored, user, size.keys, size.bytes, to_stored(size.digest), proof))
            elif size.keys_before:
                removals.append((stored, user))
        self._connection.executemany(_REMOVE_SIZE, removals)
        self._connection.executemany(_PUT_SIZE, puts)
        self.meta = replace(
            self.meta, users=users, rows=rows, bytes=total_bytes, digest=digest,
            tombstones=self.meta.tombstones + tombstones,
        )  # fmt: skip
