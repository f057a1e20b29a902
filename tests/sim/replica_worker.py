"""A simulated worker: the host of real replica machines, their stores, a clock of its own, and the door for clients.

As the real host it performs actions in order, one store operation of a shard at a time, and decides on writes against
what is applied and what is on its way. A pause keeps everything that happens for later; a crash keeps the stores, as
far as they were durable.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.api.v1 import replication_pb2
from coordinator.model import Monotonic, WallMs
from coordinator.model.errors import CoordinatorError, NotPrimary
from tests.replica_driver import perform
from tests.sim.replica_net import Stream
from tests.sim.replica_store import ModelBacked, SimStore, payload_of
from worker_agent.replica import Replica
from worker_agent.shard_interface import (
    ApplyLog,
    Assigned,
    Barrier,
    Foresee,
    PeerConnected,
    PeerLost,
    PeerSaid,
    ReadChunk,
    ReadLog,
    ReplicaEvent,
    ReplicaRole,
    ReplicaStep,
    ReportReplica,
    SeeEpoch,
    SendToPeer,
    Settle,
    ShardView,
    StoreDone,
    StoreFailed,
    StoreOperation,
    Submit,
)
from worker_agent.store_interface import LogRecord

if TYPE_CHECKING:
    from tests.sim.replica_world import World

SESSION_S = 3.0
HEARTBEAT_S = 0.4


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks. `expected` is set for a compare-and-set."""

    shard_id: int
    register: str
    is_write: bool = False
    value: str | None = None
    request_id: str = ""
    expected: str | None = None
    is_conditional: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers: a value, a sequence, or an error."""

    value: str | None = None
    sequence: int = 0
    is_conflict: bool = False
    error: CoordinatorError | None = None


Answer = Callable[[Reply], None]


class Hosted:
    """One shard on one worker in one life."""

    def __init__(
        self, worker: Worker, view: ShardView, store: SimStore | ModelBacked, promised_from: Monotonic | None = None
    ) -> None:
        """`promised_from` is when the worker may last have given a lease that the machine knows nothing of."""
        self.worker = worker
        self.shard_id = view.shard_id
        self.store = store
        self.life = worker.life
        self.is_dropped = False
        world = worker.world
        promised_from = worker.clock() if promised_from is None else promised_from
        self.machine = Replica(
            worker.name, view.shard_id, world.plan.times, worker.has_session, promised_from, world.protections
        )
        self.view = view
        self.report: ReportReplica | None = None
        self.queue: deque[StoreOperation] = deque()
        self._is_busy = False
        self._has_failed = False
        self._wake_s = float("inf")
        self._tokens: dict[int, Callable[[Settle], None]] = {}
        self._next_token = 0
        self._overlay: dict[str, tuple[int, str | None]] = {}
        self._waiting: dict[str, list[Answer]] = {}
        self.feed(Assigned(view, store.position()))
        for stream in worker.outgoing.values():
            self.feed(PeerConnected(stream.other))

    @property
    def is_alive(self) -> bool:
        """False once its process is gone, or the shard was taken away."""
        return self.worker.life == self.life and self.worker.is_up and not self.is_dropped

    def feed(self, event: ReplicaEvent) -> None:
        """An event for the machine."""
        self._take(self.machine.on_event(self.worker.clock(), event))

    def _advance(self, wake_s: float) -> None:
        if self.is_alive and self._wake_s == wake_s:
            self._wake_s = float("inf")
            self._take(self.machine.on_advance(self.worker.clock()))

    def _take(self, step: ReplicaStep) -> None:
        world = self.worker.world
        world.checks.stepped(self)
        for action in step.actions:
            match action:
                case SendToPeer():
                    self.worker.send(action)
                case Settle():
                    self._tokens.pop(action.token)(action)
                case ReportReplica():
                    self.report = action
                    world.note(f"{self.worker.name} reports of {self.shard_id}: {action}")
                    world.checks.reported(self, action)
                    self.worker.report(self)
                case _:
                    self.queue.append(action)
        self._work()
        if step.next_wake is not None:
            wake_s = self.worker.world_time(step.next_wake)
            if wake_s < self._wake_s or self._wake_s < world.now_s:
                self._wake_s = wake_s
                world.at(wake_s, lambda: self.worker.enqueue(lambda worker: self._advance(wake_s)))

    # The store's thread

    def _work(self) -> None:
        if self.queue and not self._is_busy and not self._has_failed:
            self._is_busy = True
            delay_s = self.worker.disk_delay_s(self.queue[0])
            self.worker.world.after(delay_s, self._end_operation)

    def _end_operation(self) -> None:
        if not self.is_alive:
            return
        self._is_busy = False
        operation = self.queue.popleft()
        end: StoreDone | StoreFailed
        try:
            end = perform(self.store, operation)
        except (CoordinatorError, KeyError) as error:
            self._has_failed = True
            end = StoreFailed(operation, error, self.store.position())
        self.worker.enqueue(lambda worker: self._ended(end))
        self._work()

    def _ended(self, end: StoreDone | StoreFailed) -> None:
        if self.is_alive:
            if isinstance(end, StoreFailed):
                self._has_failed = False
                self.queue.clear()
            self.feed(end)

    def crash(self, rng: random.Random) -> None:
        """The process ends, perhaps right behind the operation that was going on."""
        if self.queue and self._is_busy and rng.random() < 0.5:
            try:
                perform(self.store, self.queue[0])
            except (CoordinatorError, KeyError):
                pass
        self.store.crash(rng)

    # Clients

    def _barrier(self, settled: Callable[[Settle], None]) -> None:
        self._next_token += 1
        self._tokens[self._next_token] = settled
        self.feed(Barrier(self._next_token))

    def _sure(self, then: Callable[[], None], answer: Answer) -> None:
        """Does it once it is sure that what is applied here is the newest."""

        def settled(end: Settle) -> None:
            if end.error is not None:
                answer(Reply(error=end.error))
            else:
                then()

        if self.machine.may_read(self.worker.clock()):
            then()
        else:
            self._barrier(settled)

    def handle(self, request: Request, answer: Answer) -> None:
        """A client's request."""
        if not self.machine.is_serving:
            answer(Reply(error=NotPrimary("not primary", self.machine.primary_id)))
        elif not request.is_write:
            self._sure(lambda: answer(Reply(self.store.get(request.register))), answer)
        else:
            self._write(request, answer)

    def _write(self, request: Request, answer: Answer) -> None:
        known = self.store.request(request.register, request.request_id)
        if known is not None:
            answer(Reply(sequence=known))
            return
        if request.request_id in self._waiting:
            self._waiting[request.request_id].append(answer)
            return
        on_its_way = self._overlay.get(request.register)
        current = on_its_way[1] if on_its_way is not None else self.store.get(request.register)
        if request.is_conditional and current != request.expected:
            if on_its_way is not None:
                answer(Reply(error=NotPrimary("the value is being changed", self.worker.name)))
            else:
                self._sure(lambda: answer(self._conflict(request)), answer)
            return
        self._waiting[request.request_id] = [answer]
        self._next_token += 1
        token = self._next_token
        self._overlay[request.register] = (token, request.value)

        def settled(end: Settle) -> None:
            if self._overlay.get(request.register, (0, ""))[0] == token:
                del self._overlay[request.register]
            reply = Reply(sequence=end.sequence, error=end.error)
            if end.error is None:
                self.worker.world.checks.acknowledged(self.shard_id, end.sequence, request.request_id)
            for waiting in self._waiting.pop(request.request_id):
                waiting(reply)

        self._tokens[token] = settled
        payload = payload_of(request.register, request.value, request.request_id)
        self.feed(Submit(token, payload, WallMs(int(self.worker.world.now_s * 1_000))))

    def _conflict(self, request: Request) -> Reply:
        found = self.store.get(request.register)
        if found == request.expected:
            return Reply(error=NotPrimary("it changed meanwhile", self.worker.name))
        return Reply(found, is_conflict=True)


