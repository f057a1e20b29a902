"""Snapshots: the file, and the store that PySyncObj writes, sends and receives them through.

File: "FCSNAP" | version u16 | body length u64 | crc32 of the body u32 | body. Body: the two last log entries
that the state includes (each index u64 | term u64 | length u32 | command), older first, then the machine's
own encoding of the state. All numbers are big-endian. PySyncObj needs both entries: its log is never empty.

Rules:

1. A snapshot takes the name `snapshot` only once it is whole on disk, and only when it is newer than the one
   there: a slow write must not overtake a newer snapshot that the leader sent meanwhile.
2. What a leader sent is decoded before it takes that name. A damaged one is dropped with a line in the log,
   and the old one stays; the leader sends again.
3. The log is cut only after rule 1 (PySyncObj asks `checkSerializing`; SUCCESS cuts).
4. States are immutable, so encoding and writing run in a thread while the machine goes on; nothing forks.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pysyncobj.config import SERIALIZER_STATE

from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.machine.state import State
from coordinator.model.errors import Damaged
from coordinator.raft.figures import SnapshotFigures
from coordinator.raft.files import ADVICE, SNAPSHOT_NAME, sync_directory, write_file
from coordinator.raft.journal import Entry

CHUNK_BYTES = 256 << 10
"""Bytes of a snapshot per frame."""
RETRY_S = 5.0
"""Pause after a snapshot could not be written."""
_HEADER = struct.Struct(">6sHQI")
_ENTRY_HEADER = struct.Struct(">QQI")
_MAGIC = b"FCSNAP"
_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state and the two last log entries that it includes."""

    before: Entry
    last: Entry
    state: State

    @property
    def index(self) -> int:
        """Index of the last log entry that the state includes."""
        return self.last[1]


def encode_file(snapshot: Snapshot, encode: Callable[[State], bytes] = encode_snapshot) -> bytes:
    """The whole file of a snapshot."""
    parts = []
    for command, index, term in (snapshot.before, snapshot.last):
        parts += [_ENTRY_HEADER.pack(index, term, len(command)), command]
    body = b"".join([*parts, encode(snapshot.state)])
    return _HEADER.pack(_MAGIC, _VERSION, len(body), zlib.crc32(body)) + body


def decode_file(data: bytes, name: str, decode: Callable[[bytes], State] = decode_snapshot) -> Snapshot:
    """Reads what `encode_file` made. Raises Damaged, naming the file, for anything else."""
    _check(data, name)
    entries: list[Entry] = []
    offset = _HEADER.size
    for _ in range(2):
        if offset + _ENTRY_HEADER.size > len(data):
            raise Damaged(f"{name}, offset {offset}: the log entries are cut off; {ADVICE}")
        index, term, length = _ENTRY_HEADER.unpack_from(data, offset)
        offset += _ENTRY_HEADER.size
        entries.append((data[offset : offset + length], index, term))
        offset += length
    state = decode(data[offset:])
    before, last = entries
    if last[1] != before[1] + 1 or state.index > last[1]:
        found = f"entries {before[1]} and {last[1]} do not fit state {state.index}"
        raise Damaged(f"{name}, offset {_HEADER.size}: {found}; {ADVICE}")
    return Snapshot(before, last, state)


def _check(data: bytes, name: str) -> None:
    if len(data) < _HEADER.size:
        raise Damaged(f"{name}, offset 0: {len(data)} bytes are no snapshot; {ADVICE}")
    magic, version, length, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise Damaged(f"{name}, offset 0: it does not begin as a snapshot; {ADVICE}")
    if version != _VERSION:
        known = f"version {version}, this software reads {_VERSION}"
        raise Damaged(f"{name}, offset 6: {known}; run the software that wrote it, or: {ADVICE}")
    if length != len(data) - _HEADER.size:
        found = len(data) - _HEADER.size
        raise Damaged(f"{name}, offset 8: {found} bytes where the header says {length}; {ADVICE}")
    if zlib.crc32(memoryview(data)[_HEADER.size :]) != checksum:
        raise Damaged(f"{name}, offset {_HEADER.size}: the checksum does not match; {ADVICE}")


