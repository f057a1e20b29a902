"""One hosted shard: a replica machine with its store, its timer and whoever waits for it. Driven by shards.py.

Nothing here awaits but the opening and the closing: events are fed and actions performed on the event loop. Store
operations queue up and run in batches in the thread pool; each that ended well comes back as StoreDone in its order. A
copy's chunk is read when the copy rate allows, so it alone may be overtaken.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from coordinator.api.v1 import session_pb2
from coordinator.model import Monotonic
from coordinator.model.errors import CoordinatorError, Damaged, NotPrimary, OutcomeUnknown
from worker_agent import shard_interface as interface
from worker_agent.record_time import RecordTime
from worker_agent.replica import Replica
from worker_agent.replica_primary import State
from worker_agent.shard_context import ShardContext
from worker_agent.shard_interface import Progress, ReplicaRole, ReportReplica, ShardView, StoreDone, StoreFailed
from worker_agent.shard_store import find_store
from worker_agent.state_interface import Place
from worker_agent.store import delete_store
from worker_agent.store_care import StoreCare
from worker_agent.store_interface import Reader
from worker_agent.store_queue import CHUNK_BYTES, StoreQueue

Result = TypeVar("Result")
OPEN_ATTEMPTS = 5
OPEN_AGAIN_S = 1.0
NEVER_PROMISED = Monotonic(-math.inf)

_log = logging.getLogger(__name__)


class Shard:
    """One shard of this worker; a HostedShard of state_interface.py. `open` is called once, `close` at the end."""

    def __init__(self, view: ShardView, path: Path, context: ShardContext, promised_from: Monotonic) -> None:
        """`promised_from` is when this worker may last have given a lease that this object knows nothing of."""
        self.view = view
        self.last_report: session_pb2.ReplicaReport | None = None
        self._path = path
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._queue: StoreQueue | None = None
        self._replica: Replica | None = None
        self._is_closed = False
        self._is_lost = False
        """True while there is no store that may be used, although this replica is in sync."""
        self._again: asyncio.Task[None] | None = None
        self._promised_from = promised_from
        self._timer: asyncio.TimerHandle | None = None
        self._tokens = itertools.count(1)
        self._record_time = RecordTime()
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self.care = StoreCare(
            view.shard_id, context.scrub_tally, self._used_queue, self._is_last_copy, self._give_up_damaged
        )
        self._shown: tuple[object, ...] = ()
        self._was_serving = False

    # Opening and closing

    @property
    def is_open(self) -> bool:
        """True once there is a replica with a store."""
        return self._replica is not None

    @property
    def is_opening(self) -> bool:
        """True while its store is being opened or made."""
        return self._replica is None and not self._is_lost and not self._is_closed

    async def open(self, parents: Sequence[Path] = ()) -> None:
        """Opens or makes the store, and begins; or reports the replica as lost."""
        view = self.view
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                found = await self._in_thread(
                    partial(find_store, self._path, view, parents, self._context.store_settings)
                )
                break
            except (OSError, CoordinatorError) as error:
                if isinstance(error, Damaged) or attempt == OPEN_ATTEMPTS:
                    self._lose(str(error))
                    return
                # A full disk, or too many open files: that may pass, and to lose a copy costs more than to wait.
                _log.warning("shard %d cannot be opened yet: %s", view.shard_id, error)
                await asyncio.sleep(OPEN_AGAIN_S)
        if found is None:
            self._lose(f"{self._path.name} is not there")
            return
        context, store = self._context, found.store
        if found.is_new:
            self._promised_from = NEVER_PROMISED
        self._queue = StoreQueue(store, context.pool, context.copies_pool, self._on_store)
        if self._is_closed:
            await self._close_store()
            return
        position = store.position()
        self._replica = Replica(
            context.node_id, view.shard_id, context.times, context.has_session_lease, self._promised_from
        )
        self.feed(interface.Assigned(self.view, position))
        for peer in context.connected_peers():
            self.feed(interface.PeerConnected(peer))

    def _lose(self, reason: str) -> None:
        self._is_lost = True
        _log.error("shard %d: this replica has no data that can be used: %s", self.view.shard_id, reason)
        self._report(ReportReplica(self.view.epoch, Progress.LOST, reason=reason))

    async def close(self) -> None:
        """Ends it; what was not settled is unknown."""
        self._is_closed = True
        self._replica = None
        self._show()
        self._set_timer(None)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(OutcomeUnknown(f"shard {self.view.shard_id} was closed here; ask again"))
        self._waiting.clear()
        if self._again is not None:
            self._again.cancel()
            await asyncio.gather(self._again, return_exceptions=True)
        await self._close_store()
        self._context.on_changed()

    async def _close_store(self) -> None:
        queue, self._queue = self._queue, None
        if queue is not None:
            await queue.close()

    def _in_thread(self, function: Callable[[], Result]) -> asyncio.Future[Result]:
        return self._loop.run_in_executor(self._context.pool, function)

    # Events

    def assign(self, view: ShardView) -> None:
        """This is the shard now."""
        if view is self.view or view == self.view:
            return
        self.view = view
        self.care.look_again()
        if self._is_lost:
            if view.role is ReplicaRole.JOINING:
                self._is_lost = False
                self._begin_anew()
            else:
                self._report(ReportReplica(view.epoch, Progress.LOST, reason="it still has no data"))
        elif self.is_open:
            # Of a damaged copy no others can be made: it goes on, and the leader gives the cut or the join up.
            is_whole = not (view.is_sealed and self.care.damage)
            self.feed(interface.Assigned(view if is_whole else replace(view, is_sealed=False)))

    def _begin_anew(self) -> None:
        async def again() -> None:
            await self._close_store()
            await self._in_thread(partial(delete_store, self._path))
            await self.open()

        self._replica = None
        self.care.begin_anew()
        self._show()
        self._promised_from = self._context.clock.monotonic()
        self._again = asyncio.create_task(again(), name=f"begin shard {self.view.shard_id} anew")

    def feed(self, event: interface.ReplicaEvent) -> None:
        """Lets the replica take an event in, and performs what it wants."""
        if self._replica is not None:
            self._take(self._replica.on_event(self._context.clock.monotonic(), event))

    def _advance(self) -> None:
        self._timer = None
        if self._replica is not None:
            self._take(self._replica.on_advance(self._context.clock.monotonic()))

    def _take(self, step: interface.ReplicaStep) -> None:
        for action in step.actions:
            self._perform(action)
        self._set_timer(step.next_wake)
        if self._queue is not None:
            self._queue.start()
        self._show()

    def _show(self) -> None:
        shown = (self.view.epoch, self.view.role, self.state, self.primary)
        if shown != self._shown:
            self._shown = shown
            if self.state in ("following", "serving") and not self.care.damage and not self.care.is_given_up:
                self._context.scrub_tally.note_whole(self.view.shard_id)
            self._context.on_changed()
        if self.is_serving != self._was_serving:
            self._was_serving = self.is_serving
            self._context.on_serving(self, self._was_serving)

    def _set_timer(self, wake: Monotonic | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wake is not None:
            delay_s = max(0.0, wake - self._context.clock.monotonic())
            self._timer = self._loop.call_later(delay_s, self._advance)

    def _perform(self, action: interface.ReplicaAction) -> None:
        match action:
            case interface.SendToPeer(node_id, message, is_answer):
                self._context.send(node_id, message, is_answer)
            case interface.Settle(token, sequence, error):
                self._settle(token, sequence, error)
            case interface.ReportReplica():
                if action.progress is Progress.LOST:
                    self._is_lost = True
                self._report(action)
            case interface.ReadChunk():
                self._read_chunk(action, self._context.copy_rate.book(self._loop.time(), CHUNK_BYTES))
            case _:
                assert self._queue is not None, "a replica has a store"
                self._queue.put(action)

    def _settle(self, token: int, sequence: int, error: CoordinatorError | None) -> None:
        future = self._waiting.pop(token, None)
        if future is None or future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(sequence)

    def _report(self, action: ReportReplica) -> None:
        report = session_pb2.ReplicaReport(
            shard_id=self.view.shard_id,
            epoch=action.epoch,
            progress=session_pb2.ReplicaProgress.ValueType(action.progress.value),
            caught_up=action.caught_up,
            lagging=action.lagging,
            last_sequence=self.last_sequence,
            reason=action.reason,
        )
        self.last_report = report
        self._context.report(report)

    def _on_store(self, event: StoreDone | StoreFailed) -> None:
        if isinstance(event, StoreFailed):
            _log.warning("shard %d: %s", self.view.shard_id, event.error)
            if isinstance(event.error, Damaged) and self.care.note(event.error):
                return
        self.feed(event)

    def _used_queue(self) -> StoreQueue | None:
        return self._queue if self.is_open and not self._is_lost else None

    def _is_last_copy(self) -> bool:
        return self.view.in_sync == (self._context.node_id,)

    def _give_up_damaged(self, error: Damaged) -> None:
        self.feed(StoreFailed(interface.SeeEpoch(0), error, None))

    def note_damage(self, error: Damaged) -> bool:
        return self.care.note(error)

    def _read_chunk(self, action: interface.ReadChunk, place: int) -> None:
        if self._queue is None or self._replica is None:
            return
        delay_s = self._context.copy_rate.delay_s(self._loop.time(), place)
        if delay_s:
            self._loop.call_later(delay_s, self._read_chunk, action, place)
        else:
            self._queue.put(action)
            self._queue.start()

    # HostedShard

    @property
    def shard_id(self) -> int:
        return self.view.shard_id

    @property
    def last_sequence(self) -> int:
        """The last record that is on disk."""
        return self._replica.last_sequence if self._replica is not None else 0

    @property
    def epoch(self) -> int:
        return self.view.epoch

    @property
    def primary_epoch(self) -> int:
        return self.view.epoch + 1 if self.state == State.CEDED.value else self.view.epoch

    @property
    def primary(self) -> Place:
        known = self._replica.primary_id if self._replica is not None else ""
        return self._context.place(known or self.view.primary)

    @property
    def is_primary(self) -> bool:
        return self.primary.node_id == self._context.node_id

    @property
    def is_serving(self) -> bool:
        return self._replica is not None and self._replica.is_serving

    @property
    def in_sync_count(self) -> int:
        return len(self.view.in_sync)

    @property
    def reader(self) -> Reader | None:
        return self._queue.store.reader() if self._queue is not None and self._replica is not None else None

    def may_read(self) -> bool:
        return self._replica is not None and self._replica.may_read(self._context.clock.monotonic())

    def barrier(self) -> Awaitable[None]:
        async def wait() -> None:
            await self._ask(lambda token: interface.Barrier(token))

        return wait()

    def submit(self, payload: bytes) -> asyncio.Future[int]:
        clock, newest_ms = self._context.clock, self._queue.store.newest_ms if self._queue is not None else 0
        time_ms = self._record_time.next_ms(clock.monotonic(), clock.wall_ms(), newest_ms)
        return self._ask(lambda token: interface.Submit(token, payload, time_ms))

    def _ask(self, make: Callable[[int], interface.ReplicaEvent]) -> asyncio.Future[int]:
        future: asyncio.Future[int] = self._loop.create_future()
        if not self.is_serving:
            place = self.primary
            future.set_exception(
                NotPrimary(
                    f"worker {self._context.node_id} does not serve shard {self.view.shard_id} now; its primary is "
                    f"{place.node_id or 'not known'}",
                    primary_id=place.node_id,
                    primary_address=place.address,
                    shard_id=self.view.shard_id,
                )
            )
            return future
        token = next(self._tokens)
        self._waiting[token] = future
        self.feed(make(token))
        return future

    def stale_age_s(self) -> float | None:
        if self._replica is None:
            return None
        age_s = self._replica.age_s(self._context.clock.monotonic())
        return age_s if age_s < math.inf else None

    # For people and for the leader

    @property
    def is_unwritable(self) -> bool:
        """True while its store takes no writes, mostly because the disk is full."""
        return not self._is_lost and self._replica is not None and bool(self._replica.problem)

    @property
    def state(self) -> str:
        """What it is doing, in a word."""
        if self._is_lost:
            return "lost"
        return self._replica.state if self._replica is not None else "opening"

    async def figures(self) -> session_pb2.ShardFigure | None:
        """How much is in it; None while it has no store."""
        found = await self.care.ask(lambda store: store.figures())
        if found is None:
            damage = self.care.damage
            return session_pb2.ShardFigure(shard_id=self.shard_id, damage=damage) if damage else None
        copies = self._replica.copies() if self._replica is not None else ()
        return session_pb2.ShardFigure(
            shard_id=self.shard_id,
            users=found.users,
            bytes=found.bytes,
            median_hash=found.median_hash,
            last_sequence=self.last_sequence,
            copied_rows=sum(copy.rows for copy in copies),
            copied_bytes=sum(copy.bytes for copy in copies),
            copy_rows=found.rows if copies else 0,
            damage=self.care.damage,
        )
