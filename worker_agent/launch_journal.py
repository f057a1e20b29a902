"""Which launches this worker has started, on disk: so that none starts twice, and no result is lost.

One file of JSON lines. A line is written and synced *before* the process of a launch starts, and another one before its
result is reported; so after a crash the file knows every token that may have started. What a line means:

    {"token": T, "run": R}                 the token starts now, as run R
    {"token": T, "report": BASE64}         it ended; a serialized LaunchReport
    {"token": T, "receipted": true}        nothing of it is to be reported: the leader has committed or refused the
                                           result, or there is none, and what ran has ended

What this object says of a token (`get` and the like) is on disk: a change counts from its sync on, so one that could
not be written did not happen. Only a receipt counts at once and is never waited for: to report once more does no harm.

A last line that a crash cut short is dropped: what it announced had not happened yet. Any other line that cannot be
read stops the agent (Damaged): starting something twice is worse. The file is rewritten when it has grown to several
times TOKENS_KEPT, and after a write that failed; what is dropped are the oldest launches that were receipted, and the
output of all that were: the masters have it.

`CommitQueue` is the way in for the event loop: changes that come while the disk is busy share its next sync, so a sync
of 5 ms bounds what a launch waits, not how many of them there are in a second.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, assert_never

from google.protobuf.message import DecodeError

from coordinator.api.v1 import session_pb2
from coordinator.model.errors import Damaged

FILE_NAME = "launches.jsonl"
TOKENS_KEPT = 2_000
"""A leader orders a launch again only while it is not confirmed, so a few seconds of launches would do."""
REPORTS_KEPT = 1_000
"""Results without a receipt: beyond this the oldest are given up, and the leader calls those launches lost."""
LINES_MAX = 4 * TOKENS_KEPT

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Begin:
    """The token starts now."""

    token: str
    run: str


@dataclass(frozen=True, slots=True)
class Finish:
    """It ended."""

    token: str
    report: session_pb2.LaunchReport


@dataclass(frozen=True, slots=True)
class Receipt:
    """Nothing of it is to be reported."""

    token: str


Change = Begin | Finish | Receipt


@dataclass(slots=True)
class Entry:
    """One token. Without a report and a receipt it was running when the agent died."""

    token: str
    run: str
    report: session_pb2.LaunchReport | None = None
    receipted: bool = False


class LaunchJournal:
    """The file and what it says. `write` and what uses it block on the disk; any thread may call."""

    def __init__(self, directory: Path) -> None:
        """Reads the file, or begins one. Raises Damaged, and OSError where the directory cannot be used."""
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / FILE_NAME
        self._disk = threading.Lock()
        """Held while the disk is waited for."""
        self._memory = threading.Lock()
        """Held for moments only: the event loop takes it."""
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._unreceipted: dict[str, session_pb2.LaunchReport] = {}
        if self._path.exists():
            self._read()
        self._lines = 0
        self._is_torn = False
        self._is_closed = False
        self._file: BinaryIO = self._rewrite()

    def get(self, token: str) -> Entry | None:
        """What is known of a token; None when it never started here."""
        with self._memory:
            return self._entries.get(token)

    def attempts(self, job_id: str, scheduled_at_ms: int) -> list[tuple[int, str]]:
        """The attempts of a launch that are known, each with its run."""
        prefix = f"{job_id}/{scheduled_at_ms}/"
        with self._memory:
            found = [(token, entry.run) for token, entry in self._entries.items() if token.startswith(prefix)]
        return [(int(token[len(prefix) :]), run) for token, run in found]

    def unfinished(self) -> list[Entry]:
        """Tokens that started and of which nobody knows that they ended, the oldest first."""
        with self._memory:
            return [entry for entry in self._entries.values() if entry.report is None and not entry.receipted]

    def unreceipted(self) -> list[session_pb2.LaunchReport]:
        """Results that the leader has not answered, the oldest first."""
        with self._memory:
            return list(self._unreceipted.values())

    def begin(self, token: str, run: str) -> None:
        """Notes that the token starts; returns once that is on disk."""
        self.write((Begin(token, run),))

    def finish(self, token: str, report: session_pb2.LaunchReport) -> None:
        """Notes the result; returns once that is on disk."""
        self.write((Finish(token, report),))

    def receipt(self, token: str) -> None:
        """Notes that nothing of the token need be reported."""
        self.write((Receipt(token),))

    def settle(self, token: str) -> bool:
        """Takes a receipt in without writing it; does not block. False when there is nothing to write either."""
        with self._memory:
            entry = self._entries.get(token)
            if entry is None or entry.receipted:
                return False
            self._apply(Receipt(token))
            return True

    def write(self, changes: Sequence[Change]) -> None:
        """Writes changes with one sync, or none where all are receipts. Raises OSError; then none of them happened."""
        lines = b"".join(_line(change) for change in changes)
        with self._disk:
            if self._is_closed:
                raise OSError(f"{self._path} is closed")
            if self._is_torn or self._file.closed:
                self._file = self._rewrite()
            try:
                self._file.write(lines)
                self._file.flush()
                if not all(isinstance(change, Receipt) for change in changes):
                    os.fsync(self._file.fileno())
            except OSError:
                self._is_torn = True  # Nobody knows how much of it is there; the next write begins with a new file.
                raise
            with self._memory:
                for change in changes:
                    self._apply(change)
            self._lines += len(changes)
            if self._lines > LINES_MAX:
                self._file = self._rewrite()

    def close(self) -> None:
        """Closes the file; nothing may be noted afterwards."""
        with self._disk:
            self._is_closed = True
            _close(self._file)

    def _apply(self, change: Change) -> None:
        match change:
            case Begin(token, run):
                self._entries[token] = Entry(token, run)
            case Finish(token, report):
                self._entries[token].report = self._unreceipted[token] = report
            case Receipt(token):
                if (entry := self._entries.get(token)) is not None:
                    entry.receipted = True
                    self._unreceipted.pop(token, None)
                    if entry.report is not None and entry.report.output:
                        entry.report = _without_output(entry.report)
            case _:
                assert_never(change)

    def _read(self) -> None:
        lines = self._path.read_bytes().split(b"\n")
        complete, _torn = lines[:-1], lines[-1]
        for number, line in enumerate(complete, start=1):
            try:
                change = _change(line)
                if not isinstance(change, Begin):
                    self._entries[change.token]  # A result of what never began is damage too.
                self._apply(change)
            except (ValueError, KeyError, TypeError, DecodeError, binascii.Error):
                raise Damaged(
                    f"{self._path}, line {number}, cannot be read; the disk may be failing. Move the file away"
                    " only when it is no matter that launches of the last minutes might start a second time"
                ) from None

    def _rewrite(self) -> BinaryIO:
        """Writes what is worth keeping to a new file that takes the old one's place, and opens it for more."""
        with self._memory:
            self._prune()
            changes = [change for entry in self._entries.values() for change in _changes(entry)]
        temporary = self._path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(b"".join(_line(change) for change in changes))
            file.flush()
            os.fsync(file.fileno())
        if hasattr(self, "_file"):
            _close(self._file)
        temporary.replace(self._path)
        _sync_directory(self._path.parent)
        self._lines = len(changes)
        self._is_torn = False
        return self._path.open("ab")

    def _prune(self) -> None:
        for token in list(self._unreceipted)[: max(0, len(self._unreceipted) - REPORTS_KEPT)]:
            self._apply(Receipt(token))
        settled = [entry.token for entry in self._entries.values() if entry.receipted]
        for token in settled[: max(0, len(self._entries) - TOKENS_KEPT)]:
            del self._entries[token]


