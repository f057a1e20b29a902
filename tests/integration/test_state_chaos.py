"""Real workers under kill -9, SIGSTOP, restarts, drains, joins and master changes, while clients write and read state.

`STATE_CHAOS_SECONDS` sets how long the campaign lasts (600 by default), `CHAOS_SEED` the order of the faults.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.client import AsyncClusterClient
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from tests.state_chaos import StateClients
from tools.lib.local_cluster import LocalCluster, NotSoInTime, wait_until

SUITE_S = 40.0
CAMPAIGN_S = float(os.environ.get("STATE_CHAOS_SECONDS", "600"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
WORKERS = 4
WHOLE_S_MAX = 45.0
"""From the end of the last fault until every shard has its replicas again."""

log = logging.getLogger(__name__)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGSTOP is POSIX's")


def small(config: ClusterConfig) -> ClusterConfig:
    """Sixteen shards that are repaired and balanced soon, so that a minute sees much of it."""
    placement = replace(config.placement, shards=16, hold_s=3.0, dwell_s=2.0)
    # Killing workers in turn is what quarantine is for; here it would end the test.
    return replace(config, placement=placement, moves=replace(config.moves, quarantine_workers=0))


class Faults:
    """Does things to the daemons of a cluster; after each all of them run again."""

    def __init__(self, cluster: LocalCluster, seed: int, kinds: list[str]) -> None:
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._rng = random.Random(f"faults {seed}")
        self._names = kinds
        self._kinds: list[Callable[[], Awaitable[None]]] = []

    async def run(self, seconds: float) -> None:
        """Every kind in turn, in a random order, until the time is over."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            if not self._kinds:
                self._kinds = [getattr(self, name) for name in self._names]
                self._rng.shuffle(self._kinds)
            fault = self._kinds.pop()
            self.done[fault.__name__] += 1
            log.info("%.1f s left: %s", end_s - time.monotonic(), fault.__name__)
            await fault()
            await asyncio.sleep(self._rng.uniform(0.2, 2.0))

    def _worker(self) -> str:
        return self._rng.choice(self._cluster.worker_ids)

    async def kill_worker(self) -> None:
        """kill -9, and it comes back after a while."""
        await self._kill(self._worker())

    async def kill_worker_briefly(self) -> None:
        """It is back before anybody gives it up."""
        worker = self._worker()
        self._cluster.kill(worker)
        self._cluster.start([worker])

    async def pause_worker(self) -> None:
        """It stands still, longer or shorter than its leases."""
        process_id = self._cluster.process(self._worker()).process_id
        assert process_id is not None
        os.kill(process_id, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._rng.choice([0.5, 1.2, 2.5, 5.0]))
        finally:
            os.kill(process_id, signal.SIGCONT)

    async def restart_worker(self) -> None:
        """A clean stop and a start."""
        worker = self._worker()
        await asyncio.to_thread(self._cluster.stop, [worker])
        self._cluster.start([worker])

    async def drain_worker(self) -> None:
        """An operator empties a worker, and changes their mind after a while."""
        worker = self._worker()
        async with self.client() as client:
            await retried(lambda: client.drain_node(worker))
            await asyncio.sleep(self._rng.uniform(0.5, 4.0))
            await retried(lambda: client.undrain_node(worker))

    async def kill_leader(self) -> None:
        """kill -9 of the leading master."""
        await self._kill(await asyncio.to_thread(self._cluster.wait_leader))

    async def stop_leader(self) -> None:
        """A clean stop of the leading master, as in a rolling restart: it is back before the next one is stopped."""
        leader = await asyncio.to_thread(self._cluster.wait_leader)
        await asyncio.to_thread(self._cluster.stop, [leader])
        self._cluster.start([leader])
        await asyncio.to_thread(self._cluster.wait_back, leader)

    async def kill_worker_and_leader(self) -> None:
        """Both at once."""
        worker = self._worker()
        self._cluster.kill(worker)
        await self._kill(await asyncio.to_thread(self._cluster.wait_leader))
        self._cluster.start([worker])

    async def cut_shard(self) -> None:
        """A shard is cut in two; refused where it moves, or lacks a replica."""
        async with self.client() as client:
            shards = (await client.list_shards()).shards
            await retried(lambda: client.split_shard(self._rng.choice(shards).id), attempts=2)

    async def join_shards(self) -> None:
        """Two neighbours that the same workers hold become one, where there are such."""
        async with self.client() as client:
            shards = sorted((await client.list_shards()).shards, key=lambda shard: shard.lo)
            pairs = [pair for pair in itertools.pairwise(shards) if pair[0].in_sync == pair[1].in_sync]
            if pairs:
                lower, upper = self._rng.choice(pairs)
                await retried(lambda: client.merge_shards(lower.id, upper.id), attempts=2)

    def client(self) -> AsyncClusterClient:
        """An operator's."""
        addresses = [master.grpc_address for master in self._cluster.config.masters]
        return AsyncClusterClient(addresses, credentials=self._cluster.credentials())

    async def _kill(self, daemon_id: str) -> None:
        self._cluster.kill(daemon_id)
        await asyncio.sleep(self._rng.uniform(0.0, 5.0))
        self._cluster.start([daemon_id])


