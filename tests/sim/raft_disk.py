"""A disk in memory under the real journal, vote file and snapshot store; what was not synced may be lost or torn.

What a file holds is told apart from what of it is durable, and so are a directory's names. `fsync` makes a file's
bytes durable, `fsync` of the directory its names: nothing else does. A process that is killed loses nothing; a power
cut keeps, of what was done since the last sync, a random first part in the order in which it was done, per file and
for the names. The last write that survives may be torn: cut anywhere, or with a sector in it that was never written.

`installed` puts the disk in the place of `os` in journal.py, segment.py and files.py, which talk to it; files and
directories are `DiskPath`, which has of `pathlib.Path` what the code under test uses.
"""

from __future__ import annotations

import errno
import fnmatch
import os as real_os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from coordinator.raft import files, journal, segment

SECTOR_BYTES = 512


class Ended(BaseException):
    """The process ends between two steps of the disk, by a kill or a power cut. No `except Exception` may hold it."""


@dataclass(slots=True, eq=False)
class DiskFile:
    """The bytes of one file. `undone` is what was done since the last sync: (offset, bytes), or (size, None) a cut."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    undone: list[tuple[int, bytes | None]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        """Writes in place or behind the end."""
        _put(self.content, offset, data)
        self.undone.append((offset, data))

    def cut(self, size: int) -> None:
        """Shortens the file, as `ftruncate` does."""
        if size < len(self.content):
            del self.content[size:]
            self.undone.append((size, None))

    def sync(self) -> None:
        """Makes the bytes durable: those that the system knows to be missing on the disk."""
        durable = bytearray(self.durable)
        for offset, data in self.undone:
            _do(durable, offset, data)
        self.durable = bytes(durable)
        self.undone.clear()

    def fail_sync(self) -> None:
        """A sync that fails: the system shows the bytes still, and has forgotten that the disk lacks them."""
        self.undone.clear()

    def lose_power(self, rng: random.Random) -> None:
        """Leaves what a power cut may leave."""
        kept = rng.choice((0, len(self.undone), rng.randint(0, len(self.undone))))
        content = bytearray(self.durable)
        for offset, data in self.undone[:kept]:
            _do(content, offset, data)
        if kept < len(self.undone) and rng.random() < 0.5:
            offset, data = self.undone[kept]
            if data is not None:
                _tear(content, offset, data, rng)
        self.content, self.durable = content, bytes(content)
        self.undone.clear()


def _put(content: bytearray, offset: int, data: bytes) -> None:
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(data)] = data


def _do(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
    else:
        _put(content, offset, data)


def _tear(content: bytearray, offset: int, data: bytes, rng: random.Random) -> None:
    """A write of which some sectors came to the disk, or with a size that did not."""
    if rng.random() < 0.5:
        _put(content, offset, data[: rng.randint(0, len(data))])
        return
    before = bytes(content)
    _put(content, offset, data)
    sectors = range(offset // SECTOR_BYTES, (offset + len(data) - 1) // SECTOR_BYTES + 1)
    for sector in rng.sample(sectors, rng.randint(1, len(sectors))):
        start, end = sector * SECTOR_BYTES, min((sector + 1) * SECTOR_BYTES, len(content))
        content[start:end] = before[start:end].ljust(end - start, b"\0")


class Disk:
    """One master's data directory."""

    def __init__(self, rng: random.Random) -> None:
        self.names: dict[str, DiskFile] = {}
        self.is_full = False
        self.fails_next_sync = False
        """The next sync of a file ends with an error, and takes what it was to make durable (LWN 752063)."""
        self.steps_left: int | None = None
        """After so many more steps the process ends in the middle of what it does."""
        self.is_burnt = False
        """The process has ended, though it may still unwind: the disk does nothing more for it."""
        self.lies_about: tuple[str, ...] = ()
        """Name patterns whose sync does nothing, for tests of what the sync is for; "/" is the directory."""
        self.on_sync: Callable[[], None] = lambda: None
        self._durable_names: dict[str, DiskFile] = {}
        self._undone_names: list[Callable[[dict[str, DiskFile]], None]] = []
        self._rng = rng

    @property
    def path(self) -> Path:
        """The directory."""
        return cast("Path", DiskPath(self, ""))

    def step(self, *, needs_room: bool) -> None:
        """One thing that the disk is asked to do; may end the process, or find the disk full."""
        if self.steps_left is not None:
            self.steps_left -= 1
            self.is_burnt |= self.steps_left < 0
        if self.is_burnt:
            raise Ended
        if needs_room and self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def rename(self, change: Callable[[dict[str, DiskFile]], None]) -> None:
        """Makes, moves or removes a name."""
        change(self.names)
        self._undone_names.append(change)

    def sync_file(self, file: DiskFile) -> None:
        """What `fsync` of a file does."""
        self.step(needs_room=True)
        self.on_sync()
        if self.fails_next_sync:
            self.fails_next_sync = False
            file.fail_sync()
            raise OSError(errno.EIO, "Input/output error")
        names = [name for name, found in self.names.items() if found is file]
        if not any(fnmatch.fnmatch(name, pattern) for name in names for pattern in self.lies_about):
            file.sync()

    def sync_names(self) -> None:
        """What `fsync` of the directory does."""
        self.step(needs_room=True)
        self.on_sync()
        if "/" not in self.lies_about:
            self._durable_names = dict(self.names)
            self._undone_names.clear()

    def lose_power(self) -> None:
        """Leaves what a power cut may leave; of the names too."""
        undone = self._undone_names
        for change in undone[: self._rng.choice((0, len(undone), self._rng.randint(0, len(undone))))]:
            change(self._durable_names)
        undone.clear()
        self.names = dict(self._durable_names)
        for name in sorted(self.names):
            self.names[name].lose_power(self._rng)


