"""A worker as the control protocol sees it: sessions, leases, reports, launches; it holds no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.control import interface

if TYPE_CHECKING:
    from tests.sim.control_world import World


class FakeWorker:
    """One worker and its processes, one after the other."""

    def __init__(self, world: World, name: str, zone: str, weight: float) -> None:
        self.world = world
        self.id = name
        self.zone = zone
        self.weight = weight
        self.processes = 0
        self.is_running = False
        self.is_silent = False
        """Its process is stopped (SIGSTOP): it sends nothing, and reads nothing."""
        self.session = 0
        self.is_welcome = False
        self.lease_until = 0.0
        self.generation = 0
        self.held: dict[int, session_pb2.ShardAssignment] = {}
        self.copies_s = 0.2
        """Longest time that a copy takes."""
        self.cedes = True
        self.caught_up: set[tuple[int, int, str]] = set()
        """(shard, epoch, joining worker) that this primary says has caught up."""
        self.failing: dict[tuple[int, int], session_pb2.ReplicaReport] = {}
        """What it says of a shard at one epoch instead: that its copy is lost, or that another one lags."""
        self.has_left = False
        self.is_stopping = False
        self.launched: list[tuple[str, int, int]] = []
        self._known: set[tuple[str, int, int]] = set()
        """Launches from their order to the receipt of their end."""
        self._sequence = 0
        self._sent_at: dict[int, float] = {}
        self._unread: list[tuple[int, session_pb2.OpenResponse]] = []
        self._unsaid: dict[tuple[str, int], session_pb2.LaunchReport] = {}
        self._orders: list[session_pb2.LaunchOrder] = []
        """Orders that wait for a lease."""

    @property
    def incarnation(self) -> str:
        """The present process."""
        return f"{self.id}-{self.processes}"

    # Life

    def start(self) -> None:
        """A new process."""
        self.processes += 1
        self.is_running, self.is_silent, self.has_left, self.is_stopping = True, False, False, False
        self.session, self.is_welcome, self.lease_until, self.generation = 0, False, 0.0, 0
        self.held, self._sent_at, self._unread, self._unsaid = {}, {}, [], {}
        self.caught_up, self.failing = set(), {}
        self._later(0.01, self._connect)
        self._later(1.0, self._repeat)

    def crash(self) -> None:
        """kill -9: the stream breaks with it."""
        self.is_running = False
        self.world.break_session(self.session)
        self.session = 0

    def pause(self) -> None:
        """SIGSTOP: the stream stays open."""
        self.is_silent = True

    def resume(self) -> None:
        """SIGCONT: what came in meanwhile is read now."""
        self.is_silent = False
        unread, self._unread = self._unread, []
        for session, message in unread:
            self.receive(session, message)

    def stop(self) -> None:
        """A clean stop."""
        self.lease_until, self.is_stopping = 0.0, True
        self.world.report(self, interface.GoodbyeReceived(self.session, self.id, "asked to stop"))

    def _later(self, delay_s: float, what: object) -> None:
        process = self.processes

        def act() -> None:
            if self.is_running and self.processes == process and callable(what):
                what()

        self.world.after(delay_s, act)

    # Session

    def _connect(self) -> None:
        if self.session or self.has_left:
            return
        hello = session_pb2.Hello(
            node=self.world.node_proto(self),
            cluster_name=self.world.config.name,
            protocol_version=1,
            applied_generation=self.generation,
            launches=list(self._unsaid.values()),
        )
        self.session = 0 if self.is_silent else self.world.open_session(self, hello)
        if self.session:
            self._sequence, self._sent_at = 0, {}
        else:
            self._later(self.world.rng.uniform(0.05, 0.3), self._connect)

    def stream_ended(self, session: int) -> None:
        """The stream broke, or the leader closed it."""
        if session == self.session:
            self.session, self.is_welcome, self._orders = 0, False, []
            self.is_running &= not self.is_stopping
            self._later(self.world.rng.uniform(0.01, 0.2), self._connect)

    def receive(self, session: int, message: session_pb2.OpenResponse) -> None:
        """A message from the leader."""
        if session != self.session or not self.is_running:
            return
        if self.is_silent:
            self._unread.append((session, message))
            return
        kind = message.WhichOneof("message")
        assert self.is_welcome or kind in ("welcome", "farewell"), f"{kind} came before the Welcome"
        if kind == "welcome":
            self.is_welcome = True
            self._report_all()
            self._beat(session)
        elif kind == "lease_grant":
            sent_at = self._sent_at.pop(message.lease_grant.heartbeat_sequence)
            self.lease_until = max(self.lease_until, sent_at + self.world.config.session.session_lease_s)
            orders, self._orders = self._orders, []
            for order in orders:
                self._launch(order)
        elif kind == "assignment":
            self._take(message.assignment)
        elif kind == "launch_order":
            self._orders.append(message.launch_order)
            if self.lease_until > self.world.now:
                self._launch(self._orders.pop())
        elif kind == "launch_report_receipt":
            receipt = message.launch_report_receipt
            said = self._unsaid.get((receipt.job_id, receipt.scheduled_at_unix_ms))
            if receipt.state != types_pb2.LAUNCH_STATE_RUNNING or receipt.refusal:
                self._known.discard((receipt.job_id, receipt.scheduled_at_unix_ms, receipt.attempt))
            if said is not None and (said.attempt, said.state) == (receipt.attempt, receipt.state):
                del self._unsaid[receipt.job_id, receipt.scheduled_at_unix_ms]
        elif kind == "farewell" and (message.farewell.final or self.is_stopping):
            self.has_left, self.is_running = message.farewell.final, False

    def _beat(self, session: int) -> None:
        if session != self.session:
            return
        if not self.is_silent:
            self._sequence += 1
            self._sent_at[self._sequence] = self.world.now
            tokens = [session_pb2.LaunchToken(job_id=j, scheduled_at_unix_ms=t, attempt=a) for j, t, a in self._known]
            heartbeat = session_pb2.Heartbeat(
                sequence=self._sequence, applied_generation=self.generation, launches=tokens
            )
            self.world.report(self, interface.HeartbeatReceived(session, self.id, heartbeat))
        self._later(self.world.config.session.heartbeat_s, lambda: self._beat(session))

    # Shards

    def _take(self, assignment: session_pb2.Assignment) -> None:
        if assignment.generation <= self.generation:
            return
        self.generation = assignment.generation
        before, self.held = self.held, {entry.shard.id: entry for entry in assignment.shards}
        for shard_id, entry in self.held.items():
            if before.get(shard_id) != entry:
                self._later(self.world.rng.uniform(0.001, 0.02), lambda entry=entry: self._report([entry]))
                if entry.role == session_pb2.REPLICA_ROLE_PRIMARY:
                    for name in entry.shard.joining:
                        delay_s = self.world.rng.uniform(0.001, self.world.workers[name].copies_s)
                        self._later(delay_s, lambda entry=entry, name=name: self._catch_up(entry, name))

    def _catch_up(self, entry: session_pb2.ShardAssignment, name: str) -> None:
        """A joining replica has everything."""
        self.caught_up.add((entry.shard.id, entry.shard.epoch, name))
        self._report([self.held.get(entry.shard.id, entry)])

    def fail(self, shard_id: int, lagging: str = "") -> None:
        """Its copy is lost, or it says as the primary that another one lags."""
        entry = self.held[shard_id]
        epoch = entry.shard.epoch
        lost = session_pb2.REPLICA_PROGRESS_LOST
        self.failing[shard_id, epoch] = session_pb2.ReplicaReport(
            shard_id=shard_id,
            epoch=epoch,
            progress=session_pb2.REPLICA_PROGRESS_ACCEPTED if lagging else lost,
            lagging=[lagging] if lagging else [],
            reason="simulated",
        )
        self._report([entry])

    def _said(self, entry: session_pb2.ShardAssignment) -> session_pb2.ReplicaReport:
        shard = entry.shard
        failing = self.failing.get((shard.id, shard.epoch))
        if failing is not None:
            return failing
        progress = session_pb2.REPLICA_PROGRESS_ACCEPTED
        if (entry.cede_to or entry.seal) and self.cedes:
            progress = session_pb2.REPLICA_PROGRESS_CEDED
        caught_up = [name for name in shard.joining if (shard.id, shard.epoch, name) in self.caught_up]
        return session_pb2.ReplicaReport(
            shard_id=shard.id, epoch=shard.epoch, progress=progress, caught_up=caught_up
        )

    def _report_all(self) -> None:
        self._report(list(self.held.values()))

    def _report(self, entries: list[session_pb2.ShardAssignment]) -> None:
        reports = tuple(
            self._said(entry)
            for entry in entries
            if self.held.get(entry.shard.id) == entry
        )
        if reports and self.is_welcome and not self.is_silent:
            self.world.report(self, interface.ReplicasReported(self.session, self.id, reports))

    # Launches

    def _launch(self, order: session_pb2.LaunchOrder) -> None:
        launch = order.launch
        token = (launch.job_id, launch.scheduled_at_unix_ms, launch.attempt)
        if token in self.launched:
            return
        self.launched.append(token)
        self._known.add(token)
        report = session_pb2.LaunchReport(
            job_id=launch.job_id,
            scheduled_at_unix_ms=launch.scheduled_at_unix_ms,
            attempt=launch.attempt,
            state=types_pb2.LAUNCH_STATE_RUNNING,
        )
        self._say(report)
        ended = session_pb2.LaunchReport()
        ended.CopyFrom(report)
        ended.state = types_pb2.LAUNCH_STATE_SUCCEEDED
        self._later(self.world.rng.uniform(0.01, 0.5), lambda: self._say(ended))

    def _repeat(self) -> None:
        """Says again what has no receipt."""
        for report in list(self._unsaid.values()):
            self._say(report)
        self._later(1.0, self._repeat)

    def _say(self, report: session_pb2.LaunchReport) -> None:
        self._unsaid[report.job_id, report.scheduled_at_unix_ms] = report
        if self.is_welcome and not self.is_silent:
            self.world.report(self, interface.LaunchReported(self.session, self.id, report))
