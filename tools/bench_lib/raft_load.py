"""The load of the Raft benchmark, the same for every system: what is sent, how fast, and what is counted.

All of it runs on one event loop in this process, with one gRPC channel per member. Writes that a fault may swallow are
sent on a timetable, whatever became of those before, so that one that hangs hides nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import grpc

from tools.lib.daemons import Daemon

WRITE_TIMEOUT_S = 30.0
ATTEMPT_TIMEOUT_S = 5.0
ATTEMPT_EVERY_S = 0.01
FAILOVER_TIMEOUT_S = 30.0
READY_TIMEOUT_S = 60.0
POLL_S = 0.005
QUIET_AFTER_S = 0.5
"""How long after the end of a leader that was stopped its successor is still watched."""
WARM_UP_S = 1.0


class Writer(Protocol):
    """A client's connection to one member."""

    async def write(self, number: int, timeout_s: float) -> None:
        """Commits one small command; `number` makes it differ from others. Raises AioRpcError."""

    async def write_many(self, number: int, timeout_s: float) -> int:
        """Commits many in one call; how many."""

    async def standing(self) -> tuple[bool, int]:
        """Whether the member leads, and its applied index; 0 while it knows no leader. Raises AioRpcError."""

    async def close(self) -> None:
        """Ends the connection."""


class System(Protocol):
    """Three members that replicate a log."""

    name: str
    ids: list[str]
    addresses: dict[str, str]

    def process(self, member_id: str) -> Daemon: ...

    async def connect(self, member_id: str) -> Writer:
        """A new connection to a member that listens."""

    async def prepare(self, writer: Writer) -> None:
        """Makes what the writes are about."""

    def close(self) -> None: ...


