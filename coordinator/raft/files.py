"""What the files of a master's data directory have in common: names, and writing so that a power cut does no harm."""

from __future__ import annotations

import os
from pathlib import Path

from coordinator.model.errors import CoordinatorError

SNAPSHOT_NAME = "snapshot"
"""File beside the segments; snapshot.py writes it."""
PREVIOUS_NAME = "snapshot.previous"
"""The one before it."""
ADVICE = (
    "move this master's data directory away, start it empty and run `clusterctl masters replace` for it; where no "
    "majority of the masters is left, make new directories from a backup with `clusterctl restore`"
)
"""What to do about damage."""


SYNC_BYTES = 1 << 20
"""A large file is synced piece by piece: the log's own sync waits for what else is on its way to the disk."""


class DiskFailed(CoordinatorError, OSError):
    """The data directory cannot be read or written: full, failing, or not ours. The master must not go on."""

    GRPC_STATUS = "UNAVAILABLE"

    def __init__(self, directory: Path, error: OSError) -> None:
        super().__init__(
            f"data directory {directory} cannot be used: {error.strerror or error}; what was acknowledged is safe; "
            "make room or mend the disk, then start this master again"
        )


def has_snapshot(directory: Path) -> bool:
    """True when a directory holds a snapshot, whether it is sound or not."""
    return (directory / SNAPSHOT_NAME).exists() or (directory / PREVIOUS_NAME).exists()


def sync_directory(directory: Path) -> None:
    """Makes creations, renames and removals in `directory` durable; Windows does so by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole and waits until its bytes are on disk."""
    with path.open("wb") as file:
        for first in range(0, max(len(data), 1), SYNC_BYTES):
            file.write(data[first : first + SYNC_BYTES])
            file.flush()
            os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a whole file so that after any crash it is the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, data)
    temporary.replace(path)
    sync_directory(path.parent)
