"""Which launches this worker has started, on disk: so that none starts twice, and no result is lost.

One file of JSON lines. A line is written and synced *before* the process of a launch starts, and another one before its
result is reported; so after a crash the file knows every token that may have started. What a line means:

    {"token": T, "run": R}                 the token starts now, as run R
    {"token": T, "report": BASE64}         it ended; a serialized LaunchReport
    {"token": T, "receipted": true}        the leader has committed or refused the result

A last line that a crash cut short is dropped: what it announced had not happened yet. Any other line that cannot be
read stops the agent (Damaged): starting something twice is worse. The file is rewritten when it has grown to several
times TOKENS_KEPT; what is dropped are the oldest launches that have ended and were receipted.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from coordinator.api.v1 import session_pb2
from coordinator.model.errors import Damaged

FILE_NAME = "launches.jsonl"
TOKENS_KEPT = 2_000
"""A leader orders a launch again only while it is not confirmed, so a few seconds of launches would do."""
REPORTS_KEPT = 1_000
"""Results without a receipt: beyond this the oldest are given up, and the leader calls those launches lost."""
LINES_MAX = 4 * TOKENS_KEPT


@dataclass(slots=True)
class Entry:
    """One token. A token without a report was running, or was ended by its agent."""

    token: str
    run: str
    report: session_pb2.LaunchReport | None = None
    receipted: bool = False


class LaunchJournal:
    """The file and what it says. Methods may block on the disk; they may be called from several threads."""

    def __init__(self, directory: Path) -> None:
        """Reads the file, or begins one. Raises Damaged, and OSError where the directory cannot be used."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE_NAME
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        if self._path.exists():
            self._read()
        self._lines = 0
        self._file: BinaryIO = self._rewrite()

    def get(self, token: str) -> Entry | None:
        """What is known of a token; None when it never started here."""
        return self._entries.get(token)

    def unfinished(self) -> list[Entry]:
        """Tokens that started and have no result, the oldest first."""
        return [entry for entry in self._entries.values() if entry.report is None]

    def unreceipted(self) -> list[session_pb2.LaunchReport]:
        """Results that the leader has not answered, the oldest first."""
        return [entry.report for entry in self._entries.values() if entry.report is not None and not entry.receipted]

    def begin(self, token: str, run: str) -> None:
        """Notes that the token starts; returns once that is on disk."""
        with self._lock:
            self._entries[token] = Entry(token, run)
            self._append({"token": token, "run": run}, sync=True)

    def finish(self, token: str, report: session_pb2.LaunchReport) -> None:
        """Notes the result; returns once that is on disk."""
        with self._lock:
            self._entries[token].report = report
            encoded = base64.b64encode(report.SerializeToString()).decode("ascii")
            self._append({"token": token, "report": encoded}, sync=True)

    def receipt(self, token: str) -> None:
        """Notes that the result need not be reported again. Not synced: to report once more does no harm."""
        with self._lock:
            entry = self._entries.get(token)
            if entry is not None and not entry.receipted and not self._file.closed:
                entry.receipted = True
                self._append({"token": token, "receipted": True}, sync=False)

    def close(self) -> None:
        """Closes the file; nothing may be noted afterwards."""
        with self._lock:
            self._file.close()

    def _read(self) -> None:
        lines = self._path.read_bytes().split(b"\n")
        complete, _torn = lines[:-1], lines[-1]
        for number, line in enumerate(complete, start=1):
            try:
                record = json.loads(line)
                token = record["token"]
                if "run" in record:
                    self._entries[token] = Entry(token, record["run"])
                elif "report" in record:
                    report = session_pb2.LaunchReport.FromString(base64.b64decode(record["report"], validate=True))
                    self._entries[token].report = report
                else:
                    self._entries[token].receipted = bool(record["receipted"])
            except (ValueError, KeyError, TypeError, DecodeError, binascii.Error):
                raise Damaged(
                    f"{self._path}, line {number}, cannot be read; the disk may be failing. Move the file away"
                    " only when it is no matter that launches of the last minutes might start a second time"
                ) from None

    def _append(self, record: dict[str, object], *, sync: bool) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")).encode("utf-8") + b"\n")
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())
        self._lines += 1
        if self._lines > LINES_MAX:
            self._file.close()
            self._file = self._rewrite()

    def _rewrite(self) -> BinaryIO:
        """Writes what is worth keeping to a new file that takes the old one's place, and opens it for more."""
        self._prune()
        temporary = self._path.with_suffix(".new")
        with temporary.open("wb") as file:
            self._lines = 0
            for entry in self._entries.values():
                for record in _records(entry):
                    file.write(json.dumps(record, separators=(",", ":")).encode("utf-8") + b"\n")
                    self._lines += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        _sync_directory(self._path.parent)
        return self._path.open("ab")

    def _prune(self) -> None:
        waiting = [entry for entry in self._entries.values() if entry.report is not None and not entry.receipted]
        for entry in waiting[: max(0, len(waiting) - REPORTS_KEPT)]:
            entry.receipted = True
        settled = [entry.token for entry in self._entries.values() if entry.receipted]
        for token in settled[: max(0, len(self._entries) - TOKENS_KEPT)]:
            del self._entries[token]


def _records(entry: Entry) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [{"token": entry.token, "run": entry.run}]
    if entry.report is not None:
        encoded = base64.b64encode(entry.report.SerializeToString()).decode("ascii")
        records.append({"token": entry.token, "report": encoded})
    if entry.receipted:
        records.append({"token": entry.token, "receipted": True})
    return records


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable, where directories can be synced at all (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
