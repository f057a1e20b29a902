"""Runs the launches that the leader orders, each token at most once, and keeps their results until they are receipted.

Order rules. A token `(job, scheduled time, attempt)` is on disk before its process starts, and its result is on disk
before it is reported; so neither a second order, nor a crash between any two steps, starts it again or loses a result.
Launches that begin or end at the same moment share one sync of the disk (`CommitQueue`); each waits for its own.

How a run ends:

    by itself                              SUCCEEDED or FAILED
    after its timeout                      TIMED_OUT
    told to by the leader (`stop_launch`)  CANCELLED; one that has no process yet never gets one
    with the session lease, or the agent   no result: it is not reported

A run that this agent did not see through (the agent crashed, was stopped, or the lease ended) has no result: the next
Hello and the next heartbeat do not name it, and the leader calls it lost, which is the truth and lets the job's retry
policy decide. For that to be safe nothing may outlive its agent unseen: `start` kills what is left of such runs before
the first Hello is sent. And nothing that ends without a lease counts as a success, even where the process saw to its
own end before it heard that it should: by then the attempt may belong to another worker.

Nothing waits here. An order that finds `launches_max` runs, comes while the agent stops or its disk takes no notes, or
wants what this system does not have is declined: that its token never starts is on disk (`launch_ends.py` has what is
done where that cannot be), then the leader is told, who gives the launch to another worker or has it wait for the first
free slot of any. So nobody's launch stands behind this worker's long runs while another one is idle, and priorities
count over all workers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.config import WorkerSettings
from coordinator.model import Clock, Monotonic
from worker_agent.launch_command import arguments_of, environment_of, failure_of, key_of, refusal_of, token_of
from worker_agent.launch_ends import NEVER_RAN, LaunchEnds
from worker_agent.launch_journal import Begin, CommitQueue, LaunchJournal
from worker_agent.launch_output import LaunchKey, LaunchOutputs
from worker_agent.launch_run import Run, report_of
from worker_agent.process import RunProcess
from worker_agent.run_finder import Leftovers, RunFinder, kill_runs
from worker_agent.run_limited import NOT_STARTED_STATUS
from worker_agent.session_lease import NO_LEASE
from worker_agent.watchdog import Watchdog

_log = logging.getLogger(__name__)


class Launcher:
    """The launches of one worker. Everything runs on one event loop; the disk is waited for in threads."""

    def __init__(
        self,
        directory: Path,
        settings: WorkerSettings,
        worker_id: str,
        clock: Clock,
        on_report: Callable[[session_pb2.LaunchReport], None],
        has_lease: Callable[[], bool] = lambda: True,
        lease_grace_s: float = 1.0,
    ) -> None:
        """`on_report` is called on the loop.

        `lease_grace_s` bounds what runs have to end by themselves after the lease: before the leader's longer count is
        over, they must be gone.
        """
        self._worker_id = worker_id
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._on_report = on_report
        self._has_lease = has_lease
        self._lease_grace_s = min(lease_grace_s, settings.stop_grace_s)
        self._journal: LaunchJournal | None = None
        self._commits: CommitQueue | None = None
        self.outputs = LaunchOutputs(
            directory,
            run_bytes_max=settings.run_output_bytes_max,
            all_bytes_max=settings.runs_output_bytes_max,
            tail_bytes_max=settings.output_bytes_max,
        )
        self._runs: dict[str, Run] = {}
        """Orders that were taken, by token."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """What runs each of them. Invariant: the same tokens."""
        self._ends: LaunchEnds | None = None
        self._refused: dict[str, str] = {}
        """Why reports were refused, by token, until the end is receipted: a run is reported again and again."""
        self._declines_all = ""
        """Why no order is taken any more."""
        self._finder = RunFinder()
        self.watchdog = Watchdog(self._lease_grace_s)
        self._lease_until = NO_LEASE
        self._leftovers = Leftovers(self.watchdog.end)
        self._starting = asyncio.Lock()
        """Held for a start, which stands still until the program is executed: the loop has its turn between two."""
        self._stopping = False

    async def start(self) -> None:
        """Reads the journal and kills what outlived an earlier agent. Raises Damaged, and OSError.

        Must end before the first Hello is sent: only then does `pending_reports` know the results of earlier agents.
        """
        self._journal = await asyncio.to_thread(LaunchJournal, self._directory)
        self._commits = CommitQueue(self._journal)
        self._ends = LaunchEnds(self._commits, self._clock, self._on_report)
        self.watchdog.start()
        await self.outputs.start()
        unfinished = self._journal.unfinished()
        if unfinished:
            killed = await asyncio.to_thread(kill_runs, {entry.run for entry in unfinished} - {NEVER_RAN})
            if killed:
                _log.warning("killed %d processes of launches that outlived an earlier agent", killed)
            for entry in unfinished:
                self._commits.settle(entry.token)

    @property
    def running(self) -> int:
        """How many launches run."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """How many orders were taken and have no process yet."""
        return sum(run.running is None for run in self._runs.values())

    @property
    def slots_free(self) -> int:
        """How many more orders would be taken now."""
        is_closed = self._declines_all or (self._ends is not None and self._ends.problem)
        return 0 if is_closed else max(0, self._settings.launches_max - len(self._tasks))

    def take_no_orders(self, reason: str) -> None:
        """From now on every order is declined."""
        self._declines_all = reason

    async def launch(self, order: session_pb2.LaunchOrder) -> None:
        """Takes an order; the run goes on by itself. A token that is known already is reported again, never started."""
        key = key_of(order.launch)
        if self._stopping or self._ending().is_refusing(key.token):
            return
        if (held := self._ending().held_of(key.token)) is not None:
            self._on_report(held)
            return
        run = self._runs.get(key.token)
        if run is not None:
            if run.running is not None:
                self._on_report(run.running)
            return
        entry = self._opened().get(key.token)
        if entry is not None:
            if entry.report is not None:
                self._on_report(entry.report)
            elif entry.run == NEVER_RAN:
                # A crash took the word, but not the promise.
                again = "it had declined or cancelled this attempt before it was started anew"
                self._ending().refuse(report_of(key, decline=session_pb2.LAUNCH_DECLINE_BUSY, reason=again))
            else:
                _log.warning("launch %s was started before and has no result; it is not started again", key.token)
            return
        decline = self._decline_of(order)
        if decline is not None:
            self._ending().refuse(report_of(key, decline=decline[0], reason=decline[1]))
            return
        run = Run(order, key, self.outputs.begin(key), asyncio.Event())
        self._runs[key.token] = run
        self._tasks[key.token] = asyncio.create_task(self._guard(run), name=f"launch {key.token}")

    def _decline_of(self, order: session_pb2.LaunchOrder) -> tuple[session_pb2.LaunchDecline.ValueType, str] | None:
        """How and why an order is declined; None when it is taken."""
        if self._declines_all:
            return session_pb2.LAUNCH_DECLINE_BUSY, self._declines_all
        if refusal := refusal_of(order.spec):
            return session_pb2.LAUNCH_DECLINE_UNFIT, refusal
        if self._ending().problem:
            return session_pb2.LAUNCH_DECLINE_BUSY, self._ending().problem
        if not self.slots_free:
            return session_pb2.LAUNCH_DECLINE_BUSY, f"none of its {self._settings.launches_max} slots is free"
        return None

    async def stop_launch(self, stop: session_pb2.LaunchStop) -> None:
        """Ends a launch, or sees to it that it never starts; what became of it is reported, once more if need be."""
        key, reason = key_of(stop.token), stop.reason or "cancelled"
        if self._stopping or self._ending().is_refusing(key.token):
            return
        if (held := self._ending().held_of(key.token)) is not None:
            self._on_report(held)
            return
        run = self._runs.get(key.token)
        if run is not None:
            if run.cancelled:
                return
            run.cancelled = reason
            run.end_within(self._settings.stop_grace_s)
            return
        entry = self._opened().get(key.token)
        if entry is not None and entry.report is not None:
            self._on_report(entry.report)
        else:
            if entry is not None:
                reason += "; its run had been ended by this worker, without a result"
            self._ending().refuse(report_of(key, types_pb2.LAUNCH_STATE_CANCELLED, reason=reason))

    def set_lease_end(self, until: Monotonic) -> None:
        """The session lease was renewed, or given back: runs that this agent leaves behind are ended then."""
        self._lease_until = until
        self.watchdog.set_lease_end(until)

    def end_lease(self, reason: str) -> None:
        """The worker acts under no lease any more: every run ends, without a result; no order of before starts."""
        self._abandon_all(reason, self._lease_grace_s, is_void=True)
        self._leftovers.hasten()

    def pending_reports(self) -> list[session_pb2.LaunchReport]:
        """What the Hello must name: launches that run, and results without a receipt."""
        finished = self._finished()
        named = {key_of(report) for report in finished}
        running = [run.running for run in self._runs.values() if run.running is not None and run.key not in named]
        return finished + running

    def known_launches(self) -> list[session_pb2.LaunchToken]:
        """What heartbeats name: every order that was taken, until the receipt of its end."""
        ended = [key_of(report) for report in self._finished()]
        known = dict.fromkeys(ended + [run.key for run in self._runs.values()])
        return [
            session_pb2.LaunchToken(job_id=job_id, scheduled_at_unix_ms=scheduled_at_ms, attempt=attempt)
            for job_id, scheduled_at_ms, attempt in known
        ]

    def latest_attempt(self, job_id: str, scheduled_at_ms: int) -> int:
        """The latest attempt of a launch that is known here; 0 for none."""
        known = [attempt for attempt, run in self._opened().attempts(job_id, scheduled_at_ms) if run != NEVER_RAN]
        return max((*known, *self.outputs.attempts(job_id, scheduled_at_ms)), default=0)

    def knows(self, key: LaunchKey) -> bool:
        """True when the attempt ran here, as far as that is remembered."""
        entry = self._opened().get(key.token)
        ran = entry is not None and entry.run != NEVER_RAN
        return ran or key.attempt in self.outputs.attempts(*key[:2])

    async def on_receipt(self, receipt: session_pb2.LaunchReportReceipt) -> None:
        """The leader has committed a report, or will never: one line says why, however often the run is reported."""
        token, is_end = token_of(receipt), receipt.state != types_pb2.LAUNCH_STATE_RUNNING
        if receipt.refusal and self._refused.get(token) != receipt.refusal:
            goes_on = "" if is_end else "; it goes on, and nobody waits for its result"
            _log.warning("the report of launch %s was refused: %s%s", token, receipt.refusal, goes_on)
        if not is_end and receipt.refusal and token in self._runs:
            self._refused[token] = receipt.refusal
        if is_end:
            self._refused.pop(token, None)
            self._ending().settle(token)

    async def stop_all(self, reason: str, grace_s: float | None = None) -> None:
        """Ends every run without a result; returns when nothing runs."""
        self._abandon_all(reason, self._settings.stop_grace_s if grace_s is None else grace_s, is_void=False)
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()))

    async def stop(self, grace_s: float | None = None) -> None:
        """Takes no more orders, ends every run, closes the journal."""
        self._stopping = True
        await self.stop_all("the worker agent stops", grace_s)
        if self._ends is not None:
            await self._ends.close()
        await self._leftovers.stop()
        if self._commits is not None:
            await self._commits.close()
        await self.watchdog.stop()
        await self.outputs.close()

    def _opened(self) -> LaunchJournal:
        assert self._journal is not None, "Launcher.start() comes first"
        return self._journal

    def _committing(self) -> CommitQueue:
        assert self._commits is not None, "Launcher.start() comes first"
        return self._commits

    def _ending(self) -> LaunchEnds:
        assert self._ends is not None, "Launcher.start() comes first"
        return self._ends

    def _finished(self) -> list[session_pb2.LaunchReport]:
        """Ends without a receipt."""
        return [] if self._journal is None else self._journal.unreceipted() + self._ending().held

    def _abandon_all(self, reason: str, grace_s: float, *, is_void: bool) -> None:
        for token in self._tasks:
            run = self._runs[token]
            run.abandoned, run.is_void = reason, run.is_void or is_void
            run.end_within(grace_s)

    async def _guard(self, run: Run) -> None:
        """Runs one launch; whatever happens, its slot is free afterwards, and heartbeats do not name it for nothing."""
        try:
            await self._execute(run)
        except Exception:
            _log.exception("launch %s ended by a fault of the launcher; it has no result", run.token)
        finally:
            del self._tasks[run.token], self._runs[run.token]
            if run.process is not None:
                self._leftovers.add(run.run_id)
            else:
                self.watchdog.end(run.run_id)
            if run.abandoned:  # No end is reported, so no receipt of one comes.
                self._refused.pop(run.token, None)
            run.output.end()

    async def _execute(self, run: Run) -> None:
        report = report_of(run.key)
        try:
            await self._committing().commit(Begin(run.token, run.run_id))
        except OSError as error:
            self._ending().decline_unwritten(report, error)
            return
        process = run.process = await self._begin(run, report)
        if process is not None:
            run.running = report_of(run.key, types_pb2.LAUNCH_STATE_RUNNING, started_unix_ms=report.started_unix_ms)
            self._on_report(run.running)
            try:
                await self._see_through(run, process, report)
            except BaseException:
                await process.stop(0.0)
                raise
        if not run.abandoned and NO_LEASE < self._lease_until <= self._clock.monotonic():
            run.abandoned = "the session lease ended while this agent stood still"
        if run.abandoned:
            _log.warning("launch %s was ended: %s", run.token, run.abandoned)
            self._committing().settle(run.token)
            return
        await self._ending().finish(report)

    async def _begin(self, run: Run, report: session_pb2.LaunchReport) -> RunProcess | None:
        """Starts the process; None, with the reason in the report, when it cannot or may not be started."""
        spec = run.order.spec
        arguments = arguments_of(spec)
        try:
            environment = environment_of(run.order, self._worker_id)
            async with self._starting:
                if not self._has_lease():
                    run.abandoned, run.is_void = run.abandoned or "the session lease ended before its start", True
                if run.abandoned or run.cancelled:
                    report.state, report.reason = types_pb2.LAUNCH_STATE_CANCELLED, run.cancelled
                    return None
                report.started_unix_ms = self._clock.wall_ms()
                self.watchdog.begin(run.run_id)
                process = await RunProcess.start(arguments, environment, run.run_id, run.output, self._finder)
        except (OSError, ValueError) as error:
            report.state = types_pb2.LAUNCH_STATE_FAILED
            report.reason = f"could not start {arguments[0]!r}: {error}"
            report.exit_status = NOT_STARTED_STATUS
            report.started_unix_ms = self._clock.wall_ms()
            return None
        run.output.on_full = lambda is_full: process.set_reading(not is_full)
        return process

    async def _see_through(self, run: Run, process: RunProcess, report: session_pb2.LaunchReport) -> None:
        """Waits for the end of the process, its timeout, or an order to stop, and notes in the report how it ended."""
        spec = run.order.spec
        ended, stopped = asyncio.create_task(process.wait()), asyncio.create_task(run.stop.wait())
        try:
            await asyncio.wait({ended, stopped}, timeout=spec.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if ended.done() and not self._has_lease():
                run.abandoned, run.is_void = run.abandoned or "it ended when the session lease had ended", True
            if ended.done() and not run.is_void:
                run.abandoned = ""  # It came to its own end first.
                report.exit_status = ended.result()
                report.reason = failure_of(report.exit_status, spec, run.output.tail)
                succeeded = report.exit_status == 0
                report.state = types_pb2.LAUNCH_STATE_SUCCEEDED if succeeded else types_pb2.LAUNCH_STATE_FAILED
            elif run.cancelled:
                report.exit_status = await process.stop(run.grace_s)
                report.state, report.reason = types_pb2.LAUNCH_STATE_CANCELLED, run.cancelled
            else:
                report.exit_status = await process.stop(min(run.grace_s, self._settings.stop_grace_s))
                report.state = types_pb2.LAUNCH_STATE_TIMED_OUT
                report.reason = f"stopped after its timeout of {spec.timeout_s:g} s"
        finally:
            for task in (ended, stopped):
                task.cancel()
            await asyncio.wait({ended, stopped})
        report.output = run.output.tail
