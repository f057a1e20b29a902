"""Runs the worker's session machine: performs its actions and feeds it what happens.

Everything here runs on the agent's event loop, so the machines need no locks. Events are taken one after
the other: one that arises while actions are being performed waits until they are done. Files are written in
a thread, one assignment at a time; the loop never waits for the disk.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, assert_never

from coordinator.api.v1 import session_pb2
from coordinator.discovery.interface import Discovery
from coordinator.model import Clock, Monotonic
from coordinator.security.credentials import Credentials
from worker_agent import session_interface as interface
from worker_agent.files import write_durably
from worker_agent.hosting import Hosting, Persist
from worker_agent.session import WorkerSession
from worker_agent.session_interface import Phase
from worker_agent.session_lease import NO_LEASE
from worker_agent.shard_interface import ShardView
from worker_agent.stream import MasterStream

PERSIST_RETRY_S = 1.0
"""Pause before an assignment that could not be written is tried again."""

_log = logging.getLogger(__name__)


class LaunchRunner(Protocol):
    """What the driver asks of the launcher."""

    @property
    def slots_free(self) -> int:
        """How many more orders it would take now."""
        ...

    async def launch(self, order: session_pb2.LaunchOrder) -> None:
        """Takes an order, or declines it; one that it has already is taken once."""
        ...

    def pending_reports(self) -> Sequence[session_pb2.LaunchReport]:
        """Reports without a receipt."""
        ...

    async def stop_launch(self, stop: session_pb2.LaunchStop) -> None:
        """Ends a launch, or sees to it that it never starts, and reports what became of it."""
        ...

    def set_lease_end(self, until: Monotonic) -> None:
        """The session lease ends then; said whenever that changes."""
        ...

    def end_lease(self, reason: str) -> None:
        """Ends every run, without a result."""
        ...

    def known_launches(self) -> Sequence[session_pb2.LaunchToken]:
        """Every order that was taken, until the receipt of its end."""
        ...

    async def on_receipt(self, receipt: session_pb2.LaunchReportReceipt) -> None:
        """A report was received for good."""
        ...


class ReplicaHost(Protocol):
    """What the driver asks of the host of the shards."""

    def foresee(self, epochs: Mapping[int, int]) -> None:
        """An assignment has come, and is not in force yet: it has these new epochs, by shard."""
        ...

    def follow(self, views: Sequence[ShardView], peers: Mapping[str, str], copy_bytes_per_s: int) -> None:
        """An assignment is in force."""
        ...

    def reports(self) -> Sequence[session_pb2.ReplicaReport]:
        """The latest report of every shard."""
        ...


class SessionDriver:
    """The worker's session, running. `ended` is done when it is over for good; it fails only by a bug."""

    def __init__(
        self,
        *,
        session: WorkerSession,
        hosting: Hosting,
        shards: ReplicaHost,
        launcher: LaunchRunner,
        discovery: Discovery,
        clock: Clock,
        assignment_path: Path,
        metrics: Callable[[], session_pb2.NodeMetrics],
        credentials: Credentials | None,
    ) -> None:
        self._session = session
        self._hosting = hosting
        self._shards = shards
        self._launcher = launcher
        self._discovery = discovery
        self._clock = clock
        self._assignment_path = assignment_path
        self._metrics = metrics
        self._credentials = credentials
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[interface.End] = self._loop.create_future()
        self._lease_number = 0
        """Counts the ends of leases."""
        self._lease_until = NO_LEASE
        """What the launcher was told."""
        self._storage_problem = ""
        self._sessions_opened = 0
        self._events: deque[interface.Event] = deque()
        self._is_busy = False
        self._timer: asyncio.TimerHandle | None = None
        self._streams: dict[int, MasterStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._launcher_calls: asyncio.Queue[Coroutine[Any, Any, None]] = asyncio.Queue()
        self._logged_phase = Phase.WAITING
        self._logged_problem = ""
        self._logged_refusal = ""
        self._reports: dict[int, session_pb2.ReplicaReport] = {}

    @property
    def storage_problem(self) -> str:
        """Why the assignment cannot be written; empty when it can."""
        return self._storage_problem

    @property
    def sessions_opened(self) -> int:
        """Sessions that were opened since the start."""
        return self._sessions_opened

    def start(self) -> None:
        """Begins to look for the leader."""
        self._spawn(self._call_launcher(), "launcher calls")
        self._advance()

    def stop(self, reason: str) -> None:
        """Says Goodbye; `ended` is done once the leader has answered, or two seconds later."""
        self._feed(interface.StopRequested(reason))

    def report_launch(self, report: session_pb2.LaunchReport) -> None:
        """Sends a launch report now, if a session is open."""
        self._feed(interface.ReportsReady(launches=(report,)))

    def report_replica(self, report: session_pb2.ReplicaReport) -> None:
        """Sends a replica's report, if a session is open; those of one turn of the event loop go together.

        Only the latest of a shard counts.
        """
        if not self._reports:
            self._loop.call_soon(self._flush_reports)
        self._reports[report.shard_id] = report

    def _flush_reports(self) -> None:
        reports, self._reports = tuple(self._reports.values()), {}
        self._feed(interface.ReportsReady(replicas=reports))

    def report_figures(self, figures: session_pb2.ShardFigures) -> None:
        """Sends how much is in the shards, if a session is open."""
        self._feed(interface.ReportsReady(figures=figures))

    async def close(self) -> None:
        """Ends every task and connection."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        streams, self._streams = list(self._streams.values()), {}
        closing = [*self._closing, *(stream.close() for stream in streams)]
        await asyncio.gather(*self._tasks, *closing, return_exceptions=True)
        while not self._launcher_calls.empty():
            self._launcher_calls.get_nowait().close()

    # The machine

    def _feed(self, event: interface.Event) -> None:
        self._events.append(event)
        if not self._is_busy:
            self._run_machine(advance=False)

    def _advance(self) -> None:
        self._run_machine(advance=True)

    def _run_machine(self, *, advance: bool) -> None:
        self._is_busy = True
        try:
            step = self._session.on_advance(self._clock.monotonic()) if advance else None
            while True:
                if step is not None:
                    for action in step.actions:
                        self._perform(action)
                if not self._events:
                    break
                step = self._session.on_event(self._clock.monotonic(), self._events.popleft())
            self._tell_lease()
            self._log_changes()
            self._set_timer(step)
        except Exception as error:
            _log.exception("bug in the session")
            if not self.ended.done():
                self.ended.set_exception(error)
        finally:
            self._is_busy = False

    def _set_timer(self, step: interface.Step | None) -> None:
        if step is None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if step.next_wake is not None:
            delay_s = max(0.0, step.next_wake - self._clock.monotonic())
            self._timer = self._loop.call_later(delay_s, self._advance)

    def _perform(self, action: interface.Action) -> None:
        match action:
            case interface.FindMasters():
                self._spawn(self._find_masters(), "find masters")
            case interface.Dial(stream, address):
                self._dial(stream, address)
            case interface.HangUp(stream):
                if (open_stream := self._streams.pop(stream, None)) is not None:
                    closing = asyncio.create_task(open_stream.close(), name=f"close stream {stream}")
                    self._closing.add(closing)
                    closing.add_done_callback(self._closing.discard)
            case interface.Send(stream, request):
                self._send(stream, request)
            case interface.SendHeartbeat(stream, heartbeat):
                heartbeat.metrics.CopyFrom(self._metrics())
                heartbeat.launches.extend(self._launcher.known_launches())
                heartbeat.launch_slots_free = self._launcher.slots_free
                self._send(stream, session_pb2.OpenRequest(heartbeat=heartbeat))
            case interface.GatherReports(everything):
                replicas = tuple(self._shards.reports()) if everything else ()
                self._events.append(interface.ReportsReady(replicas, tuple(self._launcher.pending_reports())))
            case interface.Apply(assignment, cluster_id):
                # Each shard's epoch and the assignment reach the disk side by side.
                self._shards.foresee(self._hosting.news(assignment))
                write = self._hosting.on_assignment(assignment, cluster_id)
                if write is not None:
                    self._spawn(self._persist(write), "persist assignments")
            case interface.Launch(order):
                launch = order.launch
                _log.debug("launch %s at %d ordered", launch.job_id, launch.scheduled_at_unix_ms, extra=_cause(order))
                self._launcher_calls.put_nowait(self._launch(order, self._lease_number))
            case interface.StopLaunch(stop):
                self._launcher_calls.put_nowait(self._launcher.stop_launch(stop))
            case interface.EndRuns(reason):
                self._end_runs(reason)
            case interface.Receipt(receipt):
                self._launcher_calls.put_nowait(self._launcher.on_receipt(receipt))
            case interface.End():
                if not self.ended.done():
                    self.ended.set_result(action)
            case _:
                assert_never(action)

    # What actions need

    def _dial(self, stream: int, address: str) -> None:
        self._streams[stream] = MasterStream(
            address,
            self._credentials,
            on_opened=lambda: self._feed(interface.StreamOpened(stream, tuple(self._launcher.pending_reports()))),
            on_response=lambda response: self._receive(stream, response),
            on_ended=lambda code, reason: self._feed(interface.StreamEnded(stream, code, reason)),
        )

    def _send(self, stream: int, request: session_pb2.OpenRequest) -> None:
        if (open_stream := self._streams.get(stream)) is not None:
            open_stream.send(request)

    async def _find_masters(self) -> None:
        masters = await self._discovery.masters()
        self._feed(interface.MastersFound(tuple(master.grpc_address for master in masters)))

    async def _persist(self, write: Persist | None) -> None:
        """Writes assignments until none waits; one that cannot be written is neither in force nor reported."""
        while write is not None:
            try:
                await asyncio.to_thread(write_durably, self._assignment_path, write.content)
            except OSError as error:
                self._storage_problem = f"{self._assignment_path} cannot be written: {error.strerror or error}"
                _log.error("%s; assignment %d waits", self._storage_problem, write.generation)
                await asyncio.sleep(PERSIST_RETRY_S)
                continue
            self._storage_problem = ""
            outcome = self._hosting.on_persisted()
            for sentence in outcome.ignored:
                _log.error("assignment %d: %s", outcome.generation, sentence)
            self._feed(interface.AssignmentApplied(outcome.generation))
            self._shards.follow(outcome.views, outcome.peers, outcome.copy_bytes_per_s)
            write = outcome.next_write

    def _end_runs(self, reason: str) -> None:
        """Ends what runs, and drops the orders that the launcher has not been handed: they came under that lease too.

        Everything else that waits for the launcher stays in its order.
        """
        self._launcher.end_lease(reason)
        self._lease_number += 1

    def _tell_lease(self) -> None:
        if self._session.lease_until != self._lease_until:
            self._lease_until = self._session.lease_until
            self._launcher.set_lease_end(self._lease_until)

    async def _launch(self, order: session_pb2.LaunchOrder, lease_number: int) -> None:
        if lease_number == self._lease_number:
            await self._launcher.launch(order)

    async def _call_launcher(self) -> None:
        """Hands orders and receipts to the launcher in the order in which they came."""
        while True:
            call = await self._launcher_calls.get()
            try:
                await call
            except Exception:
                # The order stays unconfirmed, so the leader gives it to another worker.
                _log.exception("the launcher failed")

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task %r failed", task.get_name(), exc_info=error)
            if not self.ended.done():
                self.ended.set_exception(error)

    def _receive(self, stream: int, response: session_pb2.OpenResponse) -> None:
        """Hands a message to the session, and logs why the leader does not take the worker.

        That is done here, because by the end of the round the session knows only what the last master said, which is
        mostly that it does not lead.
        """
        reason = response.farewell.reason
        is_refusal = self._session.phase is Phase.GREETING and reason and not response.farewell.final
        if is_refusal and reason != self._logged_refusal:
            self._logged_refusal = reason
            _log.warning("the leader does not take this worker yet: %s", reason)
        self._feed(interface.Received(stream, response))

    def _log_changes(self) -> None:
        """One line when a session opens or ends, and one for each new reason why there is none."""
        phase, problem = self._session.phase, self._session.last_problem
        if phase is Phase.OPEN and self._logged_phase is not Phase.OPEN:
            self._sessions_opened += 1
            self._logged_problem = self._logged_refusal = ""
            _log.info("session with leader %s is open", self._session.leader_id)
        elif self._logged_phase is Phase.OPEN and phase not in (Phase.OPEN, Phase.LEAVING, Phase.ENDED):
            self._logged_problem = problem
            _log.warning("session lost: %s", problem)
        elif phase is Phase.WAITING and problem and problem != self._logged_problem:
            self._logged_problem = problem
            _log.info("no session yet: %s", problem)
        self._logged_phase = phase


def _cause(order: session_pb2.LaunchOrder) -> dict[str, str]:
    return {"cause": order.launch.cause}