class DiskPath:
    """A name in a disk's only directory, or with an empty name the directory itself."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.disk = disk
        self.name = name

    def __truediv__(self, name: str) -> DiskPath:
        return DiskPath(self.disk, name)

    def __lt__(self, other: DiskPath) -> bool:
        return self.name < other.name

    def __str__(self) -> str:
        return f"disk/{self.name}"

    @property
    def parent(self) -> DiskPath:
        return DiskPath(self.disk, "")

    def with_name(self, name: str) -> DiskPath:
        return DiskPath(self.disk, name)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """The only directory is there."""

    def exists(self) -> bool:
        return self.name in self.disk.names

    def glob(self, pattern: str) -> list[DiskPath]:
        return [self / name for name in sorted(self.disk.names) if fnmatch.fnmatch(name, pattern)]

    def file(self) -> DiskFile:
        """The file of this name."""
        try:
            return self.disk.names[self.name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file", str(self)) from None

    def make(self, *, is_new: bool) -> DiskFile:
        """The file of this name, made if there is none; with `is_new` without what it held."""
        self.disk.step(needs_room=True)
        file = self.disk.names.get(self.name)
        if file is None:
            made = DiskFile()
            self.disk.rename(lambda names: names.update({self.name: made}))
            return made
        if is_new:
            file.cut(0)
        return file

    def read_bytes(self) -> bytes:
        return bytes(self.file().content)

    def stat(self) -> real_os.stat_result:
        return real_os.stat_result((0o600, 0, 0, 1, 0, 0, len(self.file().content), 0, 0, 0))

    def unlink(self, missing_ok: bool = False) -> None:
        if missing_ok and not self.exists():
            return
        self.file()
        self.disk.step(needs_room=False)

        def remove(names: dict[str, DiskFile]) -> None:
            names.pop(self.name, None)

        self.disk.rename(remove)

    def replace(self, target: DiskPath) -> None:
        file = self.file()
        self.disk.step(needs_room=False)

        def move(names: dict[str, DiskFile]) -> None:
            names.pop(self.name, None)
            names[target.name] = file

        self.disk.rename(move)

    rename = replace

    def open(self, mode: str) -> _Handle:
        return _Handle(self.disk, self.file() if "r" in mode else self.make(is_new=True))


class _Handle:
    """An open file: what `Path.open` gives, and what stands behind a descriptor. Without a file: the directory."""

    descriptors: dict[int, _Handle] = {}  # noqa: RUF012 - one table for all, as the process has it
    _last = 1_000

    def __init__(self, disk: Disk, file: DiskFile | None) -> None:
        self.disk = disk
        self.file = file
        self.position = 0
        _Handle._last += 1
        self._number = _Handle._last
        self.descriptors[self._number] = self

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def fileno(self) -> int:
        return self._number

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.descriptors.pop(self._number, None)

    def read(self, size: int) -> bytes:
        assert self.file is not None
        data = bytes(self.file.content[self.position : self.position + size])
        self.position += len(data)
        return data

    def write(self, data: Any) -> int:
        assert self.file is not None
        self.disk.step(needs_room=True)
        self.file.write(self.position, bytes(data))
        self.position += len(data)
        return len(data)


class _DiskOs:
    """What journal.py uses of `os`."""

    name = real_os.name
    O_RDONLY, O_WRONLY, O_RDWR = real_os.O_RDONLY, real_os.O_WRONLY, real_os.O_RDWR
    O_CREAT, O_TRUNC = real_os.O_CREAT, real_os.O_TRUNC
    SEEK_SET = real_os.SEEK_SET

    @staticmethod
    def open(path: DiskPath, flags: int, mode: int = 0o600) -> int:
        if not path.name:
            return _Handle(path.disk, None).fileno()
        file = path.make(is_new=bool(flags & real_os.O_TRUNC)) if flags & real_os.O_CREAT else path.file()
        return _Handle(path.disk, file).fileno()

    @staticmethod
    def write(descriptor: int, data: memoryview) -> int:
        return _Handle.descriptors[descriptor].write(data)

    @staticmethod
    def ftruncate(descriptor: int, size: int) -> None:
        handle = _Handle.descriptors[descriptor]
        assert handle.file is not None
        handle.disk.step(needs_room=False)
        handle.file.cut(size)

    @staticmethod
    def lseek(descriptor: int, position: int, whence: int) -> None:
        _Handle.descriptors[descriptor].position = position

    @staticmethod
    def fsync(descriptor: int) -> None:
        handle = _Handle.descriptors[descriptor]
        if handle.file is None:
            handle.disk.sync_names()
        else:
            handle.disk.sync_file(handle.file)

    @staticmethod
    def close(descriptor: int) -> None:
        _Handle.descriptors.pop(descriptor, None)


@contextmanager
def installed() -> Iterator[None]:
    """While the block runs, journal.py, segment.py and files.py talk to disks of this module."""
    log, small, parts = cast("Any", journal), cast("Any", files), cast("Any", segment)
    real = log.os, log._fdatasync, small.os, parts.os
    log.os, log._fdatasync, small.os, parts.os = _DiskOs, _DiskOs.fsync, _DiskOs, _DiskOs
    try:
        yield
    finally:
        log.os, log._fdatasync, small.os, parts.os = real
        _Handle.descriptors.clear()