class Worker:
    """One worker through all its lives."""

    def __init__(self, world: World, name: str, rng: random.Random) -> None:
        self.world = world
        self.name = name
        self._rng = rng
        self.rate = 1.0 + rng.uniform(-world.plan.drift, world.plan.drift)
        self._offset_s = rng.uniform(10, 1_000)
        self.life = 0
        self.is_up = False
        self.is_paused = False
        self._backlog: deque[Callable[[Worker], None]] = deque()
        self.stores: dict[int, SimStore | ModelBacked] = {}
        self.hosted: dict[int, Hosted] = {}
        self.outgoing: dict[str, Stream] = {}
        self.generation = 0
        self._lease_until = float("-inf")
        self.sync_s_max = 0.001
        self._is_beating = False

    # Time

    def clock(self) -> Monotonic:
        """Its monotonic clock."""
        return Monotonic(self._offset_s + self.rate * self.world.now_s)

    def world_time(self, moment: Monotonic) -> float:
        """When its clock will show that."""
        return (moment - self._offset_s) / self.rate

    def has_session(self, now: Monotonic) -> bool:
        """Its session lease."""
        return now < self._lease_until

    def disk_delay_s(self, operation: StoreOperation) -> float:
        """How long the store takes."""
        if isinstance(operation, ApplyLog | ReadLog | ReadChunk):
            return 0.000_1 + 0.1 * self.sync_s_max * self._rng.random() ** 2
        return 0.000_2 + self.sync_s_max * self._rng.random() ** 2

    def enqueue(self, action: Callable[[Worker], None]) -> None:
        """Something happens at its process, now or when it runs again."""
        if not self.is_up:
            return
        if self.is_paused:
            self._backlog.append(action)
        else:
            action(self)

    # Lives

    def start(self) -> None:
        """A new process."""
        self.life += 1
        self.is_up, self.is_paused = True, False
        self._backlog.clear()
        self.hosted, self.outgoing, self.generation = {}, {}, 0
        self._lease_until = float("-inf")
        for other in self.world.workers:
            if other != self.name:
                self.world.net.dial(self.name, other)
        self._beat_on(self.life)

    def crash(self, *, is_silent: bool) -> None:
        """The process ends."""
        if not self.is_up:
            return
        self.is_up = False
        for hosted in self.hosted.values():
            hosted.crash(self._rng)
        for shard_id, store in self.stores.items():
            if shard_id not in self.hosted:
                store.crash(self._rng)
        self.hosted = {}
        self.world.net.drop_of(self.name, is_silent=is_silent)

    def pause(self) -> None:
        """The process stands still."""
        self.is_paused = True

    def resume(self) -> None:
        """It goes on, with everything that happened meanwhile."""
        if not self.is_paused:
            return
        self.is_paused = False
        while self._backlog and self.is_up and not self.is_paused:
            self._backlog.popleft()(self)

    # Streams

    def connected(self, stream: Stream) -> None:
        """A stream of its own is open."""
        if stream.is_open:
            self.outgoing[stream.other] = stream
            for hosted in list(self.hosted.values()):
                hosted.feed(PeerConnected(stream.other))

    def disconnected(self, stream: Stream) -> None:
        """A stream of its own has ended."""
        if self.outgoing.get(stream.other) is stream:
            del self.outgoing[stream.other]
            for hosted in list(self.hosted.values()):
                hosted.feed(PeerLost(stream.other))

    def send(self, action: SendToPeer) -> None:
        """A message of a machine."""
        key = (action.node_id, self.name) if action.is_answer else (self.name, action.node_id)
        stream = self.world.net.streams.get(key)
        if stream is not None and stream.is_open and (action.is_answer or self.outgoing.get(key[1]) is stream):
            stream.send(self.name, action.message)

    def take(self, stream: Stream, sender: str, message: replication_pb2.ShardMessage, is_answer: bool) -> None:
        """A message came in."""
        if not stream.is_open or (is_answer and self.outgoing.get(sender) is not stream):
            return
        hosted = self.hosted.get(message.shard_id)
        if hosted is not None:
            hosted.feed(PeerSaid(sender, message, is_answer))
        elif not is_answer:
            refusal = replication_pb2.ShardMessage(shard_id=message.shard_id, epoch=message.epoch)
            refusal.refuse.reason = "not held here"
            stream.send(self.name, refusal)

    # The master

    def _beat_on(self, life: int) -> None:
        if self.life == life and self.is_up:
            self.enqueue(lambda worker: worker.beat())
            self.world.after(HEARTBEAT_S, lambda: self._beat_on(life))

    def report(self, hosted: Hosted) -> None:
        """Something is to be reported."""
        if not self._is_beating:
            self._is_beating = True
            self.world.after(0.001, lambda: self.enqueue(lambda worker: worker.beat()))

    def beat(self) -> None:
        """A heartbeat with all reports."""
        self._is_beating = False
        reports = {shard_id: hosted.report for shard_id, hosted in self.hosted.items() if hosted.report is not None}
        self.world.master.hear(self.name, self.life, self.generation, reports, self.clock())

    def granted(self, life: int, sent_at: Monotonic) -> None:
        """The master has answered a heartbeat."""
        if life == self.life:
            self._lease_until = max(self._lease_until, sent_at + SESSION_S)

    def heard(self, life: int, generation: int, views: list[ShardView]) -> None:
        """An assignment has come. It is in force once it is on disk; its new epochs go there meanwhile."""
        if life != self.life or generation <= self.generation:
            return
        for view in views:
            hosted = self.hosted.get(view.shard_id)
            if hosted is not None and view.epoch > hosted.view.epoch:
                hosted.feed(Foresee(view.epoch))
        delay_s = self.disk_delay_s(SeeEpoch(0))
        self.world.after(delay_s, lambda: self.enqueue(lambda worker: worker.assigned(life, generation, views)))

    def assigned(self, life: int, generation: int, views: list[ShardView]) -> None:
        """Everything that it shall hold."""
        if life != self.life or generation <= self.generation:
            return
        self.generation = generation
        named = {view.shard_id for view in views}
        for shard_id in [shard_id for shard_id in self.hosted if shard_id not in named]:
            self.hosted.pop(shard_id).is_dropped = True
            if self._rng.random() < 0.5:
                del self.stores[shard_id]
        for view in views:
            hosted = self.hosted.get(view.shard_id)
            if hosted is not None and hosted.report is not None and hosted.report.progress.name == "LOST":
                if view.role is ReplicaRole.JOINING:
                    hosted.is_dropped = True
                    self.stores.pop(view.shard_id, None)
                    hosted = None
            if hosted is None:
                self.hosted[view.shard_id] = Hosted(self, view, self._store(view))
            else:
                hosted.view = view
                hosted.feed(Assigned(view))

    def _store(self, view: ShardView) -> SimStore | ModelBacked:
        store = self.stores.get(view.shard_id)
        if store is None:
            is_complete = view.role is not ReplicaRole.JOINING
            kind = ModelBacked if self.world.plan.has_model_stores else SimStore
            store = kind(is_complete=is_complete, log_records_kept=self.world.plan.log_kept)
            shard_id = view.shard_id

            def on_apply(record: LogRecord) -> None:
                self.world.checks.applied(self, shard_id, record)

            store.on_apply = on_apply
            store.is_full = any(other.is_full for other in self.stores.values())
            self.stores[view.shard_id] = store
        return store
