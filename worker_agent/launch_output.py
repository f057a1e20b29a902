"""What runs printed, on disk: bounded for each run and in all, read while it grows, and there after a restart.

One file in `runs/` for each run that printed anything, named by its token; a run that printed nothing costs nothing.
A file keeps the first half and the last half of what it may keep:

    header | head: the first bytes, in order | ring: the byte at offset N is at (N - head size) % ring size
             SLACK more than the half that is shown

The header, which has the number of bytes printed so far, is written after the bytes, and one write brings no more than
SLACK bytes. So whatever is there when the agent is killed reads right: what a half-done write has overwritten are bytes
that the last header no longer shows. Nothing is synced: a power cut may cost the output of the last seconds.

All that touches the disk happens in one thread, in the order in which it was asked for. A run whose output waits for
the disk is not read any further (`RunOutput.on_full`), so it waits too, as it would with a file of its own. A full disk
costs the output that does not fit, never the run.

Over the bound of all together the oldest ended runs go first; each counts as the blocks that it takes, at least one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import urllib.parse
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

DIRECTORY_NAME = "runs"
BLOCK_BYTES = 4_096
PIECE_BYTES_MAX = 65_536
"""Largest piece that is read at once."""
PENDING_BYTES_MAX = 262_144
"""Output of one run that may wait for the disk."""
SLACK = 65_536
_HEADER = struct.Struct("<8sQQQ")
_MAGIC = b"runout1\n"

_log = logging.getLogger(__name__)


class LaunchKey(NamedTuple):
    """The fencing token of a run."""

    job_id: str
    scheduled_at_ms: int
    attempt: int

    @property
    def token(self) -> str:
        """As runs are told it."""
        return f"{self.job_id}/{self.scheduled_at_ms}/{self.attempt}"

    @property
    def file_name(self) -> str:
        """Name of the output's file."""
        return f"{urllib.parse.quote(self.job_id, safe='')}@{self.scheduled_at_ms}@{self.attempt}"

    @classmethod
    def of_file_name(cls, name: str) -> LaunchKey | None:
        """The other way round; None for a file of something else."""
        job_id, *numbers = name.split("@")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            return None
        return cls(urllib.parse.unquote(job_id), int(numbers[0]), int(numbers[1]))


class Piece(NamedTuple):
    """A piece of what a run printed; `offset_bytes` counts from the beginning of the output."""

    offset_bytes: int
    data: bytes


class OutputFile:
    """The file of one run. Blocks on the disk."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._head = bytes_max // 2
        self._ring = bytes_max - self._head + SLACK
        self._total = 0
        self._file: BinaryIO | None = None

    def append(self, data: bytes) -> int:
        """Adds to the output; the size of the file. Raises OSError."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w+b", buffering=0)
        for start in range(0, len(data), SLACK):
            self._append(self._file, memoryview(data)[start : start + SLACK])
        return _HEADER.size + min(self._total, self._head + self._ring)

    def close(self) -> None:
        """Nothing more comes."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, file: BinaryIO, data: memoryview) -> None:
        total = self._total + len(data)
        header = _HEADER.pack(_MAGIC, self._head, self._ring, total)
        if self._total == 0 and len(data) <= self._head:
            _write_at(file, 0, header + data)
        else:
            offset = self._total
            while data:
                if offset < self._head:
                    place, room = offset, self._head - offset
                else:
                    in_ring = (offset - self._head) % self._ring
                    place, room = self._head + in_ring, self._ring - in_ring
                _write_at(file, _HEADER.size + place, data[:room])
                offset += min(room, len(data))
                data = data[room:]
            _write_at(file, 0, header)
        self._total = total


def _write_at(file: BinaryIO, place: int, data: bytes | memoryview) -> None:
    file.seek(place)
    while data:
        written = file.write(data)
        data = data[written:]


def read_output(path: Path, offset: int, bytes_max: int = PIECE_BYTES_MAX) -> Piece | None:
    """The first piece that is kept at or after an offset; None when nothing is. Blocks. Raises OSError."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        magic, head, ring, total = _HEADER.unpack(header)
        if magic != _MAGIC or ring <= SLACK:
            return None
        if offset >= min(head, total):
            offset = max(offset, head, total - (ring - SLACK))
            place = (offset - head) % ring
            end = min(total, offset + ring - place)
            place += head
        else:
            place, end = offset, min(head, total)
        if offset >= end:
            return None
        file.seek(_HEADER.size + place)
        data = file.read(min(end - offset, bytes_max))
        return Piece(offset, data) if data else None


