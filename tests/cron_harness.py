"""Drives CronControl over the real state machine, with clocks that the test moves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.config import CronSettings
from coordinator.control.cron import CronControl
from coordinator.control.interface import (
    Action,
    Applied,
    Event,
    HeartbeatReceived,
    LaunchReported,
    ProposalEnded,
    Propose,
    SendLaunch,
    SendToNode,
    SessionOpened,
    Step,
    StopLaunch,
    Tokens,
)
from coordinator.control.timers import Gathered
from coordinator.machine.codec import job_spec_to_proto
from coordinator.machine.machine import apply
from coordinator.machine.state import Change, State
from coordinator.machine.validate import validate, validate_step
from coordinator.model import CronJobSpec, Launch, LaunchState, ManualClock, Monotonic, WallMs
from coordinator.model.errors import OutcomeUnknown

START_MS = 1_767_268_800_000
"""2026-01-01T12:00:00Z."""


def every_second(**fields: Any) -> CronJobSpec:
    """A job that is due every second."""
    return CronJobSpec(**{"id": "tick", "schedule": "* * * * * *", "command": ("true",), **fields})


class CronHarness:
    """One cluster: a log, and the controller of whoever leads.

    With `hold` set, proposals wait in `held`; otherwise they are applied at once, in order.
    """

    def __init__(self, *specs: CronJobSpec, workers: tuple[str, ...] = ("w1", "w2", "w3")) -> None:
        self.clock = ManualClock(wall_ms=START_MS)
        self.state = State()
        self.control: CronControl | None = None
        self.orders: list[SendLaunch] = []
        self.stops: list[StopLaunch] = []
        self.receipts: list[session_pb2.LaunchReportReceipt] = []
        self.proposed: list[command_pb2.Command] = []
        self.held: deque[Propose] = deque()
        self.hold = False
        self.wake: Monotonic | None = None
        self.on_changes: Callable[[tuple[Change, ...]], None] = lambda changes: None
        self.report_gather_s = 0.0
        """Reports do not wait for each other, unless a test is about that."""
        self.accept(bootstrap_cluster=command_pb2.BootstrapCluster(cluster_id="c1", shards=1))
        for worker in workers:
            self.add_worker(worker)
        for spec in specs:
            self.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(spec), source="api"))
            self.assign(spec.id, *workers)

    # The log

    def accept(self, **operation: Any) -> None:
        """Applies a command of somebody else; it must not be refused."""
        result = self.apply(command_pb2.Command(cause="test", **operation))
        assert result.HasField("applied"), result

    def apply(self, command: command_pb2.Command) -> command_pb2.CommandResult:
        """Appends a command to the log; the leader's controller sees what it did."""
        transition = apply(self.state, command, self.state.index + 1, self.clock.wall_ms())
        validate(transition.state)
        validate_step(self.state, transition.state)
        self.state = transition.state
        self.on_changes(transition.changes)
        self.feed(Applied(transition.state, transition.changes))
        return transition.result

    def add_worker(self, name: str, incarnation: str = "1") -> None:
        """Registers a worker and admits it."""
        node = types_pb2.Node(id=name, incarnation=incarnation, weight=1.0, grpc_address=f"{name}:1")
        self.accept(register_node=command_pb2.RegisterNode(node=node))
        self.accept(activate_node=command_pb2.ActivateNode(node_id=name, incarnation=incarnation))

    def suspect(self, name: str, incarnation: str = "1") -> None:
        """The masters do not hear a worker."""
        self.accept(suspect_node=command_pb2.SuspectNode(node_id=name, incarnation=incarnation, reason="test"))

    def expire(self, name: str, incarnation: str = "1") -> None:
        """A worker's lease ended."""
        self.accept(expire_node=command_pb2.ExpireNode(node_id=name, incarnation=incarnation, reason="test"))

    def assign(self, job_id: str, *workers: str) -> None:
        """Gives a job its owner and backups."""
        assignment = command_pb2.AssignJobs.Assignment(
            job_id=job_id, owner=workers[0] if workers else "", backups=workers[1:]
        )
        self.accept(assign_jobs=command_pb2.AssignJobs(assignments=[assignment]))

    # The leader

    def lead(self, order_timeout_s: float = 5.0, catch_up_per_s: float = 10.0) -> None:
        """A new leader begins; what the old one had not decided is forgotten."""
        self.held.clear()
        settings = CronSettings(order_timeout_s=order_timeout_s, catch_up_per_s=catch_up_per_s)
        now, wall = self.clock.monotonic(), self.clock.wall_ms()
        self.control = CronControl(self.state, settings, Tokens(), now, wall)
        self.control._reported = Gathered(self.report_gather_s)
        self.advance(0)

    def feed(self, event: Event) -> None:
        """Gives the controller an event and does what it wants."""
        if self.control is not None:
            self._do(self.control.on_event(self.clock.monotonic(), self.clock.wall_ms(), event))

    def advance(self, seconds: float) -> None:
        """Lets time pass; the controller is called when it asked to be."""
        end = self.clock.monotonic() + seconds
        while self.control is not None and self.wake is not None and self.wake < end:
            self.clock.advance(max(0.0, self.wake - self.clock.monotonic()))
            before, proposed = self.wake, len(self.proposed)
            self.tick()
            assert self.wake is None or self.wake > before or len(self.proposed) > proposed, "the controller spins"
        self.clock.advance(max(0.0, end - self.clock.monotonic()))
        self.tick()

    def tick(self) -> None:
        """Calls the controller now."""
        if self.control is not None:
            self._do(self.control.on_advance(self.clock.monotonic(), self.clock.wall_ms()))

    def release(self, *, lose: bool = False, result_first: bool = False) -> None:
        """Ends the oldest held proposal: applied, or lost with an unknown outcome."""
        propose = self.held.popleft()
        if lose:
            self.feed(ProposalEnded(propose.token, None, OutcomeUnknown("the leader changed")))
            return
        if not result_first:
            self.feed(ProposalEnded(propose.token, self.apply(propose.command), None))
            return
        transition = apply(self.state, propose.command, self.state.index + 1, self.clock.wall_ms())
        self.feed(ProposalEnded(propose.token, transition.result, None))
        self.state = transition.state
        self.feed(Applied(transition.state, transition.changes))

    def _do(self, step: Step) -> None:
        self.wake = step.next_wake
        for action in step.actions:
            self._act(action)
        while self.held and not self.hold:
            self.release()

    def _act(self, action: Action) -> None:
        match action:
            case Propose(_, command):
                self.proposed.append(command)
                self.held.append(action)
            case SendLaunch():
                self.orders.append(action)
            case StopLaunch():
                self.stops.append(action)
            case SendToNode(_, message):
                self.receipts.append(message.launch_report_receipt)
            case _:
                raise AssertionError(f"not a cron action: {action}")

    # The workers

    def open_session(self, node_id: str, *launches: session_pb2.LaunchReport, session: int = 1) -> None:
        """A worker says Hello."""
        hello = session_pb2.Hello(node=types_pb2.Node(id=node_id), launches=launches)
        self.feed(SessionOpened(session, hello))

    def report(self, node_id: str, report: session_pb2.LaunchReport, session: int = 1) -> None:
        """A worker reports."""
        self.feed(LaunchReported(session, node_id, report))

    def heartbeat(self, node_id: str, *launches: Launch, session: int = 1, slots_free: int | None = None) -> None:
        """A worker's heartbeat names what it has, and tells how many more it would start where that is given."""
        tokens = [
            session_pb2.LaunchToken(
                job_id=launch.job_id, scheduled_at_unix_ms=launch.scheduled_at_ms, attempt=launch.attempt
            )
            for launch in launches
        ]
        heartbeat = session_pb2.Heartbeat(launches=tokens, launch_slots_free=slots_free)
        self.feed(HeartbeatReceived(session, node_id, heartbeat))

    def start(self, order: SendLaunch) -> None:
        """The worker of an order starts it."""
        self.report(order.node_id, report_of(order.launch, LaunchState.RUNNING))

    def finish(self, order: SendLaunch, state: LaunchState = LaunchState.SUCCEEDED) -> None:
        """The worker of an order runs it to its end."""
        self.start(order)
        self.report(order.node_id, report_of(order.launch, state))

    def decline(self, order: SendLaunch, *, unfit: bool = False, session: int = 1) -> None:
        """The worker of an order declines it."""
        report = session_pb2.LaunchReport(
            job_id=order.launch.job_id,
            scheduled_at_unix_ms=order.launch.scheduled_at_ms,
            attempt=order.launch.attempt,
            decline=session_pb2.LAUNCH_DECLINE_UNFIT if unfit else session_pb2.LAUNCH_DECLINE_BUSY,
            reason="it needs a POSIX system" if unfit else "no slot is free",
        )
        self.report(order.node_id, report, session)

    def cancel(self, second: int, job_id: str = "tick", reason: str = "enough") -> None:
        """Somebody wants a launch to stop."""
        at_ms = START_MS + second * 1_000
        cancel = command_pb2.CancelLaunch(job_id=job_id, scheduled_at_unix_ms=at_ms, reason=reason)
        self.accept(cancel_launch=cancel)

    # What is seen

    def history(self, job_id: str = "tick") -> list[Launch]:
        """The launches of a job that are kept, by scheduled time."""
        return [self.state.launches[(job_id, at)] for at in self.state.launch_times.get(job_id, ())]

    def story(self, job_id: str = "tick") -> list[tuple[int, str]]:
        """The launches as (seconds since the start, state)."""
        return [((launch.scheduled_at_ms - START_MS) // 1_000, launch.state.name) for launch in self.history(job_id)]

    def launch(self, second: int, job_id: str = "tick") -> Launch:
        """One launch, by its scheduled second since the start."""
        return self.state.launches[(job_id, WallMs(START_MS + second * 1_000))]


def report_of(launch: Launch, state: LaunchState) -> session_pb2.LaunchReport:
    """What a worker says of a launch."""
    return session_pb2.LaunchReport(
        job_id=launch.job_id,
        scheduled_at_unix_ms=launch.scheduled_at_ms,
        attempt=launch.attempt,
        state=types_pb2.LaunchState.ValueType(state.value),
        started_unix_ms=launch.scheduled_at_ms,
    )
