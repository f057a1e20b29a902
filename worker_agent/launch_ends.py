"""Brings the ends of launches to disk, then reports them: results, and the word that a token never starts.

What ended is on disk before the leader hears of it, so that no crash takes a result back. A disk that takes nothing (it
is full, it fails) would make every end a silence of `order_timeout_s` and then a loss, so then an end is *held*: it is
reported at once, kept in memory, named in every Hello and heartbeat like those on disk, and written when the disk takes
something again; until then there is a `problem`, and no order is taken.

A held token surely never starts, although a crash takes the note of it. In this process the held end answers its order.
The next process is welcomed by a leader only once that has committed its incarnation, so in a state that has the
decline if any leader has; and one that is not committed is nobody else's: that order is the first. Where the write that
failed is on disk all the same, it says that the token began, and such a token is not started either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from coordinator.api.v1 import session_pb2
from coordinator.model import Clock
from worker_agent.launch_command import token_of
from worker_agent.launch_journal import Begin, Change, CommitQueue, Finish

NEVER_RAN = ""
"""What the journal has as the run of a token that was cancelled before it had one, or declined."""
RETRY_S = 1.0
"""Pause before a disk that took nothing is tried again."""

_log = logging.getLogger(__name__)

Held = tuple[session_pb2.LaunchReport, tuple[Change, ...]]
"""An end, and what the journal is to have of it."""


class LaunchEnds:
    """Belongs to one event loop."""

    def __init__(
        self, commits: CommitQueue, clock: Clock, on_report: Callable[[session_pb2.LaunchReport], None]
    ) -> None:
        self._commits = commits
        self._clock = clock
        self._on_report = on_report
        self._refusals: dict[str, asyncio.Task[None]] = {}
        """Tokens of which is being noted that they never start."""
        self._held: dict[str, Held] = {}
        self._retrying: asyncio.Task[None] | None = None
        self.problem = ""
        """Why the disk takes nothing; empty while it does."""

    @property
    def held(self) -> list[session_pb2.LaunchReport]:
        """Ends without a receipt that are not on disk."""
        return [report for report, _ in self._held.values()]

    def is_refusing(self, token: str) -> bool:
        """True while it is being noted that the token never starts; then that is reported."""
        return token in self._refusals

    def held_of(self, token: str) -> session_pb2.LaunchReport | None:
        """How a token ended whose end is not on disk."""
        held = self._held.get(token)
        return None if held is None else held[0]

    async def finish(self, report: session_pb2.LaunchReport) -> None:
        """Notes the result of a run, then reports it."""
        report.finished_unix_ms = self._clock.wall_ms()
        await self._note(report, (Finish(token_of(report), report),))

    def refuse(self, report: session_pb2.LaunchReport) -> None:
        """Notes durably that a token without a process never gets one, then reports it; beside other orders."""
        token = token_of(report)
        self._refusals[token] = asyncio.create_task(self._refuse(token, report), name=f"refusal of {token}")

    def decline_unwritten(self, report: session_pb2.LaunchReport, error: OSError) -> None:
        """Declines an order whose beginning the disk did not take."""
        self._fail(error)
        report.finished_unix_ms = self._clock.wall_ms()
        report.decline, report.reason = session_pb2.LAUNCH_DECLINE_BUSY, self.problem
        self._held[token_of(report)] = report, _never(report)
        self._on_report(report)

    def settle(self, token: str) -> None:
        """The end of a token was receipted."""
        self._held.pop(token, None)
        self._commits.settle(token)

    async def close(self) -> None:
        """Returns when everything is noted, or was tried for the last time."""
        while self._refusals:
            await asyncio.wait(self._refusals.values())
        if self._retrying is not None:
            self._retrying.cancel()
            await asyncio.wait({self._retrying})
            with contextlib.suppress(OSError):
                await self._write_held()

    async def _refuse(self, token: str, report: session_pb2.LaunchReport) -> None:
        report.finished_unix_ms = self._clock.wall_ms()
        try:
            await self._note(report, _never(report))
        finally:
            del self._refusals[token]

    async def _note(self, report: session_pb2.LaunchReport, changes: tuple[Change, ...]) -> None:
        is_noted = False
        if not self.problem:
            try:
                await self._commits.commit(*changes)
                is_noted = True
            except OSError as error:
                self._fail(error)
        if not is_noted:
            self._held[token_of(report)] = report, changes
        self._on_report(report)

    def _fail(self, error: Exception) -> None:
        if not self.problem:
            _log.error("launches cannot be noted, so orders are declined until they can: %s", error)
        what = error.strerror if isinstance(error, OSError) else None
        self.problem = f"its disk takes no notes: {what or error}"
        if self._retrying is None:
            self._retrying = asyncio.create_task(self._retry(), name="try the launch journal again")

    async def _retry(self) -> None:
        while self.problem:
            await asyncio.sleep(RETRY_S)
            try:
                await self._write_held()
            except Exception as error:  # Whatever it is, orders are to be taken again some day.
                self._fail(error)
            else:
                self.problem = ""
                _log.info("launches can be noted again")
        self._retrying = None

    async def _write_held(self) -> None:
        """Writes all that is held; with nothing to write the journal still makes its file anew, after a failure."""
        held = dict(self._held)
        await self._commits.commit(*(change for _, changes in held.values() for change in changes))
        for token in held:
            if self._held.pop(token, None) is None:  # The receipt came in the meantime.
                self._commits.settle(token)


def _never(report: session_pb2.LaunchReport) -> tuple[Change, ...]:
    token = token_of(report)
    return Begin(token, NEVER_RAN), Finish(token, report)
