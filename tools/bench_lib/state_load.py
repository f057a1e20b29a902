"""The load of the benchmarks of users' state, the same for every system, and the ledger that finds what was lost.

A value begins with a counter. Two writes to one number are never on their way at once, so whoever reads it afterwards
must find the counter of the last acknowledged write, or a later one whose outcome nobody learnt.

Writes that a fault may swallow are sent on a timetable, whatever became of those before: one that hangs hides nothing,
and latencies count from the time at which a write was due.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tools.bench_lib.state_systems import NotAcknowledged, Store

VALUE_BYTES = 200
COUNTER_BYTES = 16
BATCH = 500
FILL_CLIENTS = 4
READ_ATTEMPTS = 20
READ_AGAIN_S = 0.5
PADDING = random.Random(1).randbytes(VALUE_BYTES - COUNTER_BYTES)

Item = TypeVar("Item")


def value_of(counter: int) -> bytes:
    """The value of the write with this counter."""
    return f"{counter:0{COUNTER_BYTES}d}".encode() + PADDING


def counter_of(value: bytes) -> int:
    """The counter of a value."""
    return int(value[:COUNTER_BYTES])


@dataclass(slots=True)
class Ledger:
    """What was acknowledged."""

    acknowledged: dict[int, int] = field(default_factory=dict)
    """Counter of the latest acknowledged write, by number."""
    counter: int = 0

    def next(self) -> int:
        """The counter of a new write."""
        self.counter += 1
        return self.counter

    def lost(self, found: dict[int, bytes | None]) -> int:
        """How many acknowledged writes are not in what was found: their number has an older value, or none."""
        lost = 0
        for number, counter in self.acknowledged.items():
            value = found.get(number)
            lost += value is None or counter_of(value) < counter
        return lost


@dataclass(frozen=True, slots=True)
class Outcome:
    """One write that ended."""

    due_s: float
    ended_s: float
    problem: str = ""
    """Why it was not acknowledged; empty when it was."""

    @property
    def latency_ms(self) -> float:
        """From when it was due."""
        return (self.ended_s - self.due_s) * 1_000


class Timetable:
    """Writes at a steady rate (0: none), over all numbers in a random order; an async context manager."""

    def __init__(self, store: Store, ledger: Ledger, numbers: int, per_s: float) -> None:
        self.outcomes: list[Outcome] = []
        self._store = store
        self._ledger = ledger
        self._order = list(range(numbers))
        random.Random(2).shuffle(self._order)
        self._every_s = 1 / per_s if per_s else 0.0
        self._running: dict[int, asyncio.Task[None]] = {}
        self._sender: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Timetable:
        self._sender = asyncio.create_task(self._send()) if self._every_s else None
        return self

    async def __aexit__(self, *_: object) -> None:
        """Waits for what is on its way: it counts too."""
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.gather(self._sender, return_exceptions=True)
        await asyncio.gather(*self._running.values())

    def between(self, begin_s: float, end_s: float) -> list[Outcome]:
        """The writes that were due in this time."""
        return [outcome for outcome in self.outcomes if begin_s <= outcome.due_s <= end_s]

    async def _send(self) -> None:
        due_s, turn = time.perf_counter(), 0
        while True:
            number = self._order[turn % len(self._order)]
            if number not in self._running:
                self._running[number] = asyncio.create_task(self._write(number, due_s))
            turn += 1
            due_s += self._every_s
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))

    async def _write(self, number: int, due_s: float) -> None:
        counter, problem = self._ledger.next(), ""
        try:
            await self._store.put(number, value_of(counter))
            self._ledger.acknowledged[number] = counter
        except NotAcknowledged as error:
            problem = str(error)
        self.outcomes.append(Outcome(due_s, time.perf_counter(), problem))
        del self._running[number]


async def fill(store: Store, ledger: Ledger, numbers: int) -> None:
    """Writes every number once."""

    async def write(part: Sequence[int]) -> None:
        values = [(number, ledger.next()) for number in part]
        await store.put_many([(number, value_of(counter)) for number, counter in values])
        ledger.acknowledged.update(values)

    await _side_by_side(write, list(batches(range(numbers))))


async def read_all(store: Store, numbers: int) -> dict[int, bytes | None]:
    """What every number has now."""
    found: dict[int, bytes | None] = {}

    async def read(part: Sequence[int]) -> None:
        for attempt in range(READ_ATTEMPTS):
            try:
                found.update(zip(part, await store.get_many(part), strict=True))
                return
            except NotAcknowledged:
                if attempt == READ_ATTEMPTS - 1:
                    raise
                await asyncio.sleep(READ_AGAIN_S)

    await _side_by_side(read, list(batches(range(numbers))))
    return found


def batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The items in parts of a batch's size."""
    for first in range(0, len(items), BATCH):
        yield items[first : first + BATCH]


async def _side_by_side(work: Callable[[Sequence[int]], Awaitable[None]], parts: list[Sequence[int]]) -> None:
    async def client() -> None:
        while parts:
            await work(parts.pop())

    await asyncio.gather(*(client() for _ in range(FILL_CLIENTS)))


async def closed_loop(
    work: Callable[[], Awaitable[int]], clients: int, seconds: float, warm_up_s: float
) -> tuple[float, list[float]]:
    """So many clients, each asking again as soon as it is answered: what was done per second, and every call's ms."""
    begin_s = time.perf_counter() + warm_up_s
    end_s = begin_s + seconds
    taken_ms: list[float] = []
    done = 0

    async def client() -> None:
        nonlocal done
        while (called_s := time.perf_counter()) < end_s:
            count = await work()
            ended_s = time.perf_counter()
            if begin_s <= called_s and ended_s < end_s:
                done += count
                taken_ms.append((ended_s - called_s) * 1_000)

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / seconds, taken_ms
