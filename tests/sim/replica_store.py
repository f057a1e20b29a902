"""A store of one shard in memory: what a crash leaves of it is what was durable. For tests of the replica machine.

Rows are registers (table 1) and the requests that wrote them (table 2); a register is the one key of a user. What is
applied or copied is durable only with the next other write, as Store says: a crash may keep it, or lose it.
`ModelBacked` has the same face before tests/model_store.py, which behaves like the real store in everything, and takes
its time.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from coordinator.api.v1 import replication_pb2
from tests.model_store import ModelStore
from worker_agent.store import StoreSettings
from worker_agent.store_interface import CopyChunk, Digest, LogRecord, StoreFull, StorePosition

REGISTER, REQUEST = 1, 2
ROWS_PER_CHUNK = 4
LOG_RECORDS_KEPT = 40
"""Applied records that stay in the log, so that replicas that were away long are copied anew."""
RowKey = tuple[int, str]


KEY = "value"


def payload_of(register: str, value: str | None, request_id: str) -> bytes:
    """A record that writes a register, or removes it."""
    effect = replication_pb2.Effect(key=KEY, value=None if value is None else value.encode())
    return replication_pb2.Effects(user=register, effects=[effect], request_id=request_id).SerializeToString()


def request_of(record: LogRecord) -> str:
    """The request that made a record."""
    return replication_pb2.Effects.FromString(record.payload).request_id


@dataclass(slots=True)
class Content:
    """Everything that a store holds."""

    epoch_seen: int = 0
    log: list[LogRecord] = field(default_factory=list)
    base: int = 0
    """Sequence of the record before the first one of the log."""
    base_epoch: int = 0
    applied: int = 0
    applied_epoch: int = 0
    rows: dict[RowKey, tuple[str | None, int]] = field(default_factory=dict)
    """(value, version); a value of None is a tombstone."""
    is_complete: bool = True
    copy_start: int = 0
    copy_cursor: bytes = b""
    copy_read_at: int = 0

    def copy(self) -> Content:
        """As it is now."""
        return Content(
            self.epoch_seen,
            list(self.log),
            self.base,
            self.base_epoch,
            self.applied,
            self.applied_epoch,
            dict(self.rows),
            self.is_complete,
            self.copy_start,
            self.copy_cursor,
            self.copy_read_at,
        )


class SimStore:
    """See above. `on_apply(record)` is told of every record that is applied."""

    def __init__(self, *, is_complete: bool = True, log_records_kept: int = LOG_RECORDS_KEPT) -> None:
        self.now = Content(is_complete=is_complete)
        self._durable = self.now.copy()
        self.is_full = False
        self.on_apply: Callable[[LogRecord], None] = lambda record: None
        self.log_records_kept = log_records_kept

    def _sync(self) -> None:
        self._durable = self.now.copy()

    def crash(self, rng: random.Random) -> None:
        """The process ends; what was not durable may be gone."""
        if rng.random() < 0.5:
            self._sync()
        self.now = self._durable.copy()

    def _need_room(self) -> None:
        if self.is_full:
            raise StoreFull("no space left on device")

    # The protocol of shard_interface.py

    def position(self) -> StorePosition:
        now = self.now
        return StorePosition(
            epoch_seen=now.epoch_seen,
            first=now.base + 1,
            last=now.base + len(now.log),
            last_epoch=now.log[-1].epoch if now.log else now.base_epoch,
            applied=now.applied,
            applied_epoch=now.applied_epoch,
            is_complete=now.is_complete,
            copy_start=now.copy_start,
            copy_cursor=now.copy_cursor,
            copy_read_at=now.copy_read_at,
        )

    def see_epoch(self, epoch: int) -> None:
        self._need_room()
        self.now.epoch_seen = max(self.now.epoch_seen, epoch)
        self._sync()

    def append(self, records: Sequence[LogRecord]) -> None:
        self._need_room()
        assert records[0].sequence == self.now.base + len(self.now.log) + 1, "an append goes on where the log ends"
        for before, after in pairwise(records):
            assert after.sequence == before.sequence + 1, "records are contiguous"
            assert after.epoch >= before.epoch, "epochs do not fall"
        self.now.log.extend(records)
        self._sync()

    def truncate(self, last: int) -> None:
        assert last >= self.now.applied, f"{last} is below {self.now.applied}, which is applied"
        del self.now.log[last - self.now.base :]
        self._sync()

    def apply(self, up_to: int, *, keeps_tombstones: bool) -> Digest:
        now = self.now
        assert up_to <= now.base + len(now.log), "what is applied is in the log"
        if up_to > now.applied:
            self._need_room()
        for record in now.log[now.applied - now.base : up_to - now.base]:
            self.on_apply(record)
            effects = replication_pb2.Effects.FromString(record.payload)
            effect = effects.effects[0]
            value = effect.value.decode() if effect.HasField("value") else None
            self._put((REGISTER, effects.user), value, record.sequence)
            self._put((REQUEST, effects.request_id), str(record.sequence), record.sequence)
            now.applied, now.applied_epoch = record.sequence, record.epoch
        if not keeps_tombstones:
            now.rows = {key: row for key, row in now.rows.items() if row[0] is not None}
        # What is applied and durable may leave the log.
        excess = min(now.applied, self._durable.applied) - now.base - self.log_records_kept
        if excess > self.log_records_kept:
            now.base, now.base_epoch = now.log[excess - 1].sequence, now.log[excess - 1].epoch
            del now.log[:excess]
        return self.digest()

    def _put(self, key: RowKey, value: str | None, version: int) -> None:
        known = self.now.rows.get(key)
        if known is None or known[1] <= version:
            self.now.rows[key] = (value, version)

    def read_log(self, first: int, *, records_max: int, bytes_max: int) -> list[LogRecord]:
        if first <= self.now.base:
            raise KeyError(first)
        start = first - self.now.base - 1
        return self.now.log[start : start + records_max]

    def read_chunk(self, cursor: bytes, *, bytes_max: int) -> CopyChunk:
        after = (int(cursor[:1]), cursor[1:].decode()) if cursor else (0, "")
        keys = sorted(key for key in self.now.rows if key > after)
        chosen = keys[:ROWS_PER_CHUNK]
        rows = []
        for key in chosen:
            value, version = self.now.rows[key]
            encoded = b"" if value is None else b"+" + value.encode()
            rows.append(replication_pb2.Row(table=key[0], key=key[1].encode(), value=encoded, version=version))
        next_cursor = f"{chosen[-1][0]}{chosen[-1][1]}".encode() if chosen else cursor
        return CopyChunk(cursor, next_cursor, len(chosen) == len(keys), self.now.applied, rows)

    def begin_copy(self, start: int, start_epoch: int) -> None:
        seen = self.now.epoch_seen
        self.now = Content(
            epoch_seen=seen,
            base=start,
            base_epoch=start_epoch,
            applied=start,
            applied_epoch=start_epoch,
            is_complete=False,
            copy_start=start,
        )
        self._sync()

    def merge_chunk(self, chunk: CopyChunk) -> None:
        self._need_room()
        assert not self.now.is_complete, "only an unfinished copy takes rows"
        assert chunk.cursor == self.now.copy_cursor, "chunks come in order"
        for row in chunk.rows:
            value = row.value[1:].decode() if row.value else None
            self._put((row.table, row.key.decode()), value, row.version)
        self.now.copy_cursor = chunk.next_cursor
        self.now.copy_read_at = max(self.now.copy_read_at, chunk.read_at)

    def finish_copy(self) -> None:
        assert self.now.applied >= self.now.copy_read_at, "no row is newer than what is applied"
        self.now.is_complete = True
        self._sync()

    def digest(self) -> Digest:
        live = {key: row for key, row in self.now.rows.items() if row[0] is not None}
        value = 0
        for (table, key), row in live.items():
            value ^= zlib.crc32(f"{table} {key} {row}".encode())
        return Digest(self.now.applied, value, len(live))

    def close(self) -> None:
        """Nothing to close."""

    # For hosts and checks

    def get(self, register: str) -> str | None:
        """The value of a register as applied."""
        return self.now.rows.get((REGISTER, register), (None, 0))[0]

    def request(self, register: str, request_id: str) -> int | None:
        """Sequence of the record that a request made."""
        row = self.now.rows.get((REQUEST, request_id))
        return row[1] if row is not None else None

    def registers(self) -> list[str]:
        """Registers that have a value."""
        return [key for (table, key), (value, _) in self.now.rows.items() if table == REGISTER and value is not None]


class ModelBacked(ModelStore):
    """The model of the real store, with what hosts and checks of the simulation ask for."""

    def __init__(self, *, is_complete: bool = True, log_records_kept: int = LOG_RECORDS_KEPT) -> None:
        super().__init__(1, 0, 1 << 64, StoreSettings(log_records_kept=log_records_kept))
        self.on_apply: Callable[[LogRecord], None] = lambda record: None

    def crash(self, rng: random.Random) -> None:
        """The process ends, with or without the power."""
        if rng.random() < 0.5:
            self.lose_power()
        else:
            self.close()

    def apply(self, up_to: int, *, keeps_tombstones: bool) -> Digest:
        records = [self.disk().log[number] for number in range(self.disk().applied + 1, up_to + 1)]
        digest = super().apply(up_to, keeps_tombstones=keeps_tombstones)
        for record in records:
            self.on_apply(record)
        return digest

    def get(self, register: str) -> str | None:
        """The value of a register as applied."""
        items = self.reader().get(register, [KEY])
        return items[0].value.decode() if items else None

    def request(self, register: str, request_id: str) -> int | None:
        """Sequence of the record that a request made."""
        return self.reader().request(register, request_id)

    def registers(self) -> list[str]:
        """Registers that have a value."""
        return [place[1].decode() for place, _, value in self.disk().rows() if value is not None]
