"""Clients that write and read users' state of a real cluster while faults happen to it, and the history they leave.

A register is one key of one user. Each value is written once, so a read names the write that it saw. The keys change
every WINDOW_S, which keeps the histories short enough to check. Recorded are acknowledged writes, writes whose outcome
is unknown, what was definitely denied, and reads that answered; stale reads may show anything that was ever written,
but nothing that was denied.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field

from coordinator.client.state import AsyncStateClient
from coordinator.model.errors import CoordinatorError, DefiniteError
from coordinator.security.credentials import Credentials
from tests.sim.linearizability import Operation, find_violation

WINDOW_S = 5.0
USERS = 12
PAUSE_S_MAX = 0.02
CALL_S = 4.0
HASTY_CALL_S = 0.3
"""Shorter than a failover: what became of such a write the client does not know."""


@dataclass
class StateHistory:
    """What the clients saw."""

    operations: list[Operation] = field(default_factory=list)
    denied: dict[bytes, str] = field(default_factory=dict)
    stale: list[tuple[str, bytes | None]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """What patient clients were told, with the time of it."""
    longest_s: float = 0.0
    """Longest call of a patient client that was answered."""

    def problem(self) -> str:
        """What is wrong with it, for people; empty when nothing is."""
        for key, value in [*((one.key, one.value) for one in self.operations if not one.is_write), *self.stale]:
            if isinstance(value, bytes) and value in self.denied:
                return f"{value!r} of {key} was read, though it was definitely not written: {self.denied[value]}"
        violation = find_violation(self.operations)
        return "" if violation is None else "not linearizable:\n" + "\n".join(str(one) for one in violation)

    def figures(self) -> str:
        """How much was done."""
        writes = [one for one in self.operations if one.is_write]
        unknown = sum(one.returned == float("inf") for one in writes)
        return (
            f"{len(writes) - unknown} writes acknowledged, {unknown} of unknown outcome, {len(self.denied)} denied, "
            f"{len(self.operations) - len(writes)} reads, {len(self.stale)} stale ones, {len(self.errors)} errors of "
            f"patient clients, longest call {self.longest_s:.2f} s"
        )


class StateClients:
    """Clients of one cluster, at work until they are stopped; `hasty` of them give up early."""

    def __init__(
        self, addresses: list[str], credentials: Credentials | None, seed: int, *, patient: int = 4, hasty: int = 2
    ) -> None:
        self.history = StateHistory()
        self._numbers = itertools.count()
        self._began_s = time.monotonic()
        self._clients = [
            AsyncStateClient(addresses, credentials=credentials, timeout_s=CALL_S if number < patient else HASTY_CALL_S)
            for number in range(patient + hasty)
        ]
        self._patient = patient
        self._seed = seed

    async def run(self, until: asyncio.Event) -> None:
        """All of them until the event is set."""
        await asyncio.gather(*(self._work(number, until) for number in range(len(self._clients))))

    async def close(self) -> None:
        """Ends their connections."""
        await asyncio.gather(*(client.close() for client in self._clients))

    def _key(self, rng: random.Random) -> str:
        window = int((time.monotonic() - self._began_s) / WINDOW_S)
        return f"user-{rng.randrange(USERS)}/{window}"

    async def _work(self, number: int, until: asyncio.Event) -> None:
        rng = random.Random(f"{self._seed} {number}")
        client, is_patient = self._clients[number], number < self._patient
        while not until.is_set():
            key, choice = self._key(rng), rng.random()
            began_s = time.monotonic()
            try:
                if choice < 0.5:
                    await self._write(client, key)
                else:
                    await self._read(client, key, stale=choice > 0.95)
                if is_patient:
                    self.history.longest_s = max(self.history.longest_s, time.monotonic() - began_s)
            except CoordinatorError as error:
                if is_patient:
                    at_s = time.monotonic() - self._began_s
                    self.history.errors.append(f"{at_s:.2f} s: {key}: {type(error).__name__}: {error}")
            await asyncio.sleep(rng.uniform(0.0, PAUSE_S_MAX))

    async def _write(self, client: AsyncStateClient, register: str) -> None:
        user, key = register.split("/")
        value = f"{next(self._numbers)}".encode()
        called = time.monotonic()
        try:
            await client.put(user, key, value)
        except DefiniteError as error:
            self.history.denied[value] = str(error)
            raise
        except CoordinatorError:
            self.history.operations.append(Operation(register, True, value, called))
            raise
        self.history.operations.append(Operation(register, True, value, called, time.monotonic()))

    async def _read(self, client: AsyncStateClient, register: str, *, stale: bool) -> None:
        user, key = register.split("/")
        called = time.monotonic()
        found = await client.get(user, key, stale=stale)
        value = None if found is None else found.value
        if stale:
            self.history.stale.append((register, value))
        else:
            self.history.operations.append(Operation(register, False, value, called, time.monotonic()))
