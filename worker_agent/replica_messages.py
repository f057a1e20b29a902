"""Between the messages of replication.proto and the records and chunks of shard_interface.py."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

from coordinator.api.v1 import replication_pb2
from coordinator.model import Monotonic, WallMs
from worker_agent.store_interface import CopyChunk, Digest, LogRecord, StorePosition

RECORD_OVERHEAD_BYTES = 32
"""What a record costs on its way beside its payload, about."""


def to_us(moment: Monotonic) -> int:
    """Rounded down: a lease that counts from it ends early rather than late."""
    return max(int(moment * 1e6), 0)


def record_bytes(record: LogRecord) -> int:
    """Size of a record on its way, about."""
    return len(record.payload) + RECORD_OVERHEAD_BYTES


def records_to_proto(records: Iterable[LogRecord]) -> list[replication_pb2.Record]:
    """The records of an Append."""
    return [
        replication_pb2.Record(
            sequence=record.sequence, epoch=record.epoch, time_unix_ms=record.time_ms, payload=record.payload
        )
        for record in records
    ]


def record_from_proto(record: replication_pb2.Record) -> LogRecord:
    """A record as the store takes it."""
    return LogRecord(record.sequence, record.epoch, WallMs(record.time_unix_ms), record.payload)


def digest_from_proto(append: replication_pb2.Append) -> Digest | None:
    """The primary's digest; None when it says none."""
    if not append.has_digest:
        return None
    return Digest(append.digest_sequence, append.digest, append.digest_rows)


def standing_of(position: StorePosition, sent_at_us: int) -> replication_pb2.Standing:
    """Where a store stands, as its primary wants to hear it."""
    standing = replication_pb2.Standing(
        last_sequence=position.last,
        last_epoch=position.last_epoch,
        applied_sequence=position.applied,
        is_complete=position.is_complete,
        sent_at_us=sent_at_us,
    )
    if not position.is_complete:
        standing.copy_start_sequence = position.copy_start
        standing.copy_cursor = position.copy_cursor
    return standing


def checksum_of(rows: Iterable[replication_pb2.Row]) -> int:
    """CRC-32 of the rows' keys and values, in order."""
    checksum = 0
    for row in rows:
        checksum = zlib.crc32(row.value, zlib.crc32(row.key, checksum))
    return checksum


def fill_chunk(message: replication_pb2.CopyChunk, chunk: CopyChunk, start: int, start_epoch: int) -> None:
    """A chunk on its way. Its rows are the bulk of what a move copies, so they are copied here once."""
    message.start_sequence = start
    message.start_epoch = start_epoch
    message.cursor = chunk.cursor
    message.next_cursor = chunk.next_cursor
    message.is_last = chunk.is_last
    message.read_at_sequence = chunk.read_at
    message.checksum = checksum_of(chunk.rows)
    message.rows.extend(chunk.rows)


def chunk_from_proto(chunk: replication_pb2.CopyChunk) -> CopyChunk:
    """A chunk as the store takes it."""
    return CopyChunk(
        cursor=chunk.cursor,
        next_cursor=chunk.next_cursor,
        is_last=chunk.is_last,
        read_at=chunk.read_at_sequence,
        rows=chunk.rows,
    )


def rows_bytes(rows: Sequence[replication_pb2.Row]) -> int:
    """Bytes of keys and values."""
    return sum(len(row.key) + len(row.value) for row in rows)
