"""Rules of single fields: ranges, choices, and the form of ids. The other rules build on them."""

from __future__ import annotations

import re

from coordinator.configuration.findings import Findings, number, or_list
from coordinator.configuration.limits import CHOICES, RANGES, key_of
from coordinator.configuration.toml_lines import Path

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
ID_FORM = "1 to 63 letters, digits, dots, hyphens and underscores, a letter or digit first"
_PYTHON_NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
PYTHON_PATTERN = re.compile(rf"{_PYTHON_NAME}:{_PYTHON_NAME}", re.ASCII)
"""package.module:name"""


def check_id(value: str) -> str | None:
    """What is wrong with the id of a master, worker or job; None when it can be used."""
    return None if ID_PATTERN.fullmatch(value) else f"use {ID_FORM}"


def check_fields(findings: Findings, path: Path, settings: object, like: object | None = None) -> None:
    """Ranges and choices of one settings object; fields as in `like` were checked there."""
    for name, limits in RANGES.get(type(settings), {}).items():
        value, place = getattr(settings, name), (*path, key_of(name))
        if not findings.is_sound(place) or (like is not None and value == getattr(like, name)):
            continue
        if not limits.minimum <= value <= limits.maximum:
            fault = "too small" if value < limits.minimum else "too large"
            span = f"{number(limits.minimum)} to {number(limits.maximum)}"
            findings.refuse(place, f"{findings.named(place, value)} is {fault}; use {span} {limits.unit}".rstrip())
    for name, choices in CHOICES.get(type(settings), {}).items():
        value, place = getattr(settings, name), (*path, name)
        if findings.is_sound(place) and value not in choices:
            findings.refuse(place, f"{findings.named(place, value)} is not known; use {or_list(list(choices))}")
