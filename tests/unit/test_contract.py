"""The contract in proto/ explains itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROTO = Path(__file__).resolve().parents[2] / "proto" / "coordinator" / "api" / "v1"
NEEDS_A_COMMENT = re.compile(r"(message|enum|service|rpc|oneof) |[A-Z][A-Z0-9_]* = \d+;|(\w|[.<>, ])+ \w+ = \d+;")


@pytest.mark.parametrize("path", sorted(PROTO.glob("*.proto")), ids=lambda path: path.stem)
def test_everything_has_a_comment(path: Path) -> None:
    """Shows that each message, field, value, service and call is explained in the line above it."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    bare = [
        f"{path.name}:{number}: {line}"
        for number, (before, line) in enumerate(zip(["", *lines], lines, strict=False), 1)
        if NEEDS_A_COMMENT.match(line) and not before.startswith("//")
    ]
    assert bare == []