class Load:
    """Clients of one system. An async context manager: the system runs inside it."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._writers: dict[str, Writer] = {}
        self._number = 0

    async def __aenter__(self) -> Load:
        try:
            for member_id in self.system.ids:
                self.system.process(member_id).start()
            for member_id in self.system.ids:
                await self.reconnect(member_id)
            await self.system.prepare(self._writers[await self.leader()])
        except BaseException:
            self.system.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for writer in self._writers.values():
            await writer.close()
        await asyncio.to_thread(self.system.close)

    # Members

    async def reconnect(self, member_id: str) -> None:
        """Waits until the member takes connections, and makes a new one: an old one may be pausing between attempts."""
        if member_id in self._writers:
            await self._writers.pop(member_id).close()
        host, _, port = self.system.addresses[member_id].rpartition(":")
        give_up_at_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                _, stream = await asyncio.open_connection(host, int(port))
                stream.close()
                break
            except OSError:
                process = self.system.process(member_id)
                if process.exit_status is not None or time.monotonic() > give_up_at_s:
                    raise RuntimeError(f"{member_id} does not answer: {process.last_words()}") from None
                await asyncio.sleep(POLL_S)
        self._writers[member_id] = await self.system.connect(member_id)

    async def leader(self) -> str:
        """Id of the member that leads; waits for one."""
        give_up_at_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < give_up_at_s:
            for member_id, writer in list(self._writers.items()):
                try:
                    is_leader, index = await writer.standing()
                except grpc.aio.AioRpcError:
                    continue
                if is_leader and index:
                    return member_id
            await asyncio.sleep(POLL_S)
        raise RuntimeError(f"no member of {self.system.name} leads within {READY_TIMEOUT_S:g} s")

    async def applied_index(self, member_id: str) -> int:
        """Index up to which the member has applied; 0 while it does not answer or knows no leader."""
        try:
            return (await self._writers[member_id].standing())[1]
        except grpc.aio.AioRpcError:
            return 0

    async def wait_applied(self, member_id: str, index: int) -> None:
        """Waits until the member has applied up to `index`."""
        give_up_at_s = time.monotonic() + READY_TIMEOUT_S
        while await self.applied_index(member_id) < index:
            if time.monotonic() > give_up_at_s:
                raise RuntimeError(f"{member_id} did not reach index {index} within {READY_TIMEOUT_S:g} s")
            await asyncio.sleep(POLL_S)

    async def follower(self) -> str:
        """Id of a member that does not lead."""
        leader = await self.leader()
        return next(member_id for member_id in self.system.ids if member_id != leader)

    async def bring_back(self, member_id: str) -> float:
        """Starts a member and waits until it has applied what its leader has; seconds that this took."""
        leader_index = await self.applied_index(await self.leader())
        begun_s = time.perf_counter()
        self.system.process(member_id).start()
        await self.reconnect(member_id)
        await self.wait_applied(member_id, leader_index)
        return time.perf_counter() - begun_s

    # Steady load

    def _next(self) -> int:
        self._number += 1
        return self._number

    async def latencies_ms(self, member_id: str, count: int) -> list[float]:
        """Of one client that writes through the member, one write after the other."""
        writer, taken = self._writers[member_id], []
        for turn in range(count + count // 10):
            begun_s = time.perf_counter()
            await writer.write(self._next(), WRITE_TIMEOUT_S)
            if turn >= count // 10:
                taken.append((time.perf_counter() - begun_s) * 1_000)
        return taken

    async def commits_per_s(self, member_id: str, clients: int, seconds: float) -> float:
        """With so many clients at work through the member."""
        writer = self._writers[member_id]

        async def one() -> int:
            await writer.write(self._next(), WRITE_TIMEOUT_S)
            return 1

        return await _rate(one, clients, seconds)

    async def batched_per_s(self, member_id: str, clients: int, seconds: float) -> float:
        """Commands per second, as many in one call as the system takes."""
        writer = self._writers[member_id]
        return await _rate(lambda: writer.write_many(self._next(), WRITE_TIMEOUT_S), clients, seconds)

    async def fill(self, member_id: str, clients: int, count: int) -> None:
        """Commits `count` commands."""
        writer, until = self._writers[member_id], self._number + count

        async def client() -> None:
            while self._number < until:
                await writer.write(self._next(), WRITE_TIMEOUT_S)

        await _all_of([client() for _ in range(clients)])

    # Faults

    async def failover_s(self) -> float:
        """From kill -9 of the leader to the next acknowledged write; then everybody is back."""
        leader = await self.leader()
        survivors = [member_id for member_id in self.system.ids if member_id != leader]
        begun_s = time.perf_counter()
        # Returns once the process is gone, so nothing that is sent from now on can be acknowledged by it.
        self.system.process(leader).kill()
        attempts = _Attempts(self, survivors)
        try:
            async with asyncio.timeout(FAILOVER_TIMEOUT_S):
                acknowledged_s = await attempts.first()
        finally:
            await attempts.stop()
        await self.bring_back(leader)
        return acknowledged_s - begun_s

    async def clean_stop_s(self) -> tuple[float, float]:
        """Around SIGTERM of the leader: the longest time without an acknowledged write, and the process' end."""
        leader = await self.leader()
        process = self.system.process(leader)
        attempts = _Attempts(self, [member_id for member_id in self.system.ids if member_id != leader])
        try:
            await attempts.first()
            await asyncio.sleep(QUIET_AFTER_S)
            begun_s = time.perf_counter()
            process.ask_to_stop()
            if not await asyncio.to_thread(process.wait):
                raise RuntimeError(f"{leader} of {self.system.name} had to be killed")
            ended_s = time.perf_counter()
            await asyncio.sleep(QUIET_AFTER_S)
            await attempts.first(since_s=time.perf_counter())
        finally:
            await attempts.stop()
        times = sorted(acknowledged_s for acknowledged_s in attempts.acknowledged if acknowledged_s >= begun_s - 0.1)
        gap_s = max(after - before for before, after in itertools.pairwise(times))
        await self.bring_back(leader)
        return gap_s, ended_s - begun_s

    async def attempt(self, member_id: str) -> bool:
        """One write; whether it was acknowledged."""
        try:
            await self._writers[member_id].write(self._next(), ATTEMPT_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return True


class _Attempts:
    """Writes on a timetable, through the members in turn, until it is stopped."""

    def __init__(self, load: Load, member_ids: Sequence[str]) -> None:
        self.acknowledged: list[float] = []
        """When writes were acknowledged."""
        self._load = load
        self._member_ids = member_ids
        self._news = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._sender = asyncio.create_task(self._send())

    async def _send(self) -> None:
        turn = 0
        while True:
            task = asyncio.create_task(self._attempt(self._member_ids[turn % len(self._member_ids)]))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            turn += 1
            await asyncio.sleep(ATTEMPT_EVERY_S)

    async def _attempt(self, member_id: str) -> None:
        if await self._load.attempt(member_id):
            self.acknowledged.append(time.perf_counter())
            self._news.set()

    async def first(self, since_s: float = 0.0) -> float:
        """When the first write after `since_s` was acknowledged; waits for it."""
        while True:
            for acknowledged_s in self.acknowledged:
                if acknowledged_s >= since_s:
                    return acknowledged_s
            self._news.clear()
            await self._news.wait()

    async def stop(self) -> None:
        """Ends what is on its way."""
        tasks = [self._sender, *self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _rate(do: Callable[[], Awaitable[int]], clients: int, seconds: float) -> float:
    """What `do` says that it did, per second, between the end of the warming up and the end."""
    begin_s = time.perf_counter() + min(WARM_UP_S, seconds / 4)
    end_s = begin_s + seconds
    done = 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end_s:
            count = await do()
            if begin_s <= time.perf_counter() < end_s:
                done += count

    await _all_of([client() for _ in range(clients)])
    return done / seconds


async def _all_of(works: list[Awaitable[None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(_await(work))


async def _await(work: Awaitable[None]) -> None:
    await work
