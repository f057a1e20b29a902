"""Small files that survive a power cut. Blocking: call them in a thread."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Replaces the file: afterwards it holds all of `content`, whenever the machine stops it holds the old or the new.

    Raises OSError; the old file is then still whole.
    """
    new_path = path.with_name(path.name + ".new")
    with new_path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new_path, path)
    # The new name is durable only once the directory is; Windows cannot open one, and orders the rename itself.
    if hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def read_if_there(path: Path) -> bytes | None:
    """The file's content, None when there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
