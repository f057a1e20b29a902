"""A shard's store in memory: the same behaviour as worker_agent/store.py, and a power that can be lost.

For simulations. tests/property/test_store.py shows that both agree. It is written the simple way on purpose: one effect
after the other, nothing kept that can be counted but the digest. Its whole state is one immutable value; `lose_power`
goes back to the last one that was synced.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import immutables

from coordinator.api.v1 import replication_pb2
from coordinator.model.errors import Damaged
from worker_agent.store import DEFAULT_SETTINGS, REQUESTS_FORGOTTEN_MAX, StoreSettings
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
    request_row,
    row_digest,
    row_time_ms,
    row_value,
    split_row_key,
    to_stored,
    user_hash,
)
from worker_agent.store_interface import (
    CopyChunk,
    Digest,
    LogRecord,
    StateItem,
    StoreFigures,
    StoreFull,
    StorePosition,
    UserSize,
)
from worker_agent.store_rows import TOMBSTONES_DROPPED_MAX

User = tuple[int, bytes]
"""Stored hash and name: the order of the store."""
Place = tuple[int, bytes, bytes]
"""The same and a key or a request id."""


@dataclass(frozen=True, slots=True)
class ModelState:
    """All that a store keeps."""

    shard_id: int
    lo: int
    hi: int
    epoch_seen: int = 0
    applied: int = 0
    applied_epoch: int = 0
    newest_ms: int = 0
    is_complete: bool = True
    copy_start: int = 0
    copy_cursor: bytes = b""
    copy_read_at: int = 0
    first: int = 1
    last: int = 0
    log: immutables.Map[int, LogRecord] = field(default_factory=immutables.Map)
    entries: immutables.Map[User, immutables.Map[bytes, tuple[int, bytes | None]]] = field(
        default_factory=immutables.Map
    )
    """Version and value of each key; a tombstone has no value."""
    digest: int = 0
    requests: immutables.Map[Place, tuple[int, int]] = field(default_factory=immutables.Map)
    """Version and time."""

    @property
    def last_epoch(self) -> int:
        return self.log[self.last].epoch if self.last > self.applied else self.applied_epoch

    def rows(self) -> Iterator[tuple[Place, int, bytes | None]]:
        """Place, version and value of everything, in order."""
        for user in sorted(self.entries):
            for key, (version, value) in sorted(self.entries[user].items()):
                yield (*user, key), version, value

    def with_row(self, place: Place, row: tuple[int, bytes | None] | None) -> ModelState:
        """With this row there; None for without."""
        user, key = place[:2], place[2]
        keys = self.entries.get(user, immutables.Map())
        digest = self.digest
        for sign, known in ((-1, keys.get(key)), (1, row)):
            if known is not None and known[1] is not None:
                digest = add_digests(digest, sign * row_digest(user[1], key, *known))
        keys = keys.delete(key) if row is None else keys.set(key, row)
        entries = self.entries.set(user, keys) if keys else self.entries.delete(user)
        return replace(self, entries=entries, digest=digest)


class ModelStore:
    """`Store` in memory. While `is_full`, writes raise StoreFull; once `damage` is set, everything raises it."""

    def __init__(
        self, shard_id: int, lo: int, hi: int, settings: StoreSettings = DEFAULT_SETTINGS,
        state: ModelState | None = None,
    ) -> None:  # fmt: skip
        """Empty, or with the state of another one's disk."""
        self._settings = settings
        self._state = self._durable = state or ModelState(shard_id, lo, hi)
        self.is_full = False
        self.damage: Damaged | None = None

    def disk(self, *, has_power: bool = True) -> ModelState:
        """What another store that opens the files now would find; without power only what was synced."""
        return self._state if has_power else self._durable

    def lose_power(self) -> None:
        """Forgets what was not synced, as the store does that is opened after a power cut."""
        self._state = self._durable

    def _write(self, state: ModelState, *, sync: bool = True) -> None:
        if self.is_full:
            raise StoreFull("the model's disk is full; make room")
        self._state = state
        if sync:
            self._durable = state

    def _check(self) -> None:
        if self.damage is not None:
            raise self.damage

    # Log

    def position(self) -> StorePosition:
        state = self._state
        return StorePosition(
            state.epoch_seen, state.first, state.last, state.last_epoch, state.applied, state.applied_epoch,
            state.is_complete, state.copy_start, state.copy_cursor, state.copy_read_at,
        )  # fmt: skip

    def see_epoch(self, epoch: int) -> None:
        self._check()
        if epoch > self._state.epoch_seen:
            self._write(replace(self._state, epoch_seen=epoch))

    def append(self, records: Sequence[LogRecord]) -> None:
        self._check()
        state = self._state
        if [record.sequence for record in records] != list(range(state.last + 1, state.last + 1 + len(records))):
            raise ValueError(f"these records do not follow {state.last}")
        if records:
            log = state.log.update({record.sequence: record for record in records})
            self._write(replace(state, log=log, last=records[-1].sequence))

    def truncate(self, last: int) -> None:
        self._check()
        state = self._state
        if last < state.applied:
            raise ValueError(f"{state.applied} is applied")
        if last < state.last:
            log = immutables.Map({number: record for number, record in state.log.items() if number <= last})
            self._write(replace(state, log=log, last=last))

    def read_log(self, first: int, *, records_max: int, bytes_max: int) -> list[LogRecord]:
        self._check()
        if first < self._state.first:
            raise KeyError(first)
        records: list[LogRecord] = []
        for number in range(first, min(first + records_max, self._state.last + 1)):
            record = self._state.log[number]
            if records and sum(len(known.payload) for known in [*records, record]) > bytes_max:
                break
            records.append(record)
        return records

    # Tables

    def apply(self, up_to: int, *, keeps_tombstones: bool) -> Digest:
        self._check()
        before = self._state
        if up_to > before.last:
            raise ValueError(f"the last record is {before.last}")
        if up_to <= before.applied and (keeps_tombstones or all(value is not None for *_, value in before.rows())):
            return self.digest()
        numbers = range(before.applied + 1, up_to + 1)
        state = before
        for number in numbers:
            state = _apply_record(state, before.log[number])
        state = self._forget_requests(state, REQUESTS_FORGOTTEN_MAX + len(numbers))
        if not keeps_tombstones:
            state = _drop_tombstones(state, before)
        self._write(self._trim(state), sync=False)
        return self.digest()

    def _forget_requests(self, state: ModelState, limit: int) -> ModelState:
        oldest_ms, kept = state.newest_ms - self._settings.remembered_ms, self._settings.requests_kept
        by_age = sorted((time_ms, version, place) for place, (version, time_ms) in state.requests.items())
        requests = state.requests
        for time_ms, _, place in by_age[:limit]:
            if time_ms > oldest_ms and len(requests) <= kept:
                break
            requests = requests.delete(place)
        return replace(state, requests=requests)

    def _trim(self, state: ModelState) -> ModelState:
        records, size = self._settings.log_records_kept, self._settings.log_bytes_kept
        held = [len(state.log[number].payload) for number in range(state.first, state.applied + 1)]
        if len(held) <= records and sum(held) <= size:
            return state
        records, size, first, log = records * 7 // 8, size * 7 // 8, state.first, state.log
        while len(held) > records or sum(held) > size:
            held.pop(0)
            log = log.delete(first)
            first += 1
        return replace(state, first=first, log=log)

    def read_chunk(self, cursor: bytes, *, bytes_max: int) -> CopyChunk:
        self._check()
        table, *after = read_cursor(cursor)
        rows: list[replication_pb2.Row] = []
        size = 0
        state = self._state
        todo = [(TABLE_ENTRIES, place, entry_row(*place[1:], version, value)) for place, version, value in state.rows()]
        todo += [
            (TABLE_REQUESTS, place, request_row(*place[1:], *made)) for place, made in sorted(state.requests.items())
        ]
        for kind, place, row in todo:
            if (kind, *place) <= (table, *after):
                continue
            rows.append(row)
            size += ROW_BYTES + len(place[1]) + len(place[2])
            size += len(row.value[1:]) if kind == TABLE_ENTRIES else 0
            if size >= bytes_max:
                return CopyChunk(cursor, make_cursor(kind, *place), False, state.applied, rows)
        return CopyChunk(cursor, CURSOR_END, True, state.applied, rows)

    def begin_copy(self, start: int, start_epoch: int) -> None:
        self._check()
        old = self._state
        self._write(ModelState(
            old.shard_id, old.lo, old.hi, old.epoch_seen, start, start_epoch, is_complete=False, copy_start=start,
            first=start + 1, last=start,
        ))  # fmt: skip

    def merge_chunk(self, chunk: CopyChunk) -> None:
        self._check()
        state = self._state
        if state.is_complete or chunk.cursor != state.copy_cursor:
            raise ValueError(f"a chunk from {chunk.cursor!r} cannot follow {state.copy_cursor!r}")
        for row in chunk.rows:
            user, key = split_row_key(row.key)
            if row.table == TABLE_ENTRIES:
                state = _put(state, user, key, row.version, row_value(row))
            else:
                state = _remember(state, user, key, row.version, row_time_ms(row))
        read_at = max(state.copy_read_at, chunk.read_at)
        self._write(replace(state, copy_cursor=chunk.next_cursor, copy_read_at=read_at), sync=False)

    def finish_copy(self) -> None:
        self._check()
        state = self._state
        if state.is_complete or state.copy_cursor != CURSOR_END or state.applied < state.copy_read_at:
            raise ValueError("the copy is not whole")
        self._write(replace(state, is_complete=True, copy_start=0, copy_cursor=b"", copy_read_at=0))

    def digest(self) -> Digest:
        rows = sum(value is not None for *_, value in self._state.rows())
        return Digest(self._state.applied, self._state.digest, rows)

    def figures(self) -> StoreFigures:
        state = self._state
        live = {place: value for place, _, value in state.rows() if value is not None}
        users = sorted({place[:2] for place in live})
        size = sum(len(place[2]) + len(value) for place, value in live.items())
        median = from_stored(users[len(users) // 2][0]) if len(users) >= 2 else 0
        return StoreFigures(len(users), len(live), size, median, state.last + 1 - state.first, len(state.requests))

    def scrub(self, cursor: bytes) -> bytes:
        self._check()
        return b""

    def reader(self) -> ModelReader:
        return ModelReader(self)

    def close(self) -> None:
        """What was applied is then on disk too."""
        self._durable = self._state


@dataclass(frozen=True, slots=True)
class ModelReader:
    """`Reader` of a model."""

    store: ModelStore

    def moment(self) -> AbstractContextManager[None]:
        return nullcontext()

    def users(self, after: str, limit: int) -> list[str]:
        self.store._check()
        first = (user_hash(after.encode()), after.encode()) if after else (-1 << 63, b"")
        entries = self.store.disk().entries
        held = [place for place, keys in entries.items() if any(value is not None for _, value in keys.values())]
        return [user.decode() for _, user in sorted(place for place in held if place > first)][:limit]

    def get(self, user: str, keys: Sequence[str]) -> list[StateItem]:
        found = self._keys(user)
        rows = [(key, *found.get(key.encode(), (0, None))) for key in keys]
        return [StateItem(key, value, version) for key, version, value in rows if value is not None]

    def scan(self, user: str, from_key: str, prefix: str, limit: int) -> list[StateItem]:
        found = [
            StateItem(key.decode(), value, version)
            for key, (version, value) in sorted(self._keys(user).items())
            if value is not None and key >= from_key.encode() and key.startswith(prefix.encode())
        ]
        return found[:limit]

    def _keys(self, user: str) -> immutables.Map[bytes, tuple[int, bytes | None]]:
        self.store._check()
        name = user.encode()
        return self.store.disk().entries.get((user_hash(name), name), immutables.Map())

    def size(self, user: str) -> UserSize:
        items = self.scan(user, "", "", 1 << 30)
        return UserSize(len(items), sum(len(item.key.encode()) + len(item.value) for item in items))

    def request(self, user: str, request_id: str) -> int | None:
        self.store._check()
        name = user.encode()
        found = self.store.disk().requests.get((user_hash(name), name, request_id.encode()))
        return None if found is None else found[0]

    def applied(self) -> int:
        self.store._check()
        return self.store.disk().applied


def _apply_record(state: ModelState, record: LogRecord) -> ModelState:
    effects = replication_pb2.Effects.FromString(record.payload)
    user = effects.user.encode()
    for effect in effects.effects:
        value = effect.value if effect.HasField("value") else None
        state = _put(state, user, effect.key.encode(), record.sequence, value)
    if effects.request_id:
        state = _remember(state, user, effects.request_id.encode(), record.sequence, record.time_ms)
    return replace(
        state, applied=record.sequence, applied_epoch=record.epoch, newest_ms=max(state.newest_ms, record.time_ms)
    )


def _put(state: ModelState, user: bytes, key: bytes, version: int, value: bytes | None) -> ModelState:
    place = (user_hash(user), user, key)
    known = state.entries.get(place[:2], immutables.Map()).get(key)
    return state if known is not None and known[0] >= version else state.with_row(place, (version, value))


def _remember(state: ModelState, user: bytes, request_id: bytes, version: int, time_ms: int) -> ModelState:
    state = replace(state, newest_ms=max(state.newest_ms, time_ms))
    place = (user_hash(user), user, request_id)
    if place in state.requests and state.requests[place][0] >= version:
        return state
    return replace(state, requests=state.requests.set(place, (version, time_ms)))


def _drop_tombstones(state: ModelState, before: ModelState) -> ModelState:
    """New ones at once, then the first of the old ones."""
    known = {(place, version) for place, version, _ in before.rows()}
    tombstones = [(place, version) for place, version, value in state.rows() if value is None]
    old = [place for place, version in tombstones if (place, version) in known]
    for place in [*(place for place, version in tombstones if (place, version) not in known),
                  *old[:TOMBSTONES_DROPPED_MAX]]:  # fmt: skip
        state = state.with_row(place, None)
    return state


def split_model(parent: ModelStore, children: Sequence[tuple[int, int, int]]) -> list[ModelStore]:
    """Children with shard id, lo and hi, of a sealed parent, as worker_agent/store_cut.py makes them."""
    return [merge_models([parent], child) for child in children]


def merge_models(parents: Sequence[ModelStore], child: tuple[int, int, int]) -> ModelStore:
    """One child of sealed parents."""
    shard_id, lo, hi = child
    for parent in parents:
        parent.apply(parent.position().last, keeps_tombstones=False)
    states = [parent.disk() for parent in parents]
    applied, applied_epoch = max((state.last, state.last_epoch) for state in states)
    within = range(to_stored(lo), to_stored(hi))
    made = ModelState(
        shard_id, lo, hi, max(state.epoch_seen for state in states), applied, applied_epoch,
        max(state.newest_ms for state in states), first=applied + 1, last=applied,
        requests=immutables.Map({
            place: row for state in states for place, row in state.requests.items() if place[0] in within
        }),
    )  # fmt: skip
    for place, version, value in (row for state in states for row in state.rows()):
        if place[0] in within and value is not None:
            made = made.with_row(place, (version, value))
    return ModelStore(shard_id, lo, hi, parents[0]._settings, made)
