"""Clients that read and write registers of a real cluster while faults happen to it, and the history they leave.

A register is a worker's weight (SetNodeWeight, read at the leader by ListNodes) or a cron job's description (ApplyJobs,
read by ListJobs from whichever master was asked, behind its barrier). Every value is written once, so a read names the
one write that it saw. Registers change from time to time (`WINDOW_S`): histories of one key stay short enough to check.

What is recorded: writes that were acknowledged; writes whose outcome is unknown; values that a definite error says were
never written, which then nobody may read, stale or not; reads that answered. Times are of this process' own clock.
"""

from __future__ import annotations

import asyncio
import datetime
import math
import random
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from typing import Any

from grpc import aio

from coordinator.api.v1 import session_pb2, session_pb2_grpc, types_pb2
from coordinator.client import STALE, AsyncClusterClient
from coordinator.client.channels import channel_options
from coordinator.client.client import LINEARIZABLE, Consistency
from coordinator.model.errors import CoordinatorError, DefiniteError, Refused
from coordinator.security.certificates import Identity, Role, issue
from coordinator.security.credentials import Credentials, open_channel
from tests.sim.linearizability import Operation, find_violation
from tools.lib.local_cluster import LocalCluster

WINDOW_S = 15.0
NODES_PER_WINDOW = 2
JOBS_PER_WINDOW = 3
PAUSE_S_MAX = 0.03
"""A client waits up to so long between two calls: the checker's work grows with the square of a key's history."""
CALL_S = 3.0
HASTY_CALL_S = 0.15
"""Shorter than an election: retries of the others find out what became of a write, this leaves outcomes unknown."""
PINNED_CALL_S = 12.0
"""Longer than any pause, so that what waited at a paused master is answered when it goes on."""

Value = float | str | None


@dataclass
class History:
    """What the clients saw."""

    operations: list[Operation] = field(default_factory=list)
    denied: dict[Value, str] = field(default_factory=dict)
    """Values that were definitely not written, with the error."""
    stale: list[tuple[str, Value, str]] = field(default_factory=list)
    """Stale reads: key, value, client."""
    failed_reads: int = 0

    def problem(self) -> str:
        """What is wrong with it, for people; empty when nothing is."""
        written = {operation.value for operation in self.operations if operation.is_write}
        reads = [(one.key, one.value, one.client) for one in self.operations if not one.is_write]
        for key, value, client in [*reads, *self.stale]:
            if value in self.denied:
                return f"{client} read {value} of {key}, which was definitely not written: {self.denied[value]}"
            if value is not None and value not in written and value != 1.0:
                return f"{client} read {value} of {key}, which nobody wrote"
        violation = find_violation(self._narrowed())
        return "" if violation is None else "not linearizable:\n" + "\n".join(str(one) for one in violation)

    def _narrowed(self) -> list[Operation]:
        """The same history with no write that is open for ever, so that the checker has less to try.

        A write of unknown outcome that nobody read may as well not have happened; one that was read happened before the
        first such read returned.
        """
        read_at: dict[object, float] = {}
        for one in self.operations:
            if not one.is_write:
                read_at[one.value] = min(one.returned, read_at.get(one.value, math.inf))
        narrowed = []
        for one in self.operations:
            if one.is_write and one.returned == math.inf:
                if one.value not in read_at:
                    continue
                one = replace(one, returned=max(one.called, read_at[one.value]))
            narrowed.append(one)
        # A worker's weight is 1 when it is registered; a job has no description before it is made.
        firsts = {one.key for one in narrowed if one.key.startswith("node")}
        first = min((one.called for one in narrowed), default=0.0) - 1.0
        return [*(Operation(key, True, 1.0, first, first) for key in firsts), *narrowed]

    def figures(self) -> str:
        """How much was done."""
        writes = [one for one in self.operations if one.is_write]
        unknown = sum(one.returned == math.inf for one in writes)
        return (
            f"{len(writes) - unknown} writes acknowledged, {unknown} of unknown outcome, {len(self.denied)} denied; "
            f"{len(self.operations) - len(writes)} linearizable reads, {self.failed_reads} failed, "
            f"{len(self.stale)} stale reads"
        )


