"""What the benchmarks of users' state ask of a system, and our side of it: masters and workers as real processes.

A system holds numbered values. Ours keeps ten of them per user; the peer has a key for each. Our side is asked with the
Python client that everybody uses, over mutual TLS, at default settings: an acknowledged write is on two disks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from coordinator.client.state import AsyncStateClient
from coordinator.client.state_types import Entries, Put, Read, Write, Written
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from tools.bench_lib.result import OURS
from tools.lib.local_cluster import LocalCluster

KEYS_PER_USER = 10
CALL_S = 10.0
WHOLE_S_MAX = 120.0
ATTEMPT_EVERY_S = 0.01


class NotAcknowledged(Exception):
    """A request failed, for its client: what became of it is not known."""


class Store(Protocol):
    """A client's connection to a system."""

    async def put(self, number: int, value: bytes) -> None:
        """Stores one value. Raises NotAcknowledged."""

    async def get(self, number: int) -> bytes | None:
        """Reads one value. Raises NotAcknowledged."""

    async def put_many(self, values: Sequence[tuple[int, bytes]]) -> None:
        """Stores many in one call of the client. Raises NotAcknowledged."""

    async def get_many(self, numbers: Sequence[int]) -> list[bytes | None]:
        """Reads many in one call of the client. Raises NotAcknowledged."""

    async def close(self) -> None:
        """Ends the connection."""


class System(Protocol):
    """Processes that hold values; none runs before `start`."""

    @property
    def name(self) -> str: ...

    def start(self) -> None:
        """Starts everything, and waits until it takes writes."""

    def store(self) -> Store:
        """A new client; belongs to the event loop that runs."""

    def close(self) -> None:
        """Ends every process, at once."""


class FailingSystem(System, Protocol):
    """A system of which a part can be killed."""

    def victim(self) -> str:
        """Who is to be killed next."""

    def held_by(self, victim: str, numbers: Iterable[int]) -> list[int]:
        """Numbers whose writes the victim takes now, of different parts of the data as far as there are any."""

    def kill(self, victim: str) -> None:
        """kill -9; returns once the process is gone."""

    async def first_write(self, store: Store, number: int, value: bytes) -> None:
        """Returns once a write of this number is acknowledged, which was begun after this call."""

    def bring_back(self, victim: str) -> None:
        """Starts it again."""

    def wait_whole(self) -> None:
        """Waits until everything has all its copies."""


def user_of(number: int) -> str:
    """The user that has a number's value."""
    return f"user-{number // KEYS_PER_USER}"


def key_of(number: int) -> str:
    """Its key there."""
    return f"key-{number % KEYS_PER_USER}"


class OurStore:
    """The state client."""

    def __init__(self, client: AsyncStateClient) -> None:
        self.client = client

    async def put(self, number: int, value: bytes) -> None:
        try:
            await self.client.put(user_of(number), key_of(number), value)
        except CoordinatorError as error:
            raise NotAcknowledged(f"{type(error).__name__}: {error}") from error

    async def get(self, number: int) -> bytes | None:
        try:
            entry = await self.client.get(user_of(number), key_of(number))
        except CoordinatorError as error:
            raise NotAcknowledged(f"{type(error).__name__}: {error}") from error
        return None if entry is None else entry.value

    async def put_many(self, values: Sequence[tuple[int, bytes]]) -> None:
        # What is of one user goes in one write.
        puts: dict[str, dict[str, Put]] = {}
        for number, value in values:
            puts.setdefault(user_of(number), {})[key_of(number)] = Put(key_of(number), value)
        for result in await self.client.execute([Write(user, list(of.values())) for user, of in puts.items()]):
            if not isinstance(result, Written):
                raise NotAcknowledged(str(result))

    async def get_many(self, numbers: Sequence[int]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for result in await self.client.execute([Read(user_of(number), [key_of(number)]) for number in numbers]):
            if not isinstance(result, Entries):
                raise NotAcknowledged(str(result))
            found.append(result.entries[0].value if result.entries else None)
        return found

    async def close(self) -> None:
        await self.client.close()


class OurSystem:
    """Three masters and some workers."""

    name = OURS

    def __init__(
        self, directory: Path, workers: int = 3, change: Callable[[ClusterConfig], ClusterConfig] | None = None
    ) -> None:
        self.cluster = LocalCluster(directory, masters=3, workers=workers, change=change)
        self._turn = 0

    def start(self) -> None:
        self.cluster.start()
        self.cluster.wait_ready()

    def store(self) -> OurStore:
        return OurStore(self.client())

    def client(self, timeout_s: float = CALL_S) -> AsyncStateClient:
        """A new client of users' state."""
        addresses = [master.grpc_address for master in self.cluster.config.masters]
        return AsyncStateClient(addresses, credentials=self.cluster.credentials(), timeout_s=timeout_s)

    def close(self) -> None:
        self.cluster.close()

    # Faults

    def victim(self) -> str:
        self._turn += 1
        return self.cluster.worker_ids[self._turn % len(self.cluster.worker_ids)]

    def held_by(self, victim: str, numbers: Iterable[int]) -> list[int]:
        chosen = list(numbers)
        with self.cluster.client() as client:
            places = client.locate_keys([user_of(number) for number in chosen]).locations
        by_shard = {
            place.shard_id: number for place, number in zip(places, chosen, strict=True) if place.primary == victim
        }
        return list(by_shard.values())

    def kill(self, victim: str) -> None:
        self.cluster.kill(victim)

    async def first_write(self, store: Store, number: int, value: bytes) -> None:
        while True:
            try:
                await store.put(number, value)
                return
            except NotAcknowledged:
                await asyncio.sleep(ATTEMPT_EVERY_S)

    def bring_back(self, victim: str) -> None:
        self.cluster.start([victim])

    def wait_whole(self) -> None:
        self.cluster.wait_ready(WHOLE_S_MAX)


async def close_all(stores: Iterable[Store]) -> None:
    """Ends clients side by side."""
    await asyncio.gather(*(store.close() for store in stores))
