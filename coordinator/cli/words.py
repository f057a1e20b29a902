"""Figures in the words that people use: ages, durations, times, sizes, hashes, shares. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from google.protobuf.descriptor import EnumDescriptor

NOTHING = "-"
"""Stands in a table where there is nothing to show, so that columns can be counted by scripts and eyes."""

_STEPS_S = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def duration(seconds: float) -> str:
    """A duration with its two largest units: "3d4h", "12m5s", "4.2s", "850ms"."""
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds < 1:
        return f"{round(seconds * 1_000)}ms"
    if seconds < 10:
        return f"{seconds:.1f}s"
    rest = int(seconds)
    parts: list[str] = []
    for unit, size_s in _STEPS_S:
        count, rest = divmod(rest, size_s)
        if count or parts:
            parts.append(f"{count}{unit}" if count else "")
        if len(parts) == 2:
            break
    return "".join(parts)


def age(since_unix_ms: int, now_unix_ms: int) -> str:
    """How long ago something was; "-" for never."""
    if since_unix_ms == 0:
        return NOTHING
    return duration(max(0, now_unix_ms - since_unix_ms) / 1_000)


def ahead(at_unix_ms: int, now_unix_ms: int) -> str:
    """How far ahead a time is: "in 4m5s", "now" when it has come."""
    left_s = (at_unix_ms - now_unix_ms) / 1_000
    return f"in {duration(left_s)}" if left_s >= 1 else "now"


def local_time(at_unix_ms: int, zone: datetime.tzinfo | None = None) -> str:
    """A time in the local zone (or in `zone`) with its offset from UTC; "-" for never."""
    if at_unix_ms == 0:
        return NOTHING
    moment = datetime.datetime.fromtimestamp(at_unix_ms / 1_000, datetime.UTC).astimezone(zone)
    return moment.isoformat(sep=" ", timespec="seconds")


def hash_text(value: int) -> str:
    """A key hash as 16 hexadecimal digits; 0 as the end of the last range is not for this function."""
    return f"{value:016x}"


def range_text(lo: int, hi: int) -> str:
    """A range of key hashes with both ends inside: "0000000000000000..00ffffffffffffff"."""
    return f"{hash_text(lo)}..{hash_text((hi or 1 << 64) - 1)}"


def share(lo: int, hi: int) -> float:
    """Share of the key space that a range covers, 0 to 1."""
    return float(((hi or 1 << 64) - lo) / (1 << 64))


def percent(part: float) -> str:
    """A share of 0 to 1 as a percentage with two digits that count: "0.39%", "12.5%", "100%"."""
    value = part * 100
    return f"{value:.2f}%" if value < 10 else f"{value:.1f}%" if value < 99.95 else f"{value:.0f}%"


def size(byte_count: float) -> str:
    """A size with a binary unit: "512 B", "1.5 KiB", "20 MiB"."""
    value = float(byte_count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1_024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1_024
    return f"{value:.1f} TiB"


def names(ids: Sequence[str]) -> str:
    """Names with commas between them; "-" for none."""
    return ", ".join(ids) or NOTHING


def enum_name(descriptor: EnumDescriptor, number: int) -> str:
    """The short lower-case name of an enum's value: NODE_STATE_ACTIVE is "active"; an unknown number stays one."""
    value = descriptor.values_by_number.get(number)
    if value is None:
        return str(number)
    # Every value starts with the name of its enum and an underscore; the zero value is ..._UNSPECIFIED.
    zero = descriptor.values_by_number[0].name
    return value.name.removeprefix(zero.removesuffix("UNSPECIFIED")).lower()


def word(descriptor: EnumDescriptor, number: int) -> str:
    """`enum_name` for tables and sentences: "timed out"."""
    return enum_name(descriptor, number).replace("_", " ")
