"""Watches the cutovers of a running cluster from the side of its clients.

Which shards move is asked of the leader again and again. While a shard's primary is on the move, puts of one of its
users are sent on a timetable; the longest that one took is that cutover's pause. Only a few shards are watched at a
time: puts of all of them would measure how busy the machine is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from coordinator.api.v1 import types_pb2
from coordinator.client import AsyncClusterClient
from coordinator.client.state import AsyncStateClient
from coordinator.model.errors import CoordinatorError

WATCHED_MAX = 2
PUT_EVERY_S = 0.01
POLL_S = 0.02
KEY = "watch"


class PauseWatch:
    """An async context manager: cutovers inside it are watched."""

    def __init__(self, client: AsyncClusterClient, state: AsyncStateClient, users: Mapping[int, str]) -> None:
        """`users` has a user of every shard, by shard id."""
        self.pauses_ms: list[float] = []
        """Of every cutover that was watched."""
        self.problems: list[str] = []
        """Puts that failed."""
        self._client = client
        self._state = state
        self._users = users
        self._moving: dict[int, asyncio.Event] = {}
        """An event for each move that is watched, set once it is over."""
        self._watches: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> PauseWatch:
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for over in self._moving.values():
            over.set()
        await asyncio.gather(*self._watches)

    async def _follow(self) -> None:
        primaries = {shard.id: shard.primary for shard in (await self._client.list_shards()).shards}
        while True:
            try:
                moves = {move.id: move for move in (await self._client.list_moves()).moves}
            except CoordinatorError:
                moves = {}
            for move_id in [move_id for move_id in self._moving if move_id not in moves]:
                self._moving.pop(move_id).set()
            for move in moves.values():
                if len(self._moving) < WATCHED_MAX and self._is_cutover(move, primaries):
                    self._begin(move)
            await asyncio.sleep(POLL_S)

    def _is_cutover(self, move: types_pb2.Move, primaries: Mapping[int, str]) -> bool:
        """True for a move that has its cutover before it."""
        is_early = move.phase in (types_pb2.MOVE_PHASE_COPYING, types_pb2.MOVE_PHASE_CEDING)
        is_known = move.id in self._moving or move.shard_id not in self._users
        return is_early and not is_known and primaries.get(move.shard_id) == move.source

    def _begin(self, move: types_pb2.Move) -> None:
        over = self._moving[move.id] = asyncio.Event()
        watch = asyncio.create_task(self._watch(self._users[move.shard_id], over))
        self._watches.add(watch)

    async def _watch(self, user: str, over: asyncio.Event) -> None:
        """Puts until the move is over."""
        running: set[asyncio.Task[float]] = set()
        taken: list[asyncio.Task[float]] = []
        while not over.is_set():
            task = asyncio.create_task(self._put(user))
            taken.append(task)
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(PUT_EVERY_S)
        self.pauses_ms.append(max(await asyncio.gather(*taken)))

    async def _put(self, user: str) -> float:
        begun_s = time.perf_counter()
        try:
            await self._state.put(user, KEY, b"")
        except CoordinatorError as error:
            self.problems.append(f"{type(error).__name__}: {error}")
        return (time.perf_counter() - begun_s) * 1_000
