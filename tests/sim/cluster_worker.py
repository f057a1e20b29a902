"""A simulated worker with the real session machine, the real memory of assignments and the real replica machines.

Played are the event loop, the streams and the disk: what driver.py, shards.py and shard.py do around the machines, in
their order. A shard's store is found as order rule 3 of shards.py wants it: what is there is opened, a child is made of
its parents, a joining replica or one of a shard that was never formed begins anew, any other reports itself LOST.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, assert_never, cast

from coordinator.api.v1 import replication_pb2, session_pb2, types_pb2
from coordinator.model import Monotonic, key_hash
from tests.sim import replica_worker
from tests.sim.cluster_leader import ACCEPTED
from tests.sim.cluster_route import Arrival, Routes
from tests.sim.cluster_store import cut
from tests.sim.replica_store import ModelBacked, SimStore
from worker_agent import session_interface as session_events
from worker_agent.agent import HAND_OVER_S
from worker_agent.driver import PERSIST_RETRY_S
from worker_agent.gone_shards import GoneShards
from worker_agent.hosting import Hosting, Persist, decode
from worker_agent.replica_primary import State
from worker_agent.session import WorkerSession
from worker_agent.shard import NEVER_PROMISED, OPEN_AGAIN_S, OPEN_ATTEMPTS
from worker_agent.shard_interface import (
    Assigned,
    Foresee,
    Progress,
    ReplicaRole,
    ReplicaStep,
    ReportReplica,
    SendToPeer,
    ShardView,
)
from worker_agent.state_interface import Elsewhere, Place
from worker_agent.store_interface import StoreFull

if TYPE_CHECKING:
    from tests.sim.cluster_net import SessionStream
    from tests.sim.cluster_world import WorkerSide, World

FIGURES_S = 1.0


class Hosted(replica_worker.Hosted):
    """A replica machine with its store; tells its worker when what it shows has changed."""

    worker: Worker
    _shown: tuple[object, ...] = ()

    def _take(self, step: ReplicaStep) -> None:
        super()._take(step)
        machine = self.machine
        shown = (machine.epoch, machine.state, machine.primary_id, machine.is_serving)
        if shown != self._shown:
            self._shown = shown
            self.worker.changed()


class Slot:
    """One shard that a worker shall hold: plays shard.py. As far as routing asks it is a HostedShard."""

    def __init__(self, worker: Worker, view: ShardView, promised_from: Monotonic) -> None:
        self.worker = worker
        self.view = view
        self.hosted: Hosted | None = None
        self.last_report: session_pb2.ReplicaReport | None = None
        self.is_closed = False
        self._life = worker.life
        self._is_lost = False
        self._promised_from = promised_from
        self._open_later(1)

    # What routing asks

    @property
    def shard_id(self) -> int:
        return self.view.shard_id

    @property
    def epoch(self) -> int:
        return self.view.epoch

    @property
    def primary_epoch(self) -> int:
        has_ceded = self.hosted is not None and self.hosted.machine.state == State.CEDED.value
        return self.view.epoch + 1 if has_ceded else self.view.epoch

    @property
    def primary(self) -> Place:
        name = (self.hosted.machine.primary_id if self.hosted is not None else "") or self.view.primary
        return Place(name, name)

    @property
    def is_primary(self) -> bool:
        return self.primary.node_id == self.worker.name

    @property
    def is_serving(self) -> bool:
        return self.hosted is not None and self.hosted.machine.is_serving

    # Opening

    def _is_mine(self) -> bool:
        return not self.is_closed and self.worker.is_up and self.worker.life == self._life

    def _open_later(self, attempt: int, seconds: float = 0.0) -> None:
        worker = self.worker

        def run() -> None:
            if self._is_mine():
                worker.enqueue(lambda _: self._open(attempt))

        worker.world.after(seconds + worker.sync_delay_s(), run)

    def _open(self, attempt: int) -> None:
        if not self._is_mine() or self.hosted is not None:
            return
        worker = self.worker
        try:
            store = self._find_store()
        except StoreFull as error:
            if attempt == OPEN_ATTEMPTS:
                self._lose(str(error))
            else:
                self._open_later(attempt + 1, OPEN_AGAIN_S)
            return
        if store is None:
            self._lose("its store is not there")
            return
        self.hosted = worker.hosted[self.shard_id] = Hosted(worker, self.view, store, self._promised_from)
        worker.changed()
        worker.forget_parents(self.view)

    def _find_store(self) -> SimStore | ModelBacked | None:
        worker, view = self.worker, self.view
        store = worker.stores.get(view.shard_id)
        if store is not None:
            return store
        may_begin = view.role is ReplicaRole.JOINING
        if worker.is_full:
            raise StoreFull("no space left on device")
        parents = [worker.stores.get(parent) for parent in view.parents]
        if not may_begin and parents and None not in parents:
            self._promised_from = NEVER_PROMISED
            made = cut([parent for parent in parents if parent is not None], view.lo, view.hi)
            worker.world.checks.made(worker.name, view.shard_id, made)
            return worker.keep_store(view, made)
        if may_begin or not view.is_formed:
            self._promised_from = NEVER_PROMISED
            return worker.keep_store(view, worker.new_store(view))
        return None

    def _lose(self, reason: str) -> None:
        self._is_lost = True
        self.report(ReportReplica(self.view.epoch, Progress.LOST, reason=reason))

    def close(self) -> None:
        """The shard is given up."""
        self.is_closed = True
        hosted, self.hosted = self.hosted, None
        if hosted is not None:
            hosted.is_dropped = True
            del self.worker.hosted[self.shard_id]

    # What happens

    def assign(self, view: ShardView) -> None:
        """This is the shard now."""
        if view == self.view:
            return
        self.view = view
        if self._is_lost:
            if view.role is ReplicaRole.JOINING:
                self._is_lost = False
                if self.hosted is not None:
                    self.hosted.is_dropped = True
                    del self.worker.hosted[self.shard_id]
                    self.hosted = None
                self.worker.stores.pop(self.shard_id, None)
                self._promised_from = self.worker.clock()
                self._open_later(1)
            else:
                self.report(ReportReplica(view.epoch, Progress.LOST, reason="it still has no data"))
        elif self.hosted is not None:
            self.hosted.view = view
            self.hosted.feed(Assigned(view))

    def report(self, said: ReportReplica) -> None:
        """Tells the leader."""
        self._is_lost |= said.progress is Progress.LOST
        self.last_report = session_pb2.ReplicaReport(
            shard_id=self.shard_id,
            epoch=said.epoch,
            progress=session_pb2.ReplicaProgress.ValueType(said.progress.value),
            caught_up=said.caught_up,
            lagging=said.lagging,
            last_sequence=self.hosted.machine.last_sequence if self.hosted is not None else 0,
            reason=said.reason,
        )
        self.worker.report_later(self.last_report)

    @property
    def is_unwritable(self) -> bool:
        """True while its store takes no writes."""
        return not self._is_lost and self.hosted is not None and bool(self.hosted.machine.problem)

    def figure(self) -> session_pb2.ShardFigure | None:
        """How much is in it, where this worker is its primary."""
        if self.hosted is None or not self.is_primary:
            return None
        hashes = sorted(map(key_hash, self.hosted.store.registers()))
        median = hashes[len(hashes) // 2] if len(hashes) >= 2 else 0
        return session_pb2.ShardFigure(
            shard_id=self.shard_id,
            users=len(hashes),
            median_hash=median,
            last_sequence=self.hosted.machine.last_sequence,
        )


class Worker(replica_worker.Worker):
    """One worker through all its lives: plays driver.py and shards.py."""

    world: WorkerSide
    session: WorkerSession
    hosted: dict[int, Hosted]  # type: ignore[assignment]

    def __init__(self, world: WorkerSide, name: str, rng: random.Random) -> None:
        super().__init__(world, name, rng)
        self.is_powered = True
        self.is_full = False
        self.slots: dict[int, Slot] = {}
        self._file = b""
        """The assignment that is on disk."""
        self._hosting = Hosting()
        self._streams: dict[int, SessionStream] = {}
        self._events: deque[session_events.Event] = deque()
        self._is_busy = False
        self._wake: Monotonic | None = None
        self._reports: dict[int, session_pb2.ReplicaReport] = {}
        self._dropped_at: dict[int, Monotonic] = {}
        self._gone = GoneShards()
        self._has_swept = False
        self.is_stopping = False
        self._lows: list[int] = []
        self._by_range: list[Slot] = []
        self._started_at = Monotonic(0.0)
        self.routes = Routes(self)

    @property
    def cluster(self) -> World:
        """The whole world."""
        return self.world.cluster

    def has_session(self, now: Monotonic) -> bool:
        return self.session.has_lease(now)

    def sync_delay_s(self) -> float:
        """How long a small file takes to be on disk."""
        return 0.000_2 + self.sync_s_max * self._rng.random() ** 2

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Has this life of it do something after a while."""
        life = self.life

        def due(worker: replica_worker.Worker) -> None:
            if self.life == life:
                action()

        self.world.after(seconds, lambda: self.enqueue(due) if self.life == life else None)

    # Lives

    def start(self) -> None:
        stored = decode(self._file, self.name) if self._file else None
        self.session = WorkerSession(
            types_pb2.Node(
                id=self.name,
                weight=1.0,
                incarnation=f"{self.name}-{self.life + 1}",
                grpc_address=self.name,
                http_address=self.name,
            ),
            self.cluster.config.name,
            random.Random(f"{self.world.seed} {self.name} session {self.life}"),
            cluster_id=stored.cluster_id if stored is not None else "",
            generation=stored.assignment.generation if stored is not None else 0,
        )
        self._hosting = Hosting(stored)
        self.slots, self._streams, self._reports, self._dropped_at, self._gone = {}, {}, {}, {}, GoneShards()
        self._has_swept = self.is_stopping = False
        self._lows, self._by_range = [], []
        self._events.clear()
        self._wake, self._is_busy, self.is_powered = None, False, True
        self._started_at = self.clock()
        self.routes = Routes(self)
        self.world.note(f"{self.name} starts")
        self.world.net.follow(self.name, ())
        super().start()
        self.later(self._rng.uniform(0.0, FIGURES_S), self._tell_figures)
        self._run(self.session.on_advance(self.clock()))

    def crash(self, *, is_silent: bool) -> None:
        if self.is_up:
            self.world.note(f"{self.name} {'loses its power' if is_silent else 'is killed'}")
            self.is_powered = not is_silent
            super().crash(is_silent=is_silent)
            self.slots = {}
            self.world.net.end_sessions_of(self.name, is_silent=is_silent)

    def stop(self) -> None:
        """A clean stop: hands over as hand_over.py does, says Goodbye, and ends."""
        if self.is_stopping or not self.is_up or self.is_paused:
            return
        self.world.note(f"{self.name} is stopped")
        self.is_stopping = True
        handing = [slot for slot in self.slots.values() if slot.is_serving and len(slot.view.in_sync) > 1]
        for slot in handing:
            slot.assign(replace(slot.view, is_sealed=True))
        self._leave(handing, self.clock() + HAND_OVER_S)

    def _leave(self, handing: list[Slot], give_up_at: float) -> None:
        states = [(slot, slot.hosted.machine.state) for slot in handing if slot.hosted is not None]
        if any(state == State.CEDING.value for _, state in states) and self.clock() < give_up_at:
            self.later(0.005, lambda: self._leave(handing, give_up_at))
            return
        for slot, state in states:
            if state == State.CEDED.value and slot.hosted is not None:
                ceded = replication_pb2.Ceded(last_sequence=slot.hosted.machine.last_sequence)
                message = replication_pb2.ShardMessage(shard_id=slot.shard_id, epoch=slot.view.epoch, ceded=ceded)
                for peer in slot.view.in_sync:
                    if peer != self.name:
                        self.send(SendToPeer(peer, message, False))
        self._feed(session_events.StopRequested("it is restarted"))

    def set_full(self, is_full: bool) -> None:
        """Its disk has no room any more, or has some again."""
        self.is_full = is_full
        for store in self.stores.values():
            store.is_full = is_full

    def _beat_on(self, life: int) -> None:
        """The session machine beats."""

    # The session's driver

    def _feed(self, event: session_events.Event) -> None:
        self._events.append(event)
        if not self._is_busy:
            self._run(None)

    def _run(self, step: session_events.Step | None) -> None:
        self._is_busy = True
        while True:
            if step is not None:
                for action in step.actions:
                    self._perform(action)
            if not self._events:
                break
            step = self.session.on_event(self.clock(), self._events.popleft())
        self._is_busy = False
        self.session.validate()
        wake = step.next_wake if step is not None else None
        if wake is not None and wake != self._wake:
            self._wake = wake
            delay_s = max(0.0, self.world_time(max(wake, self.clock())) - self.world.now_s)
            self.later(delay_s, lambda: self._advance(wake))

    def _advance(self, wake: Monotonic) -> None:
        if self._wake == wake:
            self._wake = None
            # Rounding may ring the bell a moment too early.
            self._run(self.session.on_advance(Monotonic(max(self.clock(), wake))))

    def _perform(self, action: session_events.Action) -> None:
        match action:
            case session_events.FindMasters():
                found = session_events.MastersFound(self.cluster.ids)
                self.later(0.001, lambda: self._feed(found))
            case session_events.Dial(number, address):
                self._streams[number] = self.world.net.open_session(self.name, number, address)
            case session_events.HangUp(number):
                stream = self._streams.pop(number, None)
                if stream is not None:
                    stream.close(self.name)
            case session_events.Send(number, request):
                self._send(number, request)
            case session_events.SendHeartbeat(number, heartbeat):
                heartbeat.metrics.unwritable_shards = sum(slot.is_unwritable for slot in self.slots.values())
                self._send(number, session_pb2.OpenRequest(heartbeat=heartbeat))
            case session_events.GatherReports(everything):
                said = [slot.last_report for _, slot in sorted(self.slots.items())] if everything else []
                reports = tuple(report for report in said if report is not None)
                self._events.append(session_events.ReportsReady(reports))
            case session_events.Apply(assignment, cluster_id):
                for shard_id, epoch in self._hosting.news(assignment).items():
                    if (hosted := self.hosted.get(shard_id)) is not None:
                        hosted.feed(Foresee(epoch))
                self._persist(self._hosting.on_assignment(assignment, cluster_id))
            case session_events.EndRuns():
                pass
            case session_events.Launch() | session_events.StopLaunch() | session_events.Receipt():
                raise AssertionError("there are no cron jobs here")
            case session_events.End():
                assert self.is_stopping, f"{self.name} ends: {action.reason}"
                self.later(0.0, lambda: self.crash(is_silent=False))
            case _:
                assert_never(action)

    def _send(self, number: int, request: session_pb2.OpenRequest) -> None:
        stream = self._streams.get(number)
        if stream is not None:
            stream.send(self.name, request)

    def take_session(self, stream: SessionStream, item: Any) -> None:
        """What comes down a session: that it is open, a message, its end (None)."""
        if item is None:
            stream.vanish(self.name)
            self._feed(session_events.StreamEnded(stream.number, "UNAVAILABLE", "the connection is gone"))
        elif item == ACCEPTED:
            self._feed(session_events.StreamOpened(stream.number))
        else:
            self._feed(session_events.Received(stream.number, item))

    def _persist(self, write: Persist | None) -> None:
        if write is None:
            return

        def written() -> None:
            if self.is_full:
                self.later(PERSIST_RETRY_S, written)
                return
            self._file = write.content
            outcome = self._hosting.on_persisted()
            self._hosting.validate()
            self._feed(session_events.AssignmentApplied(outcome.generation))
            self._follow(outcome.views, outcome.peers)
            self._persist(outcome.next_write)

        self.later(self.sync_delay_s(), written)

    def report(self, hosted: replica_worker.Hosted) -> None:
        slot = self.slots.get(hosted.shard_id)
        if slot is not None and hosted.report is not None:
            slot.hosted = cast("Hosted", hosted)
            slot.report(hosted.report)

    def report_later(self, report: session_pb2.ReplicaReport) -> None:
        """What is reported in one turn of the event loop goes together."""
        if not self._reports:
            self.later(0.000_1, self._flush_reports)
        self._reports[report.shard_id] = report

    def _flush_reports(self) -> None:
        reports, self._reports = tuple(self._reports.values()), {}
        self._feed(session_events.ReportsReady(reports))

    def _tell_figures(self) -> None:
        figures = [figure for _, slot in sorted(self.slots.items()) if (figure := slot.figure()) is not None]
        if figures:
            self._feed(session_events.ReportsReady(figures=session_pb2.ShardFigures(shards=figures)))
        self.later(FIGURES_S, self._tell_figures)

    # Shards

    def _follow(self, views: Sequence[ShardView], addresses: Mapping[str, str]) -> None:
        """An assignment is in force; as Shards.follow."""
        wanted = {view.shard_id: view for view in views}
        for shard_id in [held for held in self.slots if held not in wanted]:
            self._give_up(self.slots.pop(shard_id))
        peers = {name for view in views for name in (*view.in_sync, *view.joining)} - {self.name}
        self.world.net.follow(self.name, tuple(name for name in sorted(peers) if addresses.get(name)))
        for shard_id, view in wanted.items():
            self._gone.remove(shard_id)
            slot = self.slots.get(shard_id)
            if slot is None:
                promised_from = self._dropped_at.pop(shard_id, self._started_at)
                self.slots[shard_id] = Slot(self, view, promised_from)
            else:
                slot.assign(view)
        self._by_range = sorted(self.slots.values(), key=lambda slot: slot.view.lo)
        self._lows = [slot.view.lo for slot in self._by_range]
        if not self._has_swept:
            self._has_swept = True
            for shard_id in sorted(self.stores):
                if shard_id not in self.slots:
                    self._forget_later(shard_id)
        self.changed()

    def _give_up(self, slot: Slot) -> None:
        view = slot.view
        self._dropped_at[view.shard_id] = self.clock()
        self._gone.add(view.lo, view.hi, Elsewhere(view.shard_id, view.epoch, slot.primary))
        slot.close()
        self._forget_later(view.shard_id)

    def _forget_later(self, shard_id: int) -> None:
        def forget() -> None:
            if any(shard_id in slot.view.parents and slot.hosted is None for slot in self.slots.values()):
                self._forget_later(shard_id)
            elif shard_id not in self.slots:
                self.stores.pop(shard_id, None)

        self.later(self.cluster.cluster_plan.forget_s, forget)

    def forget_parents(self, view: ShardView) -> None:
        """A child is open: once all that are held here are, the parents' files go."""
        for parent in view.parents:
            children = [slot for slot in self.slots.values() if parent in slot.view.parents]
            if all(child.hosted is not None for child in children) and parent not in self.slots:
                self.stores.pop(parent, None)

    def new_store(self, view: ShardView) -> SimStore | ModelBacked:
        """An empty store; a joining replica's has to be filled."""
        kind = ModelBacked if self.world.plan.has_model_stores else SimStore
        is_complete = view.role is not ReplicaRole.JOINING
        return kind(is_complete=is_complete, log_records_kept=self.world.plan.log_kept)

    def keep_store(self, view: ShardView, store: SimStore | ModelBacked) -> SimStore | ModelBacked:
        """Puts a store that was made in its place."""
        shard_id = view.shard_id
        store.on_apply = lambda record: self.world.checks.applied(self, shard_id, record)
        store.is_full = self.is_full
        self.stores[shard_id] = store
        return store

    # Clients

    def locate(self, hashed: int) -> Slot | Elsewhere:
        """The shard whose range has the hash; as Shards.locate."""
        place = bisect_right(self._lows, hashed) - 1
        if place >= 0 and hashed < (slot := self._by_range[place]).view.hi:
            return slot
        return self._gone.locate(hashed)

    def changed(self) -> None:
        """A shard's role, epoch, serving or primary is another one: what waits looks again."""
        self.routes.changed()

    def ask(self, arrival: Arrival) -> None:
        """A request comes in."""
        self.routes.take(arrival)
