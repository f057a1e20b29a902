"""The operations of one shard's store: one batch at a time in the thread pool, in the order in which they were queued.

Operations that gather while a batch runs are the next batch. Each that ended well is told as StoreDone; behind one that
failed nothing of its batch, nor of what is queued, is done: it was decided on what is not so. (Reading a chunk is the
exception: nothing is decided on it.)

Chunks of copies are read beside that, so no write waits for them. One that cannot be read so is tried again in its turn
with the others. All that is done for copies goes through one thread of the worker: Python hands its lock over at every
row, and threads that read rows side by side mostly wait for each other, and the event loop for all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, assert_never, cast

from worker_agent import shard_interface as interface
from worker_agent.shard_interface import StoreDone, StoreFailed
from worker_agent.store import ShardStore

CHUNK_BYTES = 512 << 10
"""Size of a copy's chunk, about."""
READ_RECORDS_MAX = 2_000
READ_BYTES_MAX = 1 << 20
"""What one read of the log for a peer brings at most."""

Result = TypeVar("Result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Call:
    """Something else to do with the store, in its turn: `future` has the outcome."""

    function: Callable[[ShardStore], object]
    future: asyncio.Future[Any]


class StoreQueue:
    """A store and what is to be done with it. Belongs to the event loop's thread; `on_event` is called there."""

    def __init__(
        self,
        store: ShardStore,
        pool: ThreadPoolExecutor,
        copies_pool: ThreadPoolExecutor,
        on_event: Callable[[StoreDone | StoreFailed], None],
    ) -> None:
        self.store = store
        self._pool = pool
        self._copies_pool = copies_pool
        self._on_event = on_event
        self._loop = asyncio.get_running_loop()
        self._queued: deque[interface.StoreOperation | _Call] = deque()
        self._batch: asyncio.Future[list[StoreDone | StoreFailed | tuple[_Call, object]]] | None = None
        self._unread: deque[interface.ReadChunk] = deque()
        self._reading: asyncio.Future[list[StoreDone | StoreFailed | tuple[_Call, object]]] | None = None
        self._is_reading_dropped = False
        self._is_closed = False

    def put(self, operation: interface.StoreOperation) -> None:
        """Queues an operation; `start` begins with what is queued."""
        if isinstance(operation, interface.ReadChunk):
            self._unread.append(operation)
        else:
            self._queued.append(operation)

    async def ask(self, function: Callable[[ShardStore], Result]) -> Result | None:
        """What `function` makes of the store, in its turn; None when that was dropped. Raises what it raises."""
        if self._is_closed:
            return None
        future: asyncio.Future[Any] = self._loop.create_future()
        self._queued.append(_Call(function, future))
        self.start()
        await asyncio.wait([future])
        return None if future.cancelled() else cast("Result", future.result())

    def start(self) -> None:
        """Begins the next batch and the next chunk, unless one runs."""
        if self._is_closed:
            return
        if self._reading is None and self._unread:
            chunk = self._unread.popleft()
            self._reading = self._loop.run_in_executor(self._copies_pool, _perform_batch, self.store, (chunk,))
            self._reading.add_done_callback(partial(self._on_chunk, chunk))
        if self._batch is not None or not self._queued:
            return
        batch = tuple(self._queued)
        self._queued.clear()
        has_rows = any(isinstance(operation, interface.MergeChunk) for operation in batch)
        pool = self._copies_pool if has_rows else self._pool
        self._batch = self._loop.run_in_executor(pool, _perform_batch, self.store, batch)
        self._batch.add_done_callback(partial(self._on_batch, batch))

    def _on_batch(
        self,
        batch: Sequence[interface.StoreOperation | _Call],
        done: asyncio.Future[list[StoreDone | StoreFailed | tuple[_Call, object]]],
    ) -> None:
        self._batch = None
        events = done.result()
        if any(_drops_others(event) for event in events):
            self._drop()
            _cancel(batch[len(events) :])
        for event in events:
            if isinstance(event, tuple):
                call, outcome = event
                _resolve(call.future, outcome)
            elif not self._is_closed:
                self._on_event(event)
        self.start()

    def _on_chunk(
        self, chunk: interface.ReadChunk, done: asyncio.Future[list[StoreDone | StoreFailed | tuple[_Call, object]]]
    ) -> None:
        is_dropped, self._reading, self._is_reading_dropped = self._is_reading_dropped, None, False
        [event] = done.result()
        if is_dropped:
            pass  # Who asked for it has heard of a failure since, and counts on nothing from before.
        elif isinstance(event, StoreFailed):
            self._queued.append(chunk)
        elif isinstance(event, StoreDone) and not self._is_closed:
            self._on_event(event)
        self.start()

    def _drop(self) -> None:
        _cancel(self._queued)
        self._queued.clear()
        self._unread.clear()
        self._is_reading_dropped = self._reading is not None

    async def close(self) -> None:
        """Drops what is queued, waits for what runs, and closes the store."""
        self._is_closed = True
        self._drop()
        if running := [one for one in (self._batch, self._reading) if one is not None]:
            await asyncio.wait(running)
        await self._loop.run_in_executor(self._pool, self.store.close)


def _cancel(dropped: Iterable[interface.StoreOperation | _Call]) -> None:
    for operation in dropped:
        if isinstance(operation, _Call):
            operation.future.cancel()


def _resolve(future: asyncio.Future[Any], outcome: object) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _perform_batch(
    store: ShardStore, batch: Sequence[interface.StoreOperation | _Call]
) -> list[StoreDone | StoreFailed | tuple[_Call, object]]:
    """In a thread: the operations in order, up to the first that fails."""
    events: list[StoreDone | StoreFailed | tuple[_Call, object]] = []
    for operation in batch:
        if isinstance(operation, _Call):
            try:
                events.append((operation, operation.function(store)))
            except Exception as error:
                events.append((operation, error))
            continue
        try:
            events.append(_perform(store, operation))
        except Exception as error:
            position = None
            try:
                position = store.position()
            except Exception:
                _log.exception("a store cannot say where it stands")
            events.append(StoreFailed(operation, error, position))
            if _drops_others(events[-1]):
                break
    return events


def _drops_others(event: object) -> bool:
    """A chunk of a copy that cannot be read changes nothing that the others were decided on."""
    return isinstance(event, StoreFailed) and not isinstance(event.operation, interface.ReadChunk)


def _perform(store: ShardStore, operation: interface.StoreOperation) -> StoreDone:
    done = StoreDone(operation, store.position())
    match operation:
        case interface.SeeEpoch(epoch):
            store.see_epoch(epoch)
        case interface.AppendRecords(records):
            store.append(records)
        case interface.TruncateLog(last):
            store.truncate(last)
        case interface.ApplyLog(up_to, keeps_tombstones):
            digest = store.apply(up_to, keeps_tombstones=keeps_tombstones)
            return StoreDone(operation, store.position(), digest=digest)
        case interface.ReadLog(_, first):
            records = tuple(store.read_log(first, records_max=READ_RECORDS_MAX, bytes_max=READ_BYTES_MAX))
            return replace(done, records=records)
        case interface.ReadChunk(_, cursor):
            return replace(done, chunk=store.read_chunk(cursor, bytes_max=CHUNK_BYTES))
        case interface.BeginCopy(start, start_epoch):
            store.begin_copy(start, start_epoch)
        case interface.MergeChunk(chunk):
            store.merge_chunk(chunk)
        case interface.FinishCopy():
            store.finish_copy()
        case _:
            assert_never(operation)
    return StoreDone(operation, store.position())
