"""A worker of the cron world: the real session machine, and a launcher with the promises of worker_agent/launcher.py.

What a kill leaves: the journal as it was synced, and processes of runs without an agent, which the next agent kills
before it says Hello. What is promised: a token is in the journal before its process starts, its result before it is
reported; a run whose worker loses the lease is stopped and has no result; nothing starts without a lease.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from coordinator.api.v1 import session_pb2, types_pb2
from tests.sim.cron_time import Alarm
from worker_agent import session_interface
from worker_agent.session import WorkerSession
from worker_agent.session_lease import NO_LEASE

if TYPE_CHECKING:
    from tests.sim.cron_net import Stream
    from tests.sim.cron_world import World

Token = tuple[str, int, int]
"""Job, scheduled time, attempt."""
GRACE_S = 5.0
LAUNCHES_MAX = 16
LAUNCHES_FEW = 1
"""In one seed of three, so that workers decline."""
CANCELLED = types_pb2.LAUNCH_STATE_CANCELLED
JOURNAL_MAX = 300
"""A leader orders a token again for seconds only, so this is long."""
FINAL = (
    types_pb2.LAUNCH_STATE_SUCCEEDED,
    types_pb2.LAUNCH_STATE_FAILED,
    types_pb2.LAUNCH_STATE_TIMED_OUT,
    types_pb2.LAUNCH_STATE_CANCELLED,
)


@dataclass(frozen=True, slots=True)
class Promises:
    """What the launcher keeps; each can be taken away to show what it is for."""

    journals_before_start: bool = True
    stops_without_lease: bool = True
    kills_what_outlived: bool = True


@dataclass(slots=True)
class Entry:
    """What the journal says of a token."""

    report: session_pb2.LaunchReport | None = None


@dataclass(slots=True, eq=False)
class Run:
    """A process that was started: what really happened."""

    token: Token
    worker: str
    started_at: float
    spec: types_pb2.CronJobSpec
    wish_s: float
    """How long it would take."""
    state: int
    """How it would end by itself."""
    ended_at: float | None = None
    lease_lost_at: float | None = None
    """When its worker first had no lease, as far as that is before its end."""
    stopping: str = ""
    """Why it was told to stop."""


@dataclass(slots=True)
class _Order:
    """An order that was accepted: it waits for the disk, or runs."""

    order: session_pb2.LaunchOrder
    run: Run | None = None
    running: session_pb2.LaunchReport | None = None
    stop_state: int = 0
    """How it is to be reported once it was stopped; 0 for not at all."""


class Worker:
    """A machine with its disk, its agents one after the other, and the runs on it."""

    def __init__(self, world: World, name: str, zone: str) -> None:
        self.world = world
        self.id = name
        self.zone = zone
        self.rng = random.Random(f"{world.seed} {name}")
        self.processes = 0
        self.process: Process | None = None
        self.journal: dict[Token, Entry] = {}
        self.unreceipted: dict[Token, session_pb2.LaunchReport] = {}
        """What the journal has of results without a receipt."""
        self.cluster_id = ""
        self.generation = 0
        self.slots = LAUNCHES_FEW if world.seed % 3 == 1 else LAUNCHES_MAX
        self.orphans: list[Run] = []
        """Runs that go on without an agent."""

    def start(self) -> None:
        """A new agent: kills what outlived the one before, then looks for the leader."""
        assert self.process is None
        now = self.world.time.now
        if self.world.promises.kills_what_outlived:
            for run in self.orphans:
                if run.ended_at is None:
                    run.ended_at = now
        self.orphans = []
        self.processes += 1
        self.process = Process(self)
        self.process.advance()

    def kill(self, *, is_machine: bool = False) -> None:
        """kill -9 of the agent, or of the whole machine with every run and no word to anybody."""
        process, self.process = self.process, None
        if process is None:
            return
        process.is_alive = False
        now = self.world.time.now
        for order in process.orders.values():
            run = order.run
            if run is None or run.ended_at is not None:
                continue
            if is_machine:
                run.ended_at = now
            else:
                self.orphans.append(run)
                self.world.time.at(max(now, run.started_at + run.wish_s), partial(_end, run))
            process.note_lease(run)
        if process.stream is not None:
            if is_machine:
                self.world.net.vanish(process.stream)
            else:
                self.world.net.hang_up(process.stream)


def _end(run: Run) -> None:
    if run.ended_at is None:
        run.ended_at = run.started_at + run.wish_s


@dataclass(eq=False)
class Process:
    """One agent."""

    worker: Worker
    is_alive: bool = True
    is_paused: bool = False
    orders: dict[Token, _Order] = field(default_factory=dict)
    stream: Stream | None = None

    def __post_init__(self) -> None:
        worker, world = self.worker, self.worker.world
        self.world = world
        self.number = worker.processes
        self._rng = worker.rng
        self._deferred: list[Callable[[], object]] = []
        self._is_stopping = False
        self._refusals: set[Token] = set()
        """Of which is being noted that they never start."""
        self.free_since: float | None = self.world.time.now
        """Since when it would take an order."""
        self._lease_seen = NO_LEASE
        node = types_pb2.Node(
            id=worker.id,
            zone=worker.zone,
            weight=1.0,
            incarnation=f"{worker.id}-{self.number}",
            grpc_address=f"{worker.id}:1",
            http_address=f"{worker.id}:2",
        )
        self.session = WorkerSession(
            node, world.config.name, self._rng, cluster_id=worker.cluster_id, generation=worker.generation
        )
        time = world.time
        self._alarm = Alarm(time.at_session, lambda: time.session_now, self.advance)
        self._lease_alarm = Alarm(time.at_session, lambda: time.session_now, self._look_at_lease)

    # Life

    def pause(self) -> None:
        """SIGSTOP of the agent; its runs go on."""
        self.is_paused = True

    def resume(self) -> None:
        """SIGCONT: what happened meanwhile is taken in now."""
        self.is_paused = False
        deferred, self._deferred = self._deferred, []
        for what in deferred:
            self._do(what)

    def _do(self, what: Callable[[], object]) -> None:
        if not self.is_alive:
            return
        if self.is_paused:
            self._deferred.append(what)
        else:
            what()

    def _later(self, delay_s: float, what: Callable[[], object]) -> None:
        self.world.time.after(delay_s, partial(self._do, what))

    # Session

    def advance(self) -> None:
        """The session's time has come."""
        self._do(lambda: self._step(self.session.on_advance(self.world.time.session_now)))

    def on_event(self, event: session_interface.Event) -> None:
        """Something for the session."""
        if self.is_alive and not self.is_paused:
            self._step(self.session.on_event(self.world.time.session_now, event))
        else:
            self._do(lambda: self._step(self.session.on_event(self.world.time.session_now, event)))

    def stream_opened(self, number: int) -> None:
        """A connection is up."""
        self._do(lambda: self.on_event(session_interface.StreamOpened(number, tuple(self._pending()))))

    def stop(self) -> None:
        """A clean stop: runs are ended without a result, then Goodbye."""
        self._is_stopping = True
        for order in list(self.orders.values()):
            self._stop_run(order, "the worker agent stops", 0)
        self._later(GRACE_S, lambda: self.on_event(session_interface.StopRequested("asked to stop")))

    def has_lease(self) -> bool:
        """True while it may start something."""
        return self.session.has_lease(self.world.time.session_now)

    def is_well(self) -> bool:
        """True when nothing of it waits for a session, and it has told everything."""
        if self.session.phase is not session_interface.Phase.OPEN or not self.has_lease():
            return False
        return not self.worker.unreceipted

    def _step(self, step: session_interface.Step) -> None:
        for action in step.actions:
            if not self.is_alive:
                return
            self._act(action)
        self._alarm.want(step.next_wake)
        if self.session.lease_until != self._lease_seen:
            self._lease_seen = self.session.lease_until
            self._lease_alarm.want(max(self._lease_seen, self.world.time.session_now))

    def _act(self, action: session_interface.Action) -> None:
        net = self.world.net
        match action:
            case session_interface.FindMasters():
                found = session_interface.MastersFound(tuple(sorted(self.world.masters)))
                self._later(0.001, lambda: self.on_event(found))
            case session_interface.Dial(stream, address):
                self.stream = None
                net.dial(self, stream, address)
            case session_interface.HangUp():
                if self.stream is not None:
                    net.hang_up(self.stream)
                    self.stream = None
            case session_interface.Send(_, request):
                if self.stream is not None:
                    net.send_up(self.stream, request)
            case session_interface.SendHeartbeat(_, heartbeat):
                self._name_launches(heartbeat)
                if self.stream is not None:
                    net.send_up(self.stream, session_pb2.OpenRequest(heartbeat=heartbeat))
            case session_interface.GatherReports():
                ready = session_interface.ReportsReady(launches=tuple(self._pending()))
                self._later(0.0, lambda: self.on_event(ready))
            case session_interface.Apply(assignment, cluster_id):
                self.worker.generation, self.worker.cluster_id = assignment.generation, cluster_id
                applied = session_interface.AssignmentApplied(assignment.generation)
                self._later(0.0, lambda: self.on_event(applied))
            case session_interface.Launch(order):
                self._launch(order)
            case session_interface.StopLaunch(stop):
                self._take_stop(stop)
            case session_interface.EndRuns():
                self._end_runs()
            case session_interface.Receipt(receipt):
                self._take_receipt(receipt)
            case session_interface.End():
                self.worker.kill()
            case _:
                raise AssertionError(f"the simulated driver does not know {action}")

    @property
    def slots_free(self) -> int:
        """How many more orders it would take."""
        return 0 if self._is_stopping else max(0, self.worker.slots - len(self.orders))

    @property
    def ends_in_silence(self) -> bool:
        """True while a run is being stopped that will have no result."""
        runs = [(order.run, order.stop_state) for order in self.orders.values() if order.run is not None]
        return any(run.lease_lost_at is not None or (run.stopping and not state) for run, state in runs)

    def _name_launches(self, heartbeat: session_pb2.Heartbeat) -> None:
        heartbeat.launch_slots_free = self.slots_free
        for job_id, scheduled_at_ms, attempt in {**self.orders, **self.worker.unreceipted}:
            heartbeat.launches.add(job_id=job_id, scheduled_at_unix_ms=scheduled_at_ms, attempt=attempt)

    # Lease

    def _look_at_lease(self) -> None:
        """Notes for the oracle which runs have lost it, also while the agent is paused and does not know."""
        if not self.is_alive:
            return
        if self.has_lease():
            self._lease_alarm.want(self.session.lease_until)
            return
        for order in self.orders.values():
            if order.run is not None:
                self.note_lease(order.run)

    def _end_runs(self) -> None:
        """The session says that the lease has ended: every run is told to stop."""
        self._look_at_lease()
        if not self.world.promises.stops_without_lease:
            return
        for order in list(self.orders.values()):
            if order.run is None or order.run.lease_lost_at is not None:
                self._stop_run(order, "the session lease ended", 0)

    def note_lease(self, run: Run) -> None:
        """Notes when the lease of a run that has not ended was, or is going to be, lost."""
        until = self.session.lease_until
        if run.lease_lost_at is None and run.ended_at is None:
            lost_at = self.world.time.now + until - self.world.time.session_now
            run.lease_lost_at = max(run.started_at, lost_at)

    # Launches

    def _launch(self, order: session_pb2.LaunchOrder) -> None:
        launch = order.launch
        token = (launch.job_id, launch.scheduled_at_unix_ms, launch.attempt)
        known = self.orders.get(token)
        if known is not None:
            if known.running is not None:
                self._report(known.running)
            return
        entry = self.worker.journal.get(token)
        if entry is not None:
            if entry.report is not None:
                self._report(entry.report)
            return
        if token in self._refusals:
            return
        if not self.slots_free:
            self._decline(token)
            return
        self.orders[token] = _Order(order)
        self._note_slots()
        self.world.worker_hook("order taken", self.worker)
        if self.is_alive:
            self._later(self._rng.uniform(0.000_2, 0.005), partial(self._begin, token))

    def _decline(self, token: Token) -> None:
        """It never starts here; that is on disk before it is said."""
        self.world.counts["declined"] += 1
        report = session_pb2.LaunchReport(
            job_id=token[0],
            scheduled_at_unix_ms=token[1],
            attempt=token[2],
            finished_unix_ms=self.world.true_ms,
            reason="no slot is free",
            decline=session_pb2.LAUNCH_DECLINE_BUSY,
        )
        self._refusals.add(token)
        self._later(self._rng.uniform(0.000_2, 0.005), partial(self._finish, token, report))

    def _note_slots(self) -> None:
        if not self.slots_free:
            self.free_since = None
        elif self.free_since is None:
            self.free_since = self.world.time.now

    def _begin(self, token: Token) -> None:
        """The disk has the token: the process may start."""
        order = self.orders.get(token)
        if order is None or order.run is not None:
            return
        if self.world.promises.journals_before_start:
            self.worker.journal[token] = Entry()
        self.world.worker_hook("journaled", self.worker)
        if not self.is_alive:
            return
        if not self.has_lease():
            self._forget(token)
            return
        wish_s, state = self.world.fate(self._rng, order.order.spec)
        now = self.world.time.now
        run = Run(token, self.worker.id, now, order.order.spec, wish_s, state)
        order.run = run
        self.world.oracle.started(run)
        order.running = session_pb2.LaunchReport(
            job_id=token[0],
            scheduled_at_unix_ms=token[1],
            attempt=token[2],
            state=types_pb2.LAUNCH_STATE_RUNNING,
            started_unix_ms=self.world.true_ms,
        )
        timeout_s = order.order.spec.timeout_s
        if wish_s <= timeout_s:
            self.world.time.after(wish_s, partial(self._process_ends, token, run))
        else:
            self._later(timeout_s, partial(self._time_out, token, run))
        self.world.worker_hook("started", self.worker)
        if self.is_alive:
            self._report(order.running)

    def _time_out(self, token: Token, run: Run) -> None:
        if run.ended_at is None and not run.stopping:
            order = self.orders[token]
            self._stop_run(order, f"stopped after its timeout of {run.spec.timeout_s:g} s", FINAL[2])

    def _process_ends(self, token: Token, run: Run) -> None:
        """The process comes to its own end, whether an agent is there to see it or not."""
        if run.ended_at is None:
            self._note_lease_at_end(run)
            run.ended_at = self.world.time.now
            self._do(partial(self._see_end, token, run, run.state))

    def _note_lease_at_end(self, run: Run) -> None:
        if self.is_alive and not self.has_lease():
            self.note_lease(run)

    def _stop_run(self, order: _Order, reason: str, state: int) -> None:
        """Asks a run to stop, and kills it after its grace. `state` 0: it has no result then."""
        launch = order.order.launch
        token = (launch.job_id, launch.scheduled_at_unix_ms, launch.attempt)
        run = order.run
        if run is None:
            self._forget(token)
            return
        if run.stopping or run.ended_at is not None:
            if not state:
                order.stop_state = 0
                run.stopping = reason
            return
        run.stopping, order.stop_state = reason, state
        self._later(self._rng.uniform(0.01, GRACE_S), partial(self._stopped, token, run))

    def _stopped(self, token: Token, run: Run) -> None:
        if run.ended_at is None:
            self._note_lease_at_end(run)
            run.ended_at = self.world.time.now
            order = self.orders.get(token)
            self._see_end(token, run, 0 if order is None else order.stop_state)

    def _see_end(self, token: Token, run: Run, state: int) -> None:
        """The agent notices that a process has ended; without a lease that is no result."""
        self.world.worker_hook("ended", self.worker)
        if not self.is_alive:
            return
        has_lost_lease = run.lease_lost_at is not None or not self.has_lease()
        if (has_lost_lease and self.world.promises.stops_without_lease) or not state:
            if not self.has_lease():
                self.note_lease(run)
            self._forget(token)
            return
        report = session_pb2.LaunchReport(
            job_id=token[0],
            scheduled_at_unix_ms=token[1],
            attempt=token[2],
            state=types_pb2.LaunchState.ValueType(state),
            started_unix_ms=self.orders[token].running.started_unix_ms,  # type: ignore[union-attr]
            finished_unix_ms=self.world.true_ms,
            reason=run.stopping,
            exit_status=0 if state == FINAL[0] else 1,
        )
        self._later(self._rng.uniform(0.000_2, 0.005), partial(self._finish, token, report))

    def _finish(self, token: Token, report: session_pb2.LaunchReport) -> None:
        """The result is on disk."""
        self._refusals.discard(token)
        self.worker.journal[token] = Entry(report)
        self.worker.unreceipted[token] = report
        self._forget(token)
        self.world.worker_hook("finished", self.worker)
        if self.is_alive:
            self._report(report)
            self.world.worker_hook("reported", self.worker)

    def _take_stop(self, stop: session_pb2.LaunchStop) -> None:
        """Ends a run, or sees to it that it never starts; either way the answer is on disk before it is sent."""
        token = (stop.token.job_id, stop.token.scheduled_at_unix_ms, stop.token.attempt)
        order, entry = self.orders.get(token), self.worker.journal.get(token)
        if order is not None and order.run is not None:
            self._stop_run(order, stop.reason, CANCELLED)
            return
        if entry is not None and entry.report is not None:
            self._report(entry.report)
            return
        if token in self._refusals:
            return
        self._forget(token)
        self._refusals.add(token)
        report = session_pb2.LaunchReport(
            job_id=token[0],
            scheduled_at_unix_ms=token[1],
            attempt=token[2],
            state=types_pb2.LAUNCH_STATE_CANCELLED,
            finished_unix_ms=self.world.true_ms,
            reason=stop.reason,
        )
        self._later(self._rng.uniform(0.000_2, 0.005), partial(self._finish, token, report))

    def _forget(self, token: Token) -> None:
        self.orders.pop(token, None)
        self._note_slots()

    def _pending(self) -> list[session_pb2.LaunchReport]:
        running = [order.running for order in self.orders.values() if order.running is not None]
        return [*self.worker.unreceipted.values(), *running]

    def _report(self, report: session_pb2.LaunchReport) -> None:
        self.on_event(session_interface.ReportsReady(launches=(report,)))

    def _take_receipt(self, receipt: session_pb2.LaunchReportReceipt) -> None:
        token = (receipt.job_id, receipt.scheduled_at_unix_ms, receipt.attempt)
        if receipt.state == types_pb2.LAUNCH_STATE_RUNNING or self.worker.unreceipted.pop(token, None) is None:
            return
        if len(self.worker.journal) > JOURNAL_MAX:
            settled = [known for known in self.worker.journal if known not in self.worker.unreceipted]
            for old in settled[: JOURNAL_MAX // 2]:
                del self.worker.journal[old]