class CommitQueue:
    """Brings changes to the journal's disk, in their order, one batch at a time. Belongs to one event loop."""

    def __init__(self, journal: LaunchJournal) -> None:
        self._journal = journal
        # A thread of its own: launches must not wait behind whatever else blocks in the loop's own threads.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="launch-journal")
        self._waiting: list[tuple[tuple[Change, ...], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def commit(self, *changes: Change) -> None:
        """Returns once the changes are on disk. Raises OSError when they are not, and never will be."""
        await self._add(changes)

    def settle(self, token: str) -> None:
        """Takes a receipt in, and has it written with the next batch."""
        if self._journal.settle(token):
            self._add((Receipt(token),)).add_done_callback(_log_failure)

    async def close(self) -> None:
        """Writes what waits, and closes the journal."""
        while self._task is not None:
            await self._task
        self._pool.shutdown(wait=False)
        self._journal.close()

    def _add(self, changes: tuple[Change, ...]) -> asyncio.Future[None]:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((changes, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="launch journal")
        return future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            changes = [change for group, _ in batch for change in group]
            error: Exception | None = None
            try:
                await loop.run_in_executor(self._pool, self._journal.write, changes)
            except Exception as caught:
                error = caught
            for _, future in batch:
                if future.done():  # Nobody waits any more.
                    continue
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
        self._task = None


def _log_failure(future: asyncio.Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        _log.warning("a receipt could not be written, so its launch is reported again after a restart: %s", error)


def _without_output(report: session_pb2.LaunchReport) -> session_pb2.LaunchReport:
    """A copy: the report itself may be on its way."""
    copied = session_pb2.LaunchReport()
    copied.CopyFrom(report)
    copied.ClearField("output")
    return copied


def _changes(entry: Entry) -> list[Change]:
    changes: list[Change] = [Begin(entry.token, entry.run)]
    if entry.report is not None:
        changes.append(Finish(entry.token, entry.report))
    if entry.receipted:
        changes.append(Receipt(entry.token))
    return changes


def _line(change: Change) -> bytes:
    match change:
        case Begin(token, run):
            record: dict[str, object] = {"token": token, "run": run}
        case Finish(token, report):
            record = {"token": token, "report": base64.b64encode(report.SerializeToString()).decode("ascii")}
        case Receipt(token):
            record = {"token": token, "receipted": True}
        case _:
            assert_never(change)
    return json.dumps(record, separators=(",", ":")).encode("utf-8") + b"\n"


def _change(line: bytes) -> Change:
    record = json.loads(line)
    token = record["token"]
    if "run" in record:
        return Begin(token, record["run"])
    if "report" in record:
        return Finish(token, session_pb2.LaunchReport.FromString(base64.b64decode(record["report"], validate=True)))
    if record["receipted"] is not True:
        raise ValueError(record["receipted"])
    return Receipt(token)


def _close(file: BinaryIO) -> None:
    """Closes it, also where the disk refuses what its buffer still has."""
    try:
        file.close()
    except OSError as error:
        _log.warning("closing the launch journal: %s", error)


def _sync_directory(directory: Path) -> None:
    """Makes a rename durable, where directories can be synced at all (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