class Clients:
    """Clients of one cluster: some go to any master, one for each master goes to that one only."""

    def __init__(self, cluster: LocalCluster, seconds: float, seed: int, roaming: int = 4) -> None:
        self.history = History()
        self.addresses = [master.grpc_address for master in cluster.config.masters]
        self._cluster = cluster
        self._credentials = cluster.credentials()
        self._windows = max(1, math.ceil(seconds / WINDOW_S))
        self._began_s = time.monotonic()
        self._rng = random.Random(f"clients {seed}")
        self._last_number = 0
        self._clients = {f"c{number}": self._roaming(CALL_S) for number in range(roaming)}
        self._clients |= {f"hasty {number}": self._roaming(HASTY_CALL_S) for number in range(2)}
        self._pinned = {address: self.client([address], PINNED_CALL_S) for address in self.addresses}

    def client(self, addresses: list[str] | None = None, timeout_s: float = CALL_S) -> AsyncClusterClient:
        """A new client of these masters, or of all, which the caller closes."""
        return AsyncClusterClient(addresses or self.addresses, timeout_s=timeout_s, credentials=self._credentials)

    def _roaming(self, timeout_s: float) -> AsyncClusterClient:
        return self.client(self._rng.sample(self.addresses, len(self.addresses)), timeout_s)

    async def register_nodes(self) -> None:
        """Makes the workers whose weights are registers: each opens a session once and is never heard again."""
        for window in range(self._windows):
            for number in range(NODES_PER_WINDOW):
                await self._register(f"node-{window}-{number}")

    async def _register(self, node_id: str) -> None:
        node = types_pb2.Node(id=node_id, weight=1.0, incarnation="i1", grpc_address="127.0.0.1:1")
        name = self._cluster.config.name
        hello = session_pb2.Hello(node=node, cluster_name=name, protocol_version=1)
        identity = Identity(name, Role.WORKER, node_id)
        files = issue(self._cluster.certificates, identity, datetime.datetime.now(datetime.UTC))
        credentials = Credentials(identity, files)
        async with asyncio.timeout(20.0):
            while True:
                for address in self.addresses:
                    async with open_channel(address, channel_options(), credentials) as channel:
                        stream = session_pb2_grpc.SessionServiceStub(channel).Open()
                        try:
                            await stream.write(session_pb2.OpenRequest(hello=hello))
                            answer: Any = await stream.read()
                        except (aio.AioRpcError, asyncio.InvalidStateError):
                            continue
                        if answer is not aio.EOF and answer.HasField("welcome"):
                            return
                await asyncio.sleep(0.05)

    async def close(self) -> None:
        """Ends all connections."""
        for client in [*self._clients.values(), *self._pinned.values()]:
            await client.close()

    def keys(self) -> list[str]:
        """The registers of this moment."""
        window = min(self._windows - 1, int((time.monotonic() - self._began_s) / WINDOW_S))
        nodes = [f"node-{window}-{number}" for number in range(NODES_PER_WINDOW)]
        return [*nodes, *(f"job-{window}-{number}" for number in range(JOBS_PER_WINDOW))]

    async def run(self, until: asyncio.Event) -> None:
        """All clients work until the event; calls in progress are waited for."""
        self._began_s = time.monotonic()
        named = [*self._clients.items(), *((f"at {address}", client) for address, client in self._pinned.items())]
        async with asyncio.TaskGroup() as group:
            for name, client in named:
                group.create_task(self._work(name, client, until))

    async def _work(self, name: str, client: AsyncClusterClient, until: asyncio.Event) -> None:
        rng = random.Random(f"{self._rng.random()} {name}")
        while not until.is_set():
            key, choice = rng.choice(self.keys()), rng.random()
            if choice < 0.45:
                await self.write(client, key, name)
            elif choice < 0.9:
                await self.read(client, key, name)
            else:
                await self.read_stale(client, key, name)
            await asyncio.sleep(rng.uniform(0.0, PAUSE_S_MAX))

    async def read_at(self, address: str) -> None:
        """Reads every register of this moment at one master, all at once."""
        client = self._pinned[address]
        await asyncio.gather(*(self.read(client, key, f"probe of {address}") for key in self.keys()))

    async def write(self, client: AsyncClusterClient, key: str, name: str) -> bool:
        """Writes a value that was never used; True when it was acknowledged."""
        self._last_number += 1
        # Exact in binary, and never a weight that a worker is registered with.
        value: Value = 2.0 + self._last_number / 1024
        call: Awaitable[object]
        if key.startswith("node"):
            weight = 2.0 + self._last_number / 1024
            call = client.set_node_weight(key, weight)
        else:
            value = f"v{self._last_number}"
            call = client.apply_jobs([job(key, value)])
        called = time.monotonic()
        returned = math.inf
        try:
            await call
            returned = time.monotonic()
        except DefiniteError as error:
            self.history.denied[value] = f"{type(error).__name__}: {error}"
            return False
        except CoordinatorError:
            pass
        self.history.operations.append(Operation(key, True, value, called, returned, name))
        return returned < math.inf

    async def read(self, client: AsyncClusterClient, key: str, name: str) -> None:
        """A linearizable read."""
        called = time.monotonic()
        try:
            value = await _value(client, key, LINEARIZABLE)
        except CoordinatorError:
            self.history.failed_reads += 1
            return
        self.history.operations.append(Operation(key, False, value, called, time.monotonic(), name))

    async def read_stale(self, client: AsyncClusterClient, key: str, name: str) -> None:
        """A stale read: any earlier value is right, one that was denied is not."""
        try:
            self.history.stale.append((key, await _value(client, key, STALE), name))
        except CoordinatorError:
            self.history.failed_reads += 1


def job(job_id: str, description: str) -> types_pb2.CronJobSpec:
    """A job that is due at New Year only."""
    return types_pb2.CronJobSpec(
        id=job_id, schedule="0 0 1 1 *", time_zone="UTC", command=["true"], timeout_s=1.0, description=description
    )


async def _value(client: AsyncClusterClient, key: str, consistency: Consistency) -> Value:
    try:
        if key.startswith("node"):
            nodes = (await client.list_nodes(node_id=key, consistency=consistency)).nodes
            return float(nodes[0].node.weight)
        jobs = (await client.list_jobs(job_id=key, consistency=consistency)).jobs
        return str(jobs[0].job.spec.description)
    except Refused:
        return None


async def shown_by(address: str, credentials: Credentials | None) -> bytes:
    """All that one master shows of the replicated state, from itself alone, as bytes that can be compared."""
    async with AsyncClusterClient([address], timeout_s=5.0, credentials=credentials) as client:
        nodes = await client.list_nodes(consistency=STALE)
        parts = [view.node.SerializeToString(deterministic=True) for view in nodes.nodes]
        shards = await client.list_shards(consistency=STALE)
        moves = await client.list_moves(include_ended=True, consistency=STALE)
        jobs = await client.list_jobs(consistency=STALE)
        parts += [view.job.SerializeToString(deterministic=True) for view in jobs.jobs]
        launches = await client.list_launches(latest=1_000, consistency=STALE)
        parts += [message.SerializeToString(deterministic=True) for message in (shards, moves, launches)]
        parts += [event.SerializeToString() async for event in client.stream_events(from_sequence=1)]
    return b"\n".join(parts)