class SnapshotStore:
    """Holds the snapshot of one master; stands where PySyncObj's own Serializer stands, under its method names.

    `state_now` gives the state to write, `on_written` is called in any thread when a write has ended, and
    `may_send(node)` says whether a peer's connection takes more. `applied_index` is set by the engine.
    """

    def __init__(
        self,
        directory: Path,
        executor: Executor,
        encode: Callable[[State], bytes] = encode_snapshot,
        decode: Callable[[bytes], State] = decode_snapshot,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._path = directory / SNAPSHOT_NAME
        self._executor = executor
        self._encode = encode
        self._decode = decode
        self._writing: Future[int] | None = None
        self.figures = SnapshotFigures()
        """The newest one that is sound on disk."""
        self._outgoing: dict[Any, BinaryIO] = {}
        self._incoming: BinaryIO | None = None
        self.received: Snapshot | None = None
        """The snapshot that a leader sent, once it is whole, sound and in place."""
        self.state_now: Callable[[], State] = State
        self.applied_index: Callable[[], int] = lambda: 0
        self.may_send: Callable[[Any], bool] = lambda node: True
        self.on_written: Callable[[], None] = lambda: None
        self._retry_at = 0.0
        self.on_damaged: Callable[[], None] = lambda: None

    def load(self) -> Snapshot | None:
        """The snapshot on disk. Raises Damaged when there is one that cannot be trusted."""
        for leftover in self._path.parent.glob(SNAPSHOT_NAME + ".*.tmp"):
            leftover.unlink()
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        snapshot = decode_file(data, str(self._path), self._decode)
        self._note(snapshot.index)
        return snapshot

    def _note(self, index: int) -> None:
        status = self._path.stat()
        self.figures = SnapshotFigures(index, status.st_size, status.st_mtime)

    def close(self) -> None:
        """Closes files; a write that goes on ends by itself and keeps its temporary name."""
        # A full disk has failed this master already, and fails the bytes that wait in the file once more.
        with contextlib.suppress(OSError):
            self._close(self._incoming)
        self._incoming = None
        while self._outgoing:
            self._close(self._outgoing.popitem()[1])

    # Writing: PySyncObj calls serialize, then checkSerializing on every tick

    def serialize(self, data: Any, id: int) -> None:
        """Starts to write the state as it is now; `data` is (unused, last entry, entry before, members)."""
        state = self.state_now()
        _, last, before, _ = data
        snapshot = Snapshot(tuple(before), tuple(last), state)
        self._writing = self._executor.submit(self._write, snapshot)
        self._writing.add_done_callback(lambda _: self.on_written())

    def _write(self, snapshot: Snapshot) -> int:
        write_file(self._temporary("written"), encode_file(snapshot, self._encode))
        return snapshot.index

    def checkSerializing(self) -> tuple[int, int | None]:
        """State of the write, and the index up to which the log may go; SUCCESS and FAILED are told once."""
        if self._writing is None:
            is_pausing = self._monotonic() < self._retry_at
            return SERIALIZER_STATE.SERIALIZING if is_pausing else SERIALIZER_STATE.NOT_SERIALIZING, None
        if not self._writing.done():
            return SERIALIZER_STATE.SERIALIZING, None
        writing, self._writing = self._writing, None
        error = writing.exception()
        if error is not None:
            log.error("could not write a snapshot: %s; trying again in %g s, the log grows meanwhile", error, RETRY_S)
            self._retry_at = self._monotonic() + RETRY_S
            return SERIALIZER_STATE.FAILED, None
        index = writing.result()
        if index <= self.figures.index:
            return SERIALIZER_STATE.FAILED, None
        self._put_in_place(self._temporary("written"), index)
        # PySyncObj keeps the entry before the last one that the snapshot includes as the first of its log.
        return SERIALIZER_STATE.SUCCESS, index - 1

    def _put_in_place(self, temporary: Path, index: int) -> None:
        temporary.replace(self._path)
        sync_directory(self._path.parent)
        self._note(index)

    # Sending

    def getTransmissionData(self, node: Any) -> tuple[bytes, bool, bool] | None:
        """The next chunk for a follower as (bytes, is first, is last); None when there is nothing to send now."""
        if not self.may_send(node):
            return None
        file = self._outgoing.get(node)
        is_first = file is None
        try:
            if file is None:
                _check(self._path.read_bytes(), str(self._path))
                file = self._outgoing[node] = self._path.open("rb")
            data = file.read(CHUNK_BYTES)
        except (OSError, Damaged) as error:
            log.error("cannot send a snapshot to %s: %s; writing a new one", node, error)
            self.cancelTransmisstion(node)
            self.on_damaged()
            return None
        is_last = not data
        if is_last:
            self.cancelTransmisstion(node)
        return data, is_first, is_last

    def cancelTransmisstion(self, node: Any) -> None:
        """Forgets how far a follower is."""
        self._close(self._outgoing.pop(node, None))

    # Receiving

    def setTransmissionData(self, data: tuple[bytes, bool, bool] | None) -> bool:
        """Takes a chunk in; True when a newer, sound snapshot is now in place and in `received`."""
        if not data:
            return False
        content, is_first, is_last = data
        temporary = self._temporary("received")
        if is_first:
            self._close(self._incoming)
            self._incoming = temporary.open("wb")
        if self._incoming is None:
            return False
        self._incoming.write(content)
        if not is_last:
            return False
        self._incoming = self._close(self._incoming)
        return self._accept(temporary)

    def _accept(self, temporary: Path) -> bool:
        content = temporary.read_bytes()
        try:
            snapshot = decode_file(content, "the snapshot that the leader sent", self._decode)
        except Damaged as error:
            log.error("%s: dropped, this master keeps its state", error)
            temporary.unlink()
            return False
        if snapshot.index <= self.applied_index():
            temporary.unlink()
            return False
        write_file(temporary, content)
        self._put_in_place(temporary, snapshot.index)
        self.received = snapshot
        return True

    def _temporary(self, kind: str) -> Path:
        return self._path.with_name(f"{SNAPSHOT_NAME}.{kind}.tmp")

    @staticmethod
    def _close(file: BinaryIO | None) -> None:
        if file is not None:
            file.close()
