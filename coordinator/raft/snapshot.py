"""Snapshots: the file, and the store that PySyncObj writes, sends and receives them through.

File: "FCSNAP" | version u16 | body length u64 | crc32 of the body u32 | body. Body: the two last log entries
that the state includes (each index u64 | term u64 | length u32 | command), older first, then the machine's
own encoding of the state. All numbers are big-endian. PySyncObj needs both entries: its log is never empty.

Rules:

1. A snapshot takes the name `snapshot` only once it is whole on disk, and only when it is newer than the one
   there: a slow write must not overtake a newer snapshot that the leader sent meanwhile.
2. What a leader sent is checked, decoded and synced in a thread before it takes that name. A damaged one is dropped
   with a line in the log, and the old one stays; the leader sends again.
3. The log is cut only after rule 1 (PySyncObj asks `checkSerializing`; SUCCESS cuts).
4. States are immutable, so encoding and writing run in a thread while the machine goes on; nothing forks.
5. The one that was there before stays as `snapshot.previous`, and the disk keeps the log from its end on
   (`needed_from`, journal.py). When `snapshot` is found damaged at the start, the master goes on from the one before
   and the log behind it, which together hold all that it ever acknowledged. Where the log does not reach back (its
   entries went when a leader's snapshot took their place), that would forget what was acknowledged, so it refuses, and
   such a previous one is removed at once. One that is whole, but that this software cannot read, is never passed over.
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
from coordinator.raft.files import ADVICE, PREVIOUS_NAME, SNAPSHOT_NAME, sync_directory, write_file
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
    (before, last), offset = _read_entries(data, name)
    state = decode(data[offset:])
    if last[1] != before[1] + 1 or state.index > last[1]:
        found = f"entries {before[1]} and {last[1]} do not fit state {state.index}"
        raise Damaged(f"{name}, offset {_HEADER.size}: {found}; {ADVICE}")
    return Snapshot(before, last, state)


def _read_entries(data: bytes, name: str) -> tuple[tuple[Entry, Entry], int]:
    """The two log entries of a file that `_check` has passed, and where its state begins."""
    entries: list[Entry] = []
    offset = _HEADER.size
    for _ in range(2):
        if offset + _ENTRY_HEADER.size > len(data):
            raise Damaged(f"{name}, offset {offset}: the log entries are cut off; {ADVICE}")
        index, term, length = _ENTRY_HEADER.unpack_from(data, offset)
        offset += _ENTRY_HEADER.size
        entries.append((data[offset : offset + length], index, term))
        offset += length
    return (entries[0], entries[1]), offset


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


def _is_whole(data: bytes) -> bool:
    """True when a file is as it was written; what cannot be read in it then is not the disk's fault."""
    if len(data) < _HEADER.size:
        return False
    magic, _, length, checksum = _HEADER.unpack_from(data)
    body = memoryview(data)[_HEADER.size :]
    return bool(magic == _MAGIC and length == len(body) and zlib.crc32(body) == checksum)


