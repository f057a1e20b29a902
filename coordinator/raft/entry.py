"""What a log entry's bytes mean.

One byte of type, then for type 0 (a command) 8 bytes of unix milliseconds, big-endian, and a serialized Command. Type 1
is the entry that a new leader appends. PySyncObj's other types carry pickles; they are neither taken nor applied.
"""

from __future__ import annotations

import struct

from coordinator.model import WallMs

NO_OP = b"\x01"
"""A whole entry: what a new leader appends, to commit what older terms left."""
_COMMAND = b"\x00"
_STAMP = struct.Struct(">Q")
_STAMPED_BYTES = 1 + _STAMP.size


def stamp(payload: bytes, time_ms: WallMs) -> bytes:
    """The entry for a serialized command."""
    return _COMMAND + _STAMP.pack(time_ms) + payload


def is_command(entry: bytes, command_bytes_max: int) -> bool:
    """True for an entry with a command of a size that is allowed; the command itself is the machine's matter."""
    size = len(entry) - _STAMPED_BYTES
    return entry[:1] == _COMMAND and 0 <= size <= command_bytes_max


def payload_of(entry: bytes) -> bytes:
    """The serialized command of an entry for which `is_command` holds."""
    return entry[_STAMPED_BYTES:]


def time_of(entry: bytes) -> WallMs:
    """The stamp of an entry for which `is_command` holds."""
    return WallMs(_STAMP.unpack_from(entry, 1)[0])
