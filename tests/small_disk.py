"""Small disks for tests of what happens when one is full."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DISK_BYTES = 8 << 20


@contextmanager
def small_disk(directory: Path, size_bytes: int = DISK_BYTES) -> Iterator[None]:
    """A disk of this size at this place; skips the test where the system does not allow that."""
    with small_disk_or_none(directory, size_bytes) as problem:
        if problem:
            pytest.skip(problem)
        yield


@contextmanager
def small_disk_or_none(directory: Path, size_bytes: int = DISK_BYTES) -> Iterator[str]:
    """The same; where the system does not allow that there is a mere directory, and why."""
    directory.mkdir(parents=True)
    problem = _mount(directory, size_bytes)
    try:
        yield problem
    finally:
        if not problem:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


def _mount(directory: Path, size_bytes: int) -> str:
    """Why not; empty when it is mounted."""
    if sys.platform == "win32" or shutil.which("mount") is None:
        return "needs a system with `mount`"
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    return f"may not mount a tmpfs: {mounted.stderr.strip()}" if mounted.returncode != 0 else ""


def fill(directory: Path) -> Path:
    """Takes all room but a few pages, or all of it where others write meanwhile; the file that does."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while shutil.disk_usage(directory).free > 16 << 10:
            try:
                file.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                break
    return ballast
