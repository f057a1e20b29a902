"""Workers that a test plays: shards in memory, whose log and leases the test commands, behind the real StateService."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext

from grpc import aio

from coordinator.api.v1 import replication_pb2
from coordinator.client.channels import server_options
from coordinator.config import StateSettings
from coordinator.model import HASH_SPACE, key_hash
from coordinator.model.errors import CoordinatorError, Damaged, NotPrimary
from coordinator.server.errors import ErrorInterceptor
from worker_agent.state_interface import Elsewhere, HostedShard, Place
from worker_agent.state_service import StateService
from worker_agent.store_interface import Reader, StateItem, UserSize


class Rows:
    """What a shard has applied: the Reader of a dict."""

    def __init__(self) -> None:
        self.users_of: dict[str, dict[str, StateItem]] = {}
        self.requests: dict[tuple[str, str], int] = {}
        self.sequence = 0

    def apply(self, payload: bytes) -> int:
        """Applies the next record; its version."""
        effects = replication_pb2.Effects.FromString(payload)
        self.sequence += 1
        rows = self.users_of.setdefault(effects.user, {})
        for effect in effects.effects:
            if effect.HasField("value"):
                rows[effect.key] = StateItem(effect.key, effect.value, self.sequence)
            else:
                rows.pop(effect.key, None)
        if effects.request_id:
            self.requests[effects.user, effects.request_id] = self.sequence
        return self.sequence

    def moment(self) -> AbstractContextManager[None]:
        return nullcontext()

    def users(self, after: str, limit: int) -> list[str]:
        def place(user: str) -> tuple[int, bytes]:
            return key_hash(user), user.encode()

        users = sorted((user for user, rows in self.users_of.items() if rows), key=place)
        return [user for user in users if not after or place(user) > place(after)][:limit]

    def get(self, user: str, keys: Sequence[str]) -> list[StateItem]:
        rows = self.users_of.get(user, {})
        return [rows[key] for key in keys if key in rows]

    def scan(self, user: str, from_key: str, prefix: str, limit: int) -> list[StateItem]:
        rows = sorted(self.users_of.get(user, {}).values(), key=lambda item: item.key.encode())
        first = from_key.encode()
        return [item for item in rows if item.key.encode() >= first and item.key.startswith(prefix)][:limit]

    def size(self, user: str) -> UserSize:
        rows = self.users_of.get(user, {})
        return UserSize(len(rows), sum(len(item.key.encode()) + len(item.value) for item in rows.values()))

    def request(self, user: str, request_id: str) -> int | None:
        return self.requests.get((user, request_id))

    def applied(self) -> int:
        return self.sequence


class PlayedShard:
    """A shard in memory. Writes are applied in the next turn of the event loop, or by the test when `is_held`."""

    def __init__(
        self, rows: Rows, shard_id: int = 1, *, lo: int = 0, hi: int = HASH_SPACE, node_id: str = "w1"
    ) -> None:
        self.rows = rows
        self.shard_id = shard_id
        self.lo, self.hi = lo, hi
        self.epoch = 1
        self.primary = Place(node_id, "")
        self.is_primary = True
        self.is_serving = True
        self.has_ceded = False
        self.in_sync_count = 2
        self.has_lease = True
        self.age_s: float | None = 0.0
        self.is_held = False
        self.barriers = 0
        self.damages: list[Damaged] = []
        self._has_barrier = asyncio.Event()
        self.barrier_gate = asyncio.Event()
        self.barrier_gate.set()
        self.barrier_error: CoordinatorError | None = None
        self.has_submitted = asyncio.Event()
        self.submitted: deque[tuple[bytes, asyncio.Future[int]]] = deque()

    @property
    def primary_epoch(self) -> int:
        return self.epoch + 1 if self.has_ceded else self.epoch

    @property
    def reader(self) -> Reader | None:
        return self.rows

    def note_damage(self, error: Damaged) -> bool:
        self.damages.append(error)
        if self.in_sync_count > 1:
            self.is_serving = self.is_primary = False
            return True
        return False

    def may_read(self) -> bool:
        return self.is_serving and self.has_lease

    async def has_barriers(self, count: int) -> None:
        """Returns once so many reads stand behind a barrier."""
        while self.barriers < count:
            self._has_barrier.clear()
            await self._has_barrier.wait()

    async def barrier(self) -> None:
        self.barriers += 1
        self._has_barrier.set()
        await self.barrier_gate.wait()
        if self.barrier_error is not None:
            raise self.barrier_error

    def submit(self, payload: bytes) -> asyncio.Future[int]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        if not self.is_serving:
            future.set_exception(NotPrimary(f"shard {self.shard_id} does not serve"))
            return future
        self.submitted.append((payload, future))
        self.has_submitted.set()
        if not self.is_held:
            loop.call_soon(self.apply_next)
        return future

    def apply_next(self) -> None:
        """Commits and applies the oldest record."""
        payload, future = self.submitted.popleft()
        version = self.rows.apply(payload)
        if not future.done():
            future.set_result(version)

    def stop_serving(self, error: CoordinatorError, *, is_primary: bool = True) -> None:
        """Ends what is in flight with this error."""
        self.is_serving, self.is_primary = False, is_primary
        while self.submitted:
            self.submitted.popleft()[1].set_exception(error)

    def stale_age_s(self) -> float | None:
        return self.age_s


class PlayedHost:
    """The shards of a played worker."""

    def __init__(self, *shards: PlayedShard) -> None:
        self.shards = list(shards)
        self.elsewhere = Elsewhere()
        self._waiting: list[asyncio.Future[None]] = []
        self.waits = asyncio.Event()
        """Set once somebody waits for a change."""

    def locate(self, key_hash: int) -> HostedShard | Elsewhere:
        return next((shard for shard in self.shards if shard.lo <= key_hash < shard.hi), self.elsewhere)

    async def changed(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self.waits.set()
        await future

    def tell(self) -> None:
        """Something has changed."""
        waiting, self._waiting = self._waiting, []
        self.waits.clear()
        for future in waiting:
            if not future.done():
                future.set_result(None)


class PlayedWorker:
    """A host behind a real gRPC server."""

    def __init__(self, node_id: str, host: PlayedHost, settings: StateSettings | None = None) -> None:
        self.node_id = node_id
        self.host = host
        self.calls: list[tuple[str, str]] = []
        """Method and status of each call that ended."""
        self.service = StateService(host, settings or StateSettings(), node_id, None)
        self.core = self.service.core
        interceptor = ErrorInterceptor(lambda method, status, _: self.calls.append((method.rpartition("/")[2], status)))
        self.server = aio.server(interceptors=(interceptor,), options=server_options())
        self.service.register(self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    @property
    def place(self) -> Place:
        return Place(self.node_id, self.address)

    async def stop(self) -> None:
        """Cuts all connections at once, as a kill does."""
        await self.server.stop(None)
        await self.service.close()


@asynccontextmanager
async def played_workers(
    *hosts: PlayedHost, settings: StateSettings | None = None
) -> AsyncIterator[list[PlayedWorker]]:
    """Workers w1, w2 and so on, one for each host, that answer."""
    workers = [PlayedWorker(f"w{number}", host, settings) for number, host in enumerate(hosts, 1)]
    for worker in workers:
        await worker.server.start()
    try:
        yield workers
    finally:
        for worker in workers:
            await worker.stop()
