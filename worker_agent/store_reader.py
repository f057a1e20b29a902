"""Reads of what a store has applied, on the event loop's thread, beside the thread that writes.

Each call sees one moment, and so do all calls inside `moment`. Every row is checked against its digest before it is
given away.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from worker_agent.store_codec import from_stored, request_digest, row_digest, size_digest, to_stored, user_hash
from worker_agent.store_database import connect_reader, read_meta, told
from worker_agent.store_files import damaged
from worker_agent.store_interface import StateItem, UserSize

_GET = "SELECT version, value, digest FROM entries WHERE hash = ? AND user = ? AND key = ?"
_SCAN = (
    "SELECT key, version, value, digest FROM entries"
    " WHERE hash = ? AND user = ? AND key >= ? AND key < ? AND value IS NOT NULL ORDER BY key LIMIT ?"
)
_SIZE = "SELECT keys, bytes, digest, proof FROM users WHERE hash = ? AND user = ?"
_USERS = (
    "SELECT user, keys, bytes, digest, proof FROM users WHERE (hash, user) > (?, ?) ORDER BY hash, user LIMIT ?"
)
_REQUEST = "SELECT version, time_ms, digest FROM requests WHERE hash = ? AND user = ? AND request_id = ?"


class StoreReader:
    """`Reader` of a store. For one thread; the store closes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = connect_reader(path)

    @contextmanager
    def moment(self) -> Iterator[None]:
        """All that is asked inside is as of one moment: that of the first question."""
        if self._connection.in_transaction:
            yield
            return
        with told(self._path):
            self._connection.execute("BEGIN")
        try:
            yield
        finally:
            with told(self._path):
                self._connection.execute("COMMIT")

    def get(self, user: str, keys: Sequence[str]) -> list[StateItem]:
        """The keys that exist, in the order asked."""
        name = user.encode()
        stored = user_hash(name)
        with told(self._path):
            if len(keys) == 1:
                return self._get(stored, name, keys)
            with self.moment():
                return self._get(stored, name, keys)

    def _get(self, stored: int, user: bytes, keys: Sequence[str]) -> list[StateItem]:
        items: list[StateItem] = []
        for key in keys:
            encoded = key.encode()
            found = self._connection.execute(_GET, (stored, user, encoded)).fetchone()
            if found is not None:
                self._check(user, encoded, *found)
                if found[1] is not None:
                    items.append(StateItem(key, found[1], found[0]))
        return items

    def scan(self, user: str, from_key: str, prefix: str, limit: int) -> list[StateItem]:
        """Items in the order of the keys' UTF-8 bytes, at most `limit`."""
        name, start = user.encode(), prefix.encode()
        items: list[StateItem] = []
        with told(self._path):
            # No UTF-8 has the byte 0xff, so it is behind everything that begins with the prefix.
            where = (user_hash(name), name, max(start, from_key.encode()), start + b"\xff", limit)
            for key, version, value, digest in self._connection.execute(_SCAN, where).fetchall():
                self._check(name, key, version, value, digest)
                items.append(StateItem(key.decode(), value, version))
        return items

    def _check(self, user: bytes, key: bytes, version: int, value: bytes | None, digest: int) -> None:
        if row_digest(user, key, version, value) != from_stored(digest):
            raise damaged(self._path, f"key {key!r} of user {user!r} does not match its checksum")

    def size(self, user: str) -> UserSize:
        """How much the user keeps."""
        name = user.encode()
        with told(self._path):
            found = self._connection.execute(_SIZE, (user_hash(name), name)).fetchone()
            if found is None:
                return UserSize()
            keys, size_bytes, digest, proof = found
            self._check_size(name, keys, size_bytes, digest, proof)
            return UserSize(keys, size_bytes)

    def _check_size(self, user: bytes, keys: int, size_bytes: int, digest: int, proof: int) -> None:
        if size_digest(user, keys, size_bytes, from_stored(digest)) != from_stored(proof):
            raise damaged(self._path, f"the size of user {user!r} does not match its checksum")

    def users(self, after: str, limit: int) -> list[str]:
        """Users with at least one key, in the order of their hashes, from behind `after` on, at most `limit`."""
        name = after.encode()
        where = (user_hash(name), name) if after else (to_stored(0), b"")
        users: list[str] = []
        with told(self._path):
            for user, *size in self._connection.execute(_USERS, (*where, limit)).fetchall():
                self._check_size(user, *size)
                users.append(user.decode())
        return users

    def request(self, user: str, request_id: str) -> int | None:
        """Version that an earlier write with this request id got; None when it is not known (any more)."""
        name, encoded = user.encode(), request_id.encode()
        with told(self._path):
            found = self._connection.execute(_REQUEST, (user_hash(name), name, encoded)).fetchone()
            if found is None:
                return None
            version, time_ms, digest = found
            if request_digest(name, encoded, version, time_ms) != from_stored(digest):
                raise damaged(self._path, f"request {encoded!r} of user {name!r} does not match its checksum")
            return int(version)

    def applied(self) -> int:
        """Sequence that these answers show."""
        with told(self._path):
            return read_meta(self._connection, self._path).applied

    def close(self) -> None:
        """Ends it. Closing twice does nothing."""
        try:
            self._connection.close()
        except sqlite3.Error as error:
            raise damaged(self._path, str(error)) from error
