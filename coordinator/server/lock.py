"""One daemon per data directory.

The lock is the operating system's lock on the file `lock` inside the directory, so it ends with the process, however
that dies; the file itself stays and tells people which process holds it. Used by masters and workers.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from coordinator.model.errors import DefiniteError

FILE_NAME = "lock"
_LOCKED_BYTE_OFFSET = 1 << 30
"""Windows locks bytes, and a locked byte cannot be read by others; this one lies far behind the text."""


class DirectoryLocked(DefiniteError):
    """Another daemon uses the data directory."""

    GRPC_STATUS = "FAILED_PRECONDITION"


class DirectoryLock:
    """Makes the directory and locks it; a context manager. Raises DirectoryLocked when another process holds it.

    Raises OSError when the directory cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE_NAME
        self._file: BinaryIO | None = None

    def acquire(self) -> None:
        """Takes the lock without waiting."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not "w": opening must not empty the file of the daemon that holds the lock.
        file = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        try:
            _lock(file)
        except OSError:
            holder = file.read(32).decode("ascii", "replace").strip()
            file.close()
            raise DirectoryLocked(
                f"directory {self._path.parent} is in use by another daemon"
                f"{f' (process {holder})' if holder else ''}; stop that one, or give this one another data_directory"
            ) from None
        self._file = file
        # The lock counts, not the text; a full disk is told by whoever needs more of it than a few bytes.
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode("ascii"))

    def release(self) -> None:
        """Gives the lock back; harmless when it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        file.seek(_LOCKED_BYTE_OFFSET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        file.seek(0)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