async def retried(call: Callable[[], Awaitable[object]], attempts: int = 5) -> None:
    """An operator who tries again: leaders change here."""
    for attempt in range(attempts):
        try:
            await call()
            return
        except CoordinatorError as error:
            log.info("attempt %d: %s", attempt, error)
            await asyncio.sleep(0.5)


def unfinished(cluster: LocalCluster) -> list[str]:
    """Shards that lack a replica, and moves that go on, for people."""
    client = cluster.client()
    replicas = cluster.config.placement.replicas
    shards = [
        f"shard {shard.id} epoch {shard.epoch}: primary {shard.primary}, in sync {list(shard.in_sync)}, joining "
        f"{list(shard.joining)}, absent {list(shard.absent)}"
        for shard in client.list_shards().shards
        if len(shard.in_sync) < replicas or shard.joining
    ]
    return shards + [f"move {move.id}: {move}".replace("\n", " ") for move in client.list_moves().moves]


def wait_whole(cluster: LocalCluster) -> None:
    """Returns once every shard has its replicas and nothing moves."""
    left: list[str] = ["not asked yet"]

    def look() -> bool:
        nonlocal left
        left = unfinished(cluster)
        return not left

    try:
        wait_until(look, WHOLE_S_MAX, "every shard has its replicas")
    except NotSoInTime as error:
        nodes = [str(node).replace("\n", " ") for node in cluster.client().list_nodes().nodes]
        raise AssertionError("\n".join([str(error), *left, *nodes])) from None


async def chaos(directory: Path, seconds: float, seed: int, kinds: list[str]) -> StateClients:
    """Runs clients and faults, and checks everything that must hold whatever happened."""
    with LocalCluster(directory, masters=3, workers=WORKERS, change=small) as cluster:
        cluster.start()
        await asyncio.to_thread(cluster.wait_ready)
        addresses = [master.grpc_address for master in cluster.config.masters]
        clients = StateClients(addresses, cluster.credentials(), seed)
        faults = Faults(cluster, seed, kinds)
        until = asyncio.Event()
        working = asyncio.create_task(clients.run(until))
        try:
            await faults.run(seconds)
            began_s = time.monotonic()
            await asyncio.to_thread(wait_whole, cluster)
            whole_s = time.monotonic() - began_s
        finally:
            until.set()
            await working
            await clients.close()
        cluster.raise_if_dead()
    problem = clients.history.problem()
    assert not problem, f"seed {seed}: {problem}"
    happened = ", ".join(f"{count} {name}" for name, count in sorted(faults.done.items()))
    log.info("%s; whole after %.1f s; faults: %s", clients.history.figures(), whole_s, happened)
    return clients


FAULTS = [
    "kill_worker",
    "kill_worker_briefly",
    "pause_worker",
    "restart_worker",
    "drain_worker",
    "kill_leader",
    "stop_leader",
    "kill_worker_and_leader",
    "cut_shard",
    "join_shards",
]


@pytest.mark.timeout(SUITE_S + 180)
async def test_nothing_is_lost_or_stale_when_workers_fail(tmp_path: Path) -> None:
    """Every kind of fault in turn: linearizable per user, nothing lost, nothing denied seen, whole at the end."""
    await chaos(tmp_path, SUITE_S, SEED, FAULTS)


@pytest.mark.timeout(SUITE_S + 180)
async def test_planned_changes_fail_no_request(tmp_path: Path) -> None:
    """Drains, cuts, joins, rolling restarts of workers and clean changes of the leader: no patient request fails."""
    kinds = ["drain_worker", "restart_worker", "stop_leader", "cut_shard", "join_shards"]
    clients = await chaos(tmp_path, SUITE_S / 2, SEED, kinds)
    assert clients.history.errors == []


@pytest.mark.campaign
@pytest.mark.timeout(CAMPAIGN_S + 300)
async def test_state_campaign(tmp_path: Path) -> None:
    """The first of these for STATE_CHAOS_SECONDS."""
    await chaos(tmp_path, CAMPAIGN_S, SEED, FAULTS)
