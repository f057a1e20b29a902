"""The vote file: what a master must never forget about elections, in one small file with a checksum.

Term and vote are durable before any message shows them. Beside them stands `log_end`, the mark of journal.py's rule 6.
The file is replaced whole, so after any crash it is the old one or the new one; one that cannot be read was damaged.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from coordinator.model.errors import Damaged
from coordinator.raft.files import ADVICE, has_snapshot, replace_file


class VoteFile:
    """Term and vote of one master, how far its log certainly reaches, and whose they are."""

    def __init__(self, path: Path, owner: str) -> None:
        self._path = path
        self._owner = owner
        self.term = 0
        self.voted_for: str | None = None
        self.log_end = 0
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            if any(path.parent.glob("journal-*.log")) or has_snapshot(path.parent):
                raise Damaged(f"{path}, offset 0: missing beside a log or a snapshot; {ADVICE}") from None
            self.store(0, None, 0)
            return
        try:
            body = json.loads(content)
            checksum = body.pop("crc32")
            self.term, self.voted_for, found = body["term"], body["voted_for"], body["owner"]
            self.log_end = body.get("log_end", 0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Damaged(f"{path}, offset 0: cannot be read as term and vote; {ADVICE}") from None
        if checksum != self._checksum(body):
            raise Damaged(f"{path}, offset 0: the checksum does not match; {ADVICE}")
        if found != owner:
            raise Damaged(f"{path}: this directory belongs to {found}, not to {owner}; give each master its own")

    def store(self, term: int, voted_for: str | None, log_end: int) -> None:
        """Writes all three; durable when it returns."""
        body: dict[str, Any] = {"owner": self._owner, "term": term, "voted_for": voted_for, "log_end": log_end}
        body["crc32"] = self._checksum(body)
        replace_file(self._path, json.dumps(body).encode())
        self.term = term
        self.voted_for = voted_for
        self.log_end = log_end

    @staticmethod
    def _checksum(body: dict[str, Any]) -> int:
        return zlib.crc32(json.dumps(body, sort_keys=True).encode())
