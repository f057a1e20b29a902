"""One file of the log: its format, and what is known of it in memory. journal.py has the rules.

Segment: "FCJRNL" | version u16 | first index u64, then records: crc32 u32 | length u32 | index u64 |
term u64 | command, where the checksum covers all that follows it. All numbers are big-endian.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

SEGMENT_HEADER = struct.Struct(">6sHQ")
RECORD_HEADER = struct.Struct(">IIQQ")
MAGIC = b"FCJRNL"
VERSION = 1
_SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""


def segment_name(first_index: int) -> str:
    """Name of the file that begins with the entry at this index."""
    return f"journal-{first_index:020d}.log"


class Segment:
    """One file of the log; `offsets[i]` is where the record of index `first_index + i` begins."""

    __slots__ = ("first_index", "offsets", "path", "size_bytes")

    def __init__(self, path: Path, first_index: int) -> None:
        self.path = path
        self.first_index = first_index
        self.offsets: list[int] = []
        self.size_bytes = SEGMENT_HEADER.size

    @property
    def end_index(self) -> int:
        """Index after the last record."""
        return self.first_index + len(self.offsets)


def write_all(descriptor: int, data: bytes) -> None:
    """Hands all of it to the operating system, behind where the file stands."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def has_unwritten_sector(data: bytes, start: int, stop: int) -> bool:
    """True when a sector that begins before `stop` is zero, as far as it lies behind `start`."""
    while start < min(stop, len(data)):
        end = min(len(data), start - start % _SECTOR_BYTES + _SECTOR_BYTES)
        if not any(memoryview(data)[start:end]):
            return True
        start = end
    return False


def is_followed(segment: Segment, data: bytes) -> bool:
    """True when a sound record stands behind the unreadable one: then it is damage, no torn write."""
    wanted = (segment.end_index + 1).to_bytes(8, "big")
    found = data.find(wanted, segment.size_bytes + RECORD_HEADER.size)
    while found >= 0:
        start = found - 8
        if start + RECORD_HEADER.size > len(data):
            break
        checksum, length, _, _ = RECORD_HEADER.unpack_from(data, start)
        end = start + RECORD_HEADER.size + length
        if end <= len(data) and zlib.crc32(memoryview(data)[start + 4 : end]) == checksum:
            return True
        found = data.find(wanted, found + 1)
    return False
