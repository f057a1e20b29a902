"""Protobuf messages as plain values for `-o json` and `-o yaml`: the form that scripts rely on.

Keys are the field names of the .proto files. Every field is there, also when it has its default, except messages and
`optional` fields that are absent. Integers are numbers, 64-bit ones too; enums are their short lower-case names
("active"); bytes are text. New fields may appear with new versions; none is renamed or removed within v1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from coordinator.cli.words import enum_name

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


def to_plain(message: Message) -> dict[str, Plain]:
    """The message's fields by name, in the order of the .proto file."""
    result: dict[str, Plain] = {}
    for field in cast("Sequence[FieldDescriptor]", message.DESCRIPTOR.fields):
        value = getattr(message, field.name)
        if _is_map(field):
            entry = field.message_type
            assert entry is not None
            of_value = entry.fields_by_name["value"]
            result[field.name] = {str(key): _single(of_value, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            result[field.name] = [_single(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            result[field.name] = _single(field, value)
    return result


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _single(field: FieldDescriptor, value: object) -> Plain:
    if isinstance(value, Message):
        return to_plain(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if field.enum_type is not None and isinstance(value, int):
        return enum_name(field.enum_type, value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{field.full_name} has a value of {type(value).__name__}, which no output format knows")