class SnapshotStore:
    """Holds the snapshots of one master; stands where PySyncObj's own Serializer stands, under its method names.

    `state_now` gives the state to write, `on_written` is called in any thread when a write or a check has ended, and
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
        self._previous_path = directory / PREVIOUS_NAME
        self._executor = executor
        self._encode = encode
        self._decode = decode
        self._writing: Future[SnapshotFigures] | None = None
        self._checking: Future[tuple[Snapshot, SnapshotFigures]] | None = None
        self.figures = SnapshotFigures()
        """The newest one on disk."""
        self._previous_index = 0
        """Index of the previous one; 0 for none."""
        self._is_damaged = False
        """True when the newest one was found damaged while it was to be sent: the previous one is worth more."""
        self._opening: Future[BinaryIO] | None = None
        self._outgoing: dict[Any, BinaryIO] = {}
        self._incoming: BinaryIO | None = None
        self.state_now: Callable[[], State] = State
        self.applied_index: Callable[[], int] = lambda: 0
        self.may_send: Callable[[Any], bool] = lambda node: True
        self.on_written: Callable[[], None] = lambda: None
        self._retry_at = 0.0
        self.on_damaged: Callable[[], None] = lambda: None

    # Loading

    def load(self, is_in_log: Callable[[Entry, Entry], bool] = lambda before, last: True) -> Snapshot | None:
        """The newest snapshot on disk that is sound and that the log goes on from; None when there is none at all.

        `is_in_log` tells whether the log has a snapshot's two entries. Raises Damaged when what is on disk would have
        this master forget anything (rule 5).
        """
        for leftover in self._path.parent.glob(SNAPSHOT_NAME + ".*.tmp"):
            leftover.unlink()
        snapshot = self._load_newest(is_in_log)
        if snapshot is not None:
            self._previous_index = self._find_previous(is_in_log)
        return snapshot

    def _load_newest(self, is_in_log: Callable[[Entry, Entry], bool]) -> Snapshot | None:
        data = b""
        try:
            data = self._path.read_bytes()
            return self._loaded(decode_file(data, str(self._path), self._decode), len(data))
        except FileNotFoundError:
            # A process that ended while it put a newer one in place leaves this gap.
            if not self._previous_path.exists():
                return None
            damage = None
        except Damaged as error:
            if _is_whole(data) or not self._previous_path.exists():
                raise
            damage = error
        data = self._previous_path.read_bytes()
        snapshot = decode_file(data, str(self._previous_path), self._decode)
        if not is_in_log(snapshot.before, snapshot.last):
            reason = damage or Damaged(f"{self._path}, offset 0: missing; {ADVICE}")
            log.error("%s is sound, but the log does not go on from entry %d", self._previous_path, snapshot.index)
            raise reason
        if damage is not None:
            log.error("%s", damage)
            log.error("going on from %s, entry %d, and the log behind it", self._previous_path, snapshot.index)
            self._path.replace(self._path.with_name(SNAPSHOT_NAME + ".damaged"))
        self._previous_path.replace(self._path)
        sync_directory(self._path.parent)
        return self._loaded(snapshot, len(data))

    def _loaded(self, snapshot: Snapshot, size_bytes: int) -> Snapshot:
        self.figures = SnapshotFigures(snapshot.index, size_bytes, snapshot.state.time_ms / 1_000)
        return snapshot

    def _find_previous(self, is_in_log: Callable[[Entry, Entry], bool]) -> int:
        """Index of the previous snapshot; one that could not be used is removed."""
        try:
            data = self._previous_path.read_bytes()
            _check(data, str(self._previous_path))
            (before, last), _ = _read_entries(data, str(self._previous_path))
        except FileNotFoundError:
            return 0
        except Damaged as error:
            log.error("%s", error)
        else:
            if is_in_log(before, last):
                return last[1]
        self.drop_previous()
        return 0

    def drop_previous(self) -> None:
        """The log does not go on from the previous snapshot any more."""
        self._previous_index = 0
        self._previous_path.unlink(missing_ok=True)

    @property
    def needed_from(self) -> int:
        """Index of the first log entry that the snapshots on disk need: the first of the older one's two."""
        return (self._previous_index or self.figures.index) - 1

    def close(self) -> None:
        """Closes files; a write that goes on ends by itself and keeps its temporary name."""
        # A full disk has failed this master already, and fails the bytes that wait in the file once more.
        with contextlib.suppress(OSError):
            self._close(self._incoming)
        self._incoming = None
        while self._outgoing:
            self._close(self._outgoing.popitem()[1])
        if self._opening is not None:
            self._opening.add_done_callback(lambda done: done.cancelled() or done.exception() or done.result().close())
            self._opening = None

    # Writing: PySyncObj calls serialize, then checkSerializing on every tick

    def serialize(self, data: Any, id: int) -> None:
        """Starts to write the state as it is now; `data` is (unused, last entry, entry before, members)."""
        state = self.state_now()
        _, last, before, _ = data
        snapshot = Snapshot(tuple(before), tuple(last), state)
        self._writing = self._executor.submit(self._write, snapshot)
        self._writing.add_done_callback(lambda _: self.on_written())

    def _write(self, snapshot: Snapshot) -> SnapshotFigures:
        data = encode_file(snapshot, self._encode)
        write_file(self._temporary("written"), data)
        return SnapshotFigures(snapshot.index, len(data), snapshot.state.time_ms / 1_000)

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
        figures = writing.result()
        if figures.index <= self.figures.index:
            return SERIALIZER_STATE.FAILED, None
        self._put_in_place(self._temporary("written"), figures)
        # PySyncObj keeps the entry before the last one that the snapshot includes as the first of its log.
        return SERIALIZER_STATE.SUCCESS, figures.index - 1

    def _put_in_place(self, temporary: Path, figures: SnapshotFigures) -> None:
        if self.figures.index and not self._is_damaged:
            self._path.replace(self._previous_path)
            self._previous_index = self.figures.index
        temporary.replace(self._path)
        sync_directory(self._path.parent)
        self.figures, self._is_damaged = figures, False

    # Sending

    def getTransmissionData(self, node: Any) -> tuple[bytes, bool, bool] | None:
        """The next chunk for a follower as (bytes, is first, is last); None when there is nothing to send now."""
        if not self.may_send(node):
            return None
        file = self._outgoing.get(node)
        is_first = file is None
        try:
            if file is None:
                file = self._opened()
                if file is None:
                    return None
                self._outgoing[node] = file
            data = file.read(CHUNK_BYTES)
        except (OSError, Damaged) as error:
            log.error("cannot send a snapshot to %s: %s; writing a new one", node, error)
            self.cancelTransmisstion(node)
            self._is_damaged = True
            self.on_damaged()
            return None
        is_last = not data
        if is_last:
            self.cancelTransmisstion(node)
        return data, is_first, is_last

    def _opened(self) -> BinaryIO | None:
        """The newest snapshot, once its bytes have been checked in another thread; None until then."""
        if self._opening is None:
            self._opening = self._executor.submit(self._open_checked)
            self._opening.add_done_callback(lambda _: self.on_written())
        if not self._opening.done():
            return None
        opening, self._opening = self._opening, None
        return opening.result()

    def _open_checked(self) -> BinaryIO:
        _check(self._path.read_bytes(), str(self._path))
        return self._path.open("rb")

    def cancelTransmisstion(self, node: Any) -> None:
        """Forgets how far a follower is."""
        self._close(self._outgoing.pop(node, None))

    # Receiving: PySyncObj hands the chunks in; what has become of them is asked for at every step

    def setTransmissionData(self, data: tuple[bytes, bool, bool] | None) -> bool:
        """Takes a chunk in. Always False: it takes time to check the whole, so PySyncObj does not acknowledge it."""
        if not data or self.is_checking:
            return False
        content, is_first, is_last = data
        if is_first:
            self._close(self._incoming)
            self._incoming = self._temporary("received").open("wb")
        if self._incoming is None:
            return False
        self._incoming.write(content)
        if is_last:
            self._incoming = self._close(self._incoming)
            self._checking = self._executor.submit(self._check_received)
            self._checking.add_done_callback(lambda _: self.on_written())
        return False

    @property
    def is_checking(self) -> bool:
        """True from the last chunk of a snapshot until `take_received` has told what became of it."""
        return self._checking is not None

    def _check_received(self) -> tuple[Snapshot, SnapshotFigures]:
        temporary = self._temporary("received")
        data = temporary.read_bytes()
        snapshot = decode_file(data, "the snapshot that the leader sent", self._decode)
        write_file(temporary, data)
        return snapshot, SnapshotFigures(snapshot.index, len(data), snapshot.state.time_ms / 1_000)

    def take_received(self) -> Snapshot | None:
        """A snapshot that a leader sent, told once, when it is newer than the state, sound, and in place.

        Raises OSError when the disk fails.
        """
        if self._checking is None or not self._checking.done():
            return None
        checking, self._checking = self._checking, None
        try:
            snapshot, figures = checking.result()
        except Damaged as error:
            log.error("%s: dropped, this master keeps its state", error)
            self._temporary("received").unlink(missing_ok=True)
            return None
        if snapshot.index <= self.applied_index():
            self._temporary("received").unlink(missing_ok=True)
            return None
        self._put_in_place(self._temporary("received"), figures)
        return snapshot

    def _temporary(self, kind: str) -> Path:
        return self._path.with_name(f"{SNAPSHOT_NAME}.{kind}.tmp")

    @staticmethod
    def _close(file: BinaryIO | None) -> None:
        if file is not None:
            file.close()
