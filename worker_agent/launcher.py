"""Runs the launches that the leader orders, each token at most once, and keeps their results until they are receipted.

Order rules. A token `(job, scheduled time, attempt)` is on disk before its process starts, and its result is on disk
before it is reported; so neither a second order, nor a crash between any two steps, starts it again or loses a result.

A run that this agent did not see through (the agent crashed, was stopped, or ended the run by `stop_all`) has no
result: it is not reported, the next Hello does not name it, and the leader calls it lost, which is the truth and lets
the job's retry policy decide. For that to be safe nothing may outlive its agent unseen: `start` kills what is left of
such runs before the first Hello is sent.

Over `launches_max` runs at once, orders wait, the most urgent class first, and first in, first out within a class. One
that waited as long as the leader waits for a confirmation is dropped: by then it belongs to another worker.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import os
import signal
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.config import WorkerSettings
from coordinator.control.schedule import format_wall
from coordinator.model import Clock, WallMs
from worker_agent.launch_journal import LaunchJournal
from worker_agent.process import RunProcess, kill_runs

NOT_STARTED_STATUS = 127
"""Exit status of a launch whose program could not be started, as shells have it."""
SECRET_VARIABLES = ("CONSUL_HTTP_TOKEN",)
"""The agent's own secrets; runs do not inherit them."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """One order that waits for a slot or runs."""

    order: session_pb2.LaunchOrder
    token: str
    received_s: float
    stop: asyncio.Event
    running: session_pb2.LaunchReport | None = None
    """What is reported of it while it runs."""
    abandoned: str = ""
    """Why this agent ended it; then it has no result."""
    grace_s: float = 0.0


