"""The host of a worker's shards: opens their stores, lets their replicas decide, and brings them their peers' words.

    assignment in force --> follow() --> one _Shard each: replica machine + store + timer
    peers (replication.py) <--> replica machines --> reports to the leader
    services (state_core.py) --> locate, submit, barrier, reader

Everything but the stores belongs to the event loop's thread. A shard's store operations run in a thread pool, one batch
at a time per shard and in the order of their actions; those that gather while a batch runs are the next one. Behind an
operation that failed nothing of its batch and its queue is done; the replica is told, and decides anew.

Order rules:

1. Shards that an assignment no longer names are closed before new ones are opened: a child's store is made of its
   parents' files, one child after the other: who reads a store has it for itself. Once every child that is held here
   is there, the parents' files go.
2. A copy that was given up is deleted only `forget_s` later: a worker that comes back to a shard catches up from it,
   unless it was damaged. At the start, what no assignment names counts as given up from then on.
3. A store that is missing, or damaged, is made anew only for a replica that is joining, or for a shard that was never
   formed. An in-sync one reports itself LOST instead; it holds no data, and may not count as if it did.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from coordinator.api.v1 import replication_pb2, session_pb2
from coordinator.config import StateSettings
from coordinator.model import Clock, Monotonic
from worker_agent.gone_shards import GoneShards
from worker_agent.hand_over import hand_over
from worker_agent.replication import Replication
from worker_agent.scrub import Scrub
from worker_agent.shard import Shard
from worker_agent.shard_context import ShardContext
from worker_agent.shard_interface import Foresee, PeerConnected, PeerLost, PeerSaid, ReplicaTimes, ShardView
from worker_agent.state_interface import Elsewhere, HostedShard, Place
from worker_agent.store import StoreSettings, delete_store
from worker_agent.store_care import ScrubTally

STORE_THREADS = 8
PROBES_MAX = 65_536
"""Shards of which a question is kept until they are open."""
SUFFIX = ".sqlite"

_log = logging.getLogger(__name__)


class Shards:
    """All shards of one worker."""

    def __init__(
        self,
        node_id: str,
        directory: Path,
        clock: Clock,
        settings: StateSettings,
        times: ReplicaTimes,
        has_session_lease: Callable[[Monotonic], bool],
        report: Callable[[session_pb2.ReplicaReport], None],
        on_serving: Callable[[Shard, bool], None] = lambda shard, is_serving: None,
    ) -> None:
        self._node_id = node_id
        self._clock = clock
        self._dropped_at: dict[int, Monotonic] = {}
        """When a shard was given up: a lease that its replica gave may run since."""
        self._started_at = clock.monotonic()
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._shards: dict[int, Shard] = {}
        self._by_range: list[Shard] = []
        self._lows: list[int] = []
        self._closing: dict[int, asyncio.Task[None]] = {}
        self._turns: dict[int, asyncio.Lock] = {}
        """Of parents, held by the child that is made of one."""
        self._forgetting: dict[int, asyncio.TimerHandle] = {}
        self._gone = GoneShards()
        self._addresses: dict[str, str] = {}
        self._damaged: set[int] = set()
        """Shards that were given up because of damage: their files are not used again."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store")
        self._copies_pool = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._change: asyncio.Future[None] | None = None
        self._has_swept = False
        self._probes: dict[int, PeerSaid] = {}
        """The latest question of a primary about each shard that is not open here; answered as soon as it is."""
        self._replication: Replication | None = None
        self._context = ShardContext(
            node_id=node_id,
            pool=self._pool,
            copies_pool=self._copies_pool,
            clock=clock,
            store_settings=StoreSettings(
                remembered_ms=round(settings.remembered_s * 1_000), log_records_kept=settings.log_records_kept
            ),
            times=times,
            has_session_lease=has_session_lease,
            report=report,
            send=self._send,
            connected_peers=lambda: self._replication.open_peers() if self._replication is not None else (),
            place=self._place,
            on_changed=self._on_changed,
            changed=self.changed,
            on_serving=on_serving,
        )

    def attach(self, replication: Replication) -> None:
        """Gives it the streams to the other workers."""
        self._replication = replication

    # Assignments

    def follow(self, views: Iterable[ShardView], peers: Mapping[str, str], copy_bytes_per_s: int) -> None:
        """An assignment is in force: these are the shards now, and where the other workers are."""
        self._context.copy_rate.set(asyncio.get_running_loop().time(), copy_bytes_per_s)
        wanted = {view.shard_id: view for view in views}
        # Where their primaries are only the assignment before this one may know: they go first.
        for shard_id in [held for held in self._shards if held not in wanted]:
            self._give_up(self._shards.pop(shard_id))
        self._addresses = dict(peers)
        if self._replication is not None:
            self._replication.follow(self._wanted_peers(wanted.values()))
        for shard_id, view in wanted.items():
            if (timer := self._forgetting.pop(shard_id, None)) is not None:
                timer.cancel()
            self._gone.remove(shard_id)
            shard = self._shards.get(shard_id)
            if shard is None:
                promised_from = self._dropped_at.pop(shard_id, self._started_at)
                shard = self._shards[shard_id] = Shard(view, self._path(shard_id), self._context, promised_from)
                self._spawn(self._open(shard), f"open shard {shard_id}")
            else:
                shard.assign(view)
        self._by_range = sorted(self._shards.values(), key=lambda shard: shard.view.lo)
        self._lows = [shard.view.lo for shard in self._by_range]
        if not self._has_swept:
            self._has_swept = True
            self._spawn(self._sweep(), "look for old stores")
            if self._settings.scrub_s:
                cares = Scrub(
                    lambda: [shard.care for shard in self.shards],
                    self._settings.scrub_s,
                    self._context.scrub_tally,
                    self._clock,
                )
                self._spawn(cares.run(), "scrub")
        self._on_changed()

    def foresee(self, epochs: Mapping[int, int]) -> None:
        """These shards have these epochs by an assignment that is not in force yet."""
        for shard_id, epoch in epochs.items():
            if (shard := self._shards.get(shard_id)) is not None:
                shard.feed(Foresee(epoch))

    def _wanted_peers(self, views: Iterable[ShardView]) -> dict[str, str]:
        """Workers that replicate a shard of this one: whoever becomes its primary needs the streams at once."""
        names: set[str] = set()
        for view in views:
            names.update(view.in_sync, view.joining)
        names.discard(self._node_id)
        return {name: self._addresses[name] for name in sorted(names) if self._addresses.get(name)}

    async def _open(self, shard: Shard) -> None:
        for other in (shard.view.shard_id, *shard.view.parents):
            if (closing := self._closing.get(other)) is not None:
                await asyncio.wait([closing])
        if shard.view.shard_id in self._damaged:
            self._damaged.discard(shard.view.shard_id)
            await asyncio.get_running_loop().run_in_executor(self._pool, delete_store, self._path(shard.view.shard_id))
        async with AsyncExitStack() as turns:
            for parent in shard.view.parents:
                await turns.enter_async_context(self._turns.setdefault(parent, asyncio.Lock()))
            await shard.open([self._path(parent) for parent in shard.view.parents])
        if (probe := self._probes.pop(shard.shard_id, None)) is not None:
            shard.feed(probe)
        for parent in shard.view.parents:
            children = [held for held in self._shards.values() if parent in held.view.parents]
            if all(child.is_open for child in children) and parent not in self._shards:
                self._turns.pop(parent, None)
                await self._forget(parent)

    def _give_up(self, shard: Shard) -> None:
        shard_id, view = shard.view.shard_id, shard.view
        self._note_dropped(shard_id)
        if shard.care.is_given_up:
            self._damaged.add(shard_id)
        self._gone.add(view.lo, view.hi, Elsewhere(shard_id, view.epoch, shard.primary))
        closing = asyncio.create_task(shard.close(), name=f"close shard {shard_id}")
        self._closing[shard_id] = closing
        closing.add_done_callback(lambda _: self._closing.pop(shard_id, None))
        self._forget_later(shard_id)

    def _note_dropped(self, shard_id: int) -> None:
        now, times = self._clock.monotonic(), self._context.times
        # Shard ids are never used again, so most of these are never asked for.
        over_at = now - times.replica_lease_s * times.lease_margin
        self._dropped_at = {id: at for id, at in self._dropped_at.items() if at > over_at} | {shard_id: now}

    def _forget_later(self, shard_id: int) -> None:
        loop = asyncio.get_running_loop()
        self._forgetting[shard_id] = loop.call_later(
            self._settings.forget_s, lambda: self._spawn(self._forget(shard_id), f"forget shard {shard_id}")
        )

    async def _forget(self, shard_id: int) -> None:
        if (timer := self._forgetting.pop(shard_id, None)) is not None:
            timer.cancel()
        if (closing := self._closing.get(shard_id)) is not None:
            await asyncio.wait([closing])
        if any(shard_id in held.view.parents and not held.is_open for held in self._shards.values()):
            # What was cut or joined from it is not made yet, and may have no other copy.
            self._forget_later(shard_id)
        elif shard_id not in self._shards:
            await asyncio.get_running_loop().run_in_executor(self._pool, delete_store, self._path(shard_id))

    async def _sweep(self) -> None:
        paths = await asyncio.to_thread(lambda: list(self._directory.glob(f"*{SUFFIX}")))
        for path in paths:
            with suppress(ValueError):
                shard_id = int(path.stem)
                if shard_id not in self._shards and shard_id not in self._forgetting:
                    self._forget_later(shard_id)

    def _path(self, shard_id: int) -> Path:
        return self._directory / f"{shard_id}{SUFFIX}"

    # Peers

    def on_connected(self, node_id: str) -> None:
        """A stream that this worker opened is there. Every shard hears of it: its next assignment may name the peer."""
        for shard in list(self._shards.values()):
            shard.feed(PeerConnected(node_id))

    def on_lost(self, node_id: str) -> None:
        """It has ended."""
        for shard in list(self._shards.values()):
            shard.feed(PeerLost(node_id))

    def on_message(self, node_id: str, message: replication_pb2.ShardMessage, is_answer: bool) -> None:
        """A peer said something about a shard."""
        shard = self._shards.get(message.shard_id)
        if shard is not None and shard.is_open:
            shard.feed(PeerSaid(node_id, message, is_answer))
        elif not is_answer:
            if message.WhichOneof("message") == "probe" and len(self._probes) < PROBES_MAX:
                self._probes[message.shard_id] = PeerSaid(node_id, message, is_answer)
            is_opening = shard is not None and shard.is_opening
            has = "is about to open its store" if is_opening else "has no store"
            refusal = replication_pb2.Refuse(reason=f"worker {self._node_id} {has} of it", is_opening=is_opening)
            answer = replication_pb2.ShardMessage(shard_id=message.shard_id, epoch=message.epoch, refuse=refusal)
            self._send(node_id, answer, True)

    def _send(self, node_id: str, message: replication_pb2.ShardMessage, is_answer: bool) -> None:
        if self._replication is not None:
            self._replication.send(node_id, message, is_answer=is_answer)

    def _place(self, node_id: str) -> Place:
        return Place(node_id, self._addresses.get(node_id, ""))

    # The services

    def locate(self, key_hash: int) -> HostedShard | Elsewhere:
        """The shard whose range has the hash, as the assignment in force has it."""
        place = bisect_right(self._lows, key_hash) - 1
        if place >= 0 and key_hash < (shard := self._by_range[place]).view.hi:
            return shard
        return self._gone.locate(key_hash)

    def changed(self) -> Awaitable[None]:
        """Ends at the next change of any shard."""
        if self._change is None:
            self._change = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._change)

    def _on_changed(self) -> None:
        change, self._change = self._change, None
        if change is not None and not change.done():
            change.set_result(None)

    # What others may ask

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, sorted by id."""
        return tuple(self._shards[shard_id] for shard_id in sorted(self._shards))

    def reports(self) -> tuple[session_pb2.ReplicaReport, ...]:
        """The latest report of every shard; what a new session is told."""
        return tuple(shard.last_report for shard in self.shards if shard.last_report is not None)

    @property
    def scrub_tally(self) -> ScrubTally:
        """What the scrub has done."""
        return self._context.scrub_tally

    @property
    def scrub_age_s(self) -> float:
        """Seconds since its last round ended, or since the start."""
        ended_at = self._context.scrub_tally.round_ended_at
        return self._clock.monotonic() - (self._started_at if ended_at is None else ended_at)

    async def figures(self) -> session_pb2.ShardFigures:
        """How much is in the shards that this worker is primary of."""
        figures = [await shard.figures() for shard in self.shards if shard.is_primary]
        return session_pb2.ShardFigures(shards=[figure for figure in figures if figure is not None])

    # Life

    def _spawn(self, coroutine: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(coroutine)
        if isinstance(task, asyncio.Task):
            task.set_name(name)
            self._tasks.add(task)
            task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("task %r failed", task.get_name(), exc_info=error)

    async def hand_over(self, within_s: float) -> None:
        """Before a clean stop: what this worker is primary of stops, so that others take over without a wait."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(hand_over(shard, self._context) for shard in self.shards))

    async def close(self) -> None:
        """Closes every store; what was not acknowledged stays unknown to its callers."""
        for timer in self._forgetting.values():
            timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shards, self._shards = list(self._shards.values()), {}
        await asyncio.gather(*(shard.close() for shard in shards), *self._closing.values(), return_exceptions=True)
        self._on_changed()
        await asyncio.to_thread(self._copies_pool.shutdown)
        await asyncio.to_thread(self._pool.shutdown)