class RunOutput:
    """The output of one run, from its order on. Belongs to the event loop's thread."""

    def __init__(self, outputs: LaunchOutputs, key: LaunchKey, tail_bytes_max: int) -> None:
        self.key = key
        self.has_ended = False
        self.on_full: Callable[[bool], None] = lambda is_full: None
        """Called with True when the disk does not keep up, with False when it does again."""
        self._outputs = outputs
        self._file: OutputFile | None = None
        self._tail_bytes_max = tail_bytes_max
        self._tail = bytearray()
        self._pending = bytearray()
        self._is_writing = False
        self._is_full = False
        self._is_broken = False
        self._changed = asyncio.Event()

    @property
    def tail(self) -> bytes:
        """The last bytes."""
        return bytes(self._tail)

    @property
    def changed(self) -> asyncio.Event:
        """Set with the next change: of what is on disk, or that it has ended."""
        return self._changed

    def feed(self, data: bytes) -> None:
        """The run printed something."""
        self._tail += data
        del self._tail[: max(0, len(self._tail) - self._tail_bytes_max)]
        if self._is_broken or self.has_ended:
            return
        self._pending += data
        if not self._is_writing:
            self._write()
        elif len(self._pending) >= PENDING_BYTES_MAX and not self._is_full:
            self._is_full = True
            self.on_full(True)

    def end(self) -> None:
        """The run has ended, or will never begin."""
        self.has_ended = True
        if not self._is_writing:
            self._close()

    def _write(self) -> None:
        data, self._pending = bytes(self._pending), bytearray()
        self._is_writing = True
        file = self._file = self._file or self._outputs.new_file(self.key)
        self._outputs.perform(lambda: file.append(data), self._on_written)

    def _on_written(self, size: int | None, error: Exception | None) -> None:
        self._is_writing = False
        if error is not None:
            self._is_broken = True
            self._pending.clear()
            _log.warning("the output of launch %s is not kept any further: %s", self.key.token, error)
        else:
            assert size is not None
            self._outputs.account(self.key, size)
        if self._pending:
            self._write()
        elif self.has_ended:
            self._close()
        if self._is_full and len(self._pending) < PENDING_BYTES_MAX:
            self._is_full = False
            self.on_full(False)
        self._tell()

    def _close(self) -> None:
        if self._file is not None:
            self._outputs.perform(self._file.close, lambda result, error: None)
        self._outputs.forget_live(self.key)
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class LaunchOutputs:
    """The outputs of one worker's runs. Belongs to the event loop's thread; the disk is worked on in one other."""

    def __init__(self, directory: Path, *, run_bytes_max: int, all_bytes_max: int, tail_bytes_max: int) -> None:
        self._directory = directory / DIRECTORY_NAME
        self._run_bytes_max = run_bytes_max
        self._all_bytes_max = all_bytes_max
        self._tail_bytes_max = tail_bytes_max
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="launch-output")
        self._jobs: set[asyncio.Future[object]] = set()
        self._sizes: OrderedDict[LaunchKey, int] = OrderedDict()
        """What each file takes, the oldest first."""
        self._attempts: dict[tuple[str, int], set[int]] = {}
        self._bytes = 0
        self._live: dict[LaunchKey, RunOutput] = {}
        self._is_closed = False

    @property
    def bytes_kept(self) -> int:
        """What all files take together."""
        return self._bytes

    async def start(self) -> None:
        """Looks what earlier agents left. Raises OSError."""
        found = await asyncio.get_running_loop().run_in_executor(self._pool, _scan, self._directory)
        for key, size in found:
            self.account(key, size)

    def begin(self, key: LaunchKey) -> RunOutput:
        """A run's order has come; `end` is called in the end."""
        output = self._live[key] = RunOutput(self, key, self._tail_bytes_max)
        return output

    def attempts(self, job_id: str, scheduled_at_ms: int) -> set[int]:
        """The attempts of a launch of which there is output, or may be."""
        live = {key.attempt for key in self._live if key[:2] == (job_id, scheduled_at_ms)}
        return live | self._attempts.get((job_id, scheduled_at_ms), set())

    async def read(self, key: LaunchKey, offset: int, *, follow: bool) -> AsyncGenerator[Piece, None]:
        """What is kept from an offset on; with `follow` until the run has ended. Raises OSError."""
        path = self._directory / key.file_name
        while not self._is_closed:
            live = self._live.get(key)
            changed = live.changed if live is not None else None  # Before the file is read: nothing may come between.
            piece = await asyncio.get_running_loop().run_in_executor(self._pool, read_output, path, offset)
            if piece is not None:
                yield piece
                offset = piece.offset_bytes + len(piece.data)
            elif live is None or changed is None or not (follow or live.has_ended):
                return
            else:
                await changed.wait()

    async def close(self) -> None:
        """Writes what waits."""
        while self._jobs:
            await asyncio.wait(self._jobs)
        self._is_closed = True
        self._pool.shutdown(wait=False)

    # For RunOutput

    def new_file(self, key: LaunchKey) -> OutputFile:
        """The file of a run, which is made with its first byte."""
        return OutputFile(self._directory / key.file_name, self._run_bytes_max)

    def perform(self, work: Callable[[], object], done: Callable[..., None]) -> None:
        """Does something in the disk's thread; `done` hears the result or the error on the loop."""
        future: asyncio.Future[object] = asyncio.get_running_loop().run_in_executor(self._pool, work)
        self._jobs.add(future)

        def finish(future: asyncio.Future[object]) -> None:
            self._jobs.discard(future)
            if not future.cancelled():
                error = future.exception()
                done(None if error is not None else future.result(), error)

        future.add_done_callback(finish)

    def account(self, key: LaunchKey, size: int) -> None:
        """A file has this size now; over the bound the oldest of ended runs go."""
        taken = -(-size // BLOCK_BYTES) * BLOCK_BYTES
        self._bytes += taken - self._sizes.get(key, 0)
        self._sizes[key] = taken
        self._attempts.setdefault(key[:2], set()).add(key.attempt)
        if self._bytes <= self._all_bytes_max:
            return
        for oldest in list(self._sizes):
            if self._bytes <= self._all_bytes_max:
                break
            if oldest not in self._live:
                self._drop(oldest)

    def forget_live(self, key: LaunchKey) -> None:
        """Nothing more comes of a run."""
        self._live.pop(key, None)

    def _drop(self, key: LaunchKey) -> None:
        self._bytes -= self._sizes.pop(key)
        attempts = self._attempts[key[:2]]
        attempts.discard(key.attempt)
        if not attempts:
            del self._attempts[key[:2]]
        path = self._directory / key.file_name
        self.perform(lambda: path.unlink(missing_ok=True), _log_failure)


def _log_failure(result: object, error: Exception | None) -> None:
    if error is not None:
        _log.warning("an old output could not be removed: %s", error)


def _scan(directory: Path) -> list[tuple[LaunchKey, int]]:
    """The files of earlier agents, the oldest first."""
    found = []
    with suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            key = LaunchKey.of_file_name(entry.name)
            if key is not None:
                status = entry.stat()
                found.append((status.st_mtime_ns, key, status.st_size))
    return [(key, size) for _, key, size in sorted(found)]