class Launcher:
    """The launches of one worker. Everything runs on one event loop; the disk is waited for in threads."""

    def __init__(
        self,
        directory: Path,
        settings: WorkerSettings,
        worker_id: str,
        clock: Clock,
        on_report: Callable[[session_pb2.LaunchReport], None],
        queue_wait_s_max: float = 5.0,
    ) -> None:
        """`queue_wait_s_max`: the leader's `cron.order_timeout_s`. `on_report` runs on the loop and may not block."""
        self._worker_id = worker_id
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._on_report = on_report
        self._queue_wait_s_max = queue_wait_s_max
        self._journal: LaunchJournal | None = None
        self._queue: list[tuple[int, int, _Run]] = []
        self._sequence = 0
        self._runs: dict[str, _Run] = {}
        """Orders that wait or run, by token."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = False

    async def start(self) -> None:
        """Reads the journal and kills what outlived an earlier agent. Raises Damaged, and OSError.

        Must end before the first Hello is sent: only then does `pending_reports` know the results of earlier agents.
        """
        self._journal = await asyncio.to_thread(LaunchJournal, self._directory)
        left = {entry.run for entry in self._journal.unfinished()}
        killed = await asyncio.to_thread(kill_runs, left) if left else 0
        if killed:
            _log.warning("killed %d processes of launches that outlived an earlier agent", killed)

    @property
    def running(self) -> int:
        """How many launches run."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """How many orders wait for a slot."""
        return len(self._queue)

    async def launch(self, order: session_pb2.LaunchOrder) -> None:
        """Takes an order; the run goes on by itself. A token that is known already is reported again, never started."""
        token = token_of(order.launch)
        if self._stopping:
            return
        run = self._runs.get(token)
        if run is not None:
            if run.running is not None:
                self._on_report(run.running)
            return
        entry = self._opened().get(token)
        if entry is not None:
            if entry.report is not None:
                self._on_report(entry.report)
            else:
                _log.warning("launch %s was started before and has no result; it is not started again", token)
            return
        run = _Run(order, token, self._clock.monotonic(), asyncio.Event())
        self._runs[token] = run
        self._sequence += 1
        heapq.heappush(self._queue, (order.spec.priority_class, self._sequence, run))
        self._fill_slots()

    def pending_reports(self) -> list[session_pb2.LaunchReport]:
        """What the Hello must name: launches that run, and results without a receipt."""
        running = [run.running for run in self._runs.values() if run.running is not None]
        finished = [] if self._journal is None else self._journal.unreceipted()
        named = {(report.job_id, report.scheduled_at_unix_ms, report.attempt) for report in finished}
        return finished + [r for r in running if (r.job_id, r.scheduled_at_unix_ms, r.attempt) not in named]

    async def on_receipt(self, receipt: session_pb2.LaunchReportReceipt) -> None:
        """The leader has committed a report, or will never."""
        token = token_of(receipt)
        if receipt.refusal:
            _log.warning("the report of launch %s was refused: %s", token, receipt.refusal)
        if receipt.state != types_pb2.LAUNCH_STATE_RUNNING:
            self._opened().receipt(token)

    async def stop_all(self, reason: str, grace_s: float | None = None) -> None:
        """Ends every run without a result, and forgets the orders that wait; returns when nothing runs."""
        grace_s = self._settings.stop_grace_s if grace_s is None else grace_s
        for _, _, run in self._queue:
            self._runs.pop(run.token, None)
        self._queue.clear()
        for token in self._tasks:
            run = self._runs[token]
            run.abandoned, run.grace_s = reason, grace_s
            run.stop.set()
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    async def stop(self, grace_s: float | None = None) -> None:
        """Takes no more orders, ends every run, closes the journal."""
        self._stopping = True
        await self.stop_all("the worker agent stops", grace_s)
        if self._journal is not None:
            self._journal.close()

    def _opened(self) -> LaunchJournal:
        assert self._journal is not None, "Launcher.start() comes first"
        return self._journal

    def _fill_slots(self) -> None:
        while self._queue and len(self._tasks) < self._settings.launches_max:
            _, _, run = heapq.heappop(self._queue)
            waited_s = self._clock.monotonic() - run.received_s
            if waited_s >= self._queue_wait_s_max:
                del self._runs[run.token]
                _log.warning("launch %s found no free slot within %.1f s and is dropped", run.token, waited_s)
                continue
            self._tasks[run.token] = asyncio.create_task(self._guard(run), name=f"launch {run.token}")

    async def _guard(self, run: _Run) -> None:
        """Runs one launch; whatever happens, its slot is free afterwards."""
        try:
            await self._execute(run)
        except Exception:
            _log.exception("launch %s ended by a fault of the launcher; it has no result", run.token)
        finally:
            del self._tasks[run.token]
            del self._runs[run.token]
            if not self._stopping:
                self._fill_slots()

    async def _execute(self, run: _Run) -> None:
        spec, journal, run_id = run.order.spec, self._opened(), uuid.uuid4().hex
        await asyncio.to_thread(journal.begin, run.token, run_id)
        if run.abandoned:
            return
        report = session_pb2.LaunchReport(
            job_id=run.order.launch.job_id,
            scheduled_at_unix_ms=run.order.launch.scheduled_at_unix_ms,
            attempt=run.order.launch.attempt,
            state=types_pb2.LAUNCH_STATE_RUNNING,
            started_unix_ms=self._clock.wall_ms(),
        )
        try:
            process = await RunProcess.start(
                arguments_of(spec), self._environment(run), run_id, self._settings.output_bytes_max
            )
        except (OSError, ValueError) as error:
            report.state = types_pb2.LAUNCH_STATE_FAILED
            report.reason = f"could not start {arguments_of(spec)[0]!r}: {error}"
            report.exit_status = NOT_STARTED_STATUS
        else:
            run.running = report
            self._on_report(report)
            report = await self._see_through(run, process, report)
            if run.abandoned:
                _log.warning("launch %s was ended: %s", run.token, run.abandoned)
                return
        report.finished_unix_ms = self._clock.wall_ms()
        await asyncio.to_thread(journal.finish, run.token, report)
        self._on_report(report)

    async def _see_through(
        self, run: _Run, process: RunProcess, running: session_pb2.LaunchReport
    ) -> session_pb2.LaunchReport:
        """Waits for the end of the process, its timeout, or an order to stop; the final report without its time."""
        timeout_s = run.order.spec.timeout_s
        ended, stopped = asyncio.create_task(process.wait()), asyncio.create_task(run.stop.wait())
        report = session_pb2.LaunchReport()
        report.CopyFrom(running)
        try:
            await asyncio.wait({ended, stopped}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                run.abandoned = ""  # It came to its own end first.
                report.exit_status = ended.result()
                succeeded = report.exit_status == 0
                report.state = types_pb2.LAUNCH_STATE_SUCCEEDED if succeeded else types_pb2.LAUNCH_STATE_FAILED
                report.reason = "" if succeeded else _status_text(report.exit_status)
            else:
                grace_s = run.grace_s if run.abandoned else self._settings.stop_grace_s
                report.exit_status = await process.stop(grace_s)
                report.state = types_pb2.LAUNCH_STATE_TIMED_OUT
                report.reason = f"stopped after its timeout of {timeout_s:g} s"
        finally:
            for task in (ended, stopped):
                task.cancel()
            await asyncio.wait({ended, stopped})
        report.output = process.output
        return report

    def _environment(self, run: _Run) -> dict[str, str]:
        launch = run.order.launch
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        environment["PYTHONUNBUFFERED"] = "1"  # Else a run that is killed takes its last lines with it.
        environment.update(run.order.spec.environment)
        environment.update(
            LAUNCH_JOB=launch.job_id,
            LAUNCH_SCHEDULED_AT=format_wall(WallMs(launch.scheduled_at_unix_ms)),
            LAUNCH_ATTEMPT=str(launch.attempt),
            LAUNCH_TOKEN=run.token,
            LAUNCH_WORKER=self._worker_id,
        )
        return environment


def token_of(launch: types_pb2.Launch | session_pb2.LaunchReport | session_pb2.LaunchReportReceipt) -> str:
    """The fencing token: job/scheduled_at_ms/attempt."""
    return f"{launch.job_id}/{launch.scheduled_at_unix_ms}/{launch.attempt}"


def arguments_of(spec: types_pb2.CronJobSpec) -> list[str]:
    """The program and its arguments."""
    if spec.python:
        return [sys.executable, "-m", "worker_agent.run_python", spec.python]
    return list(spec.command)


def _status_text(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"
