"""What happens to the daemons of a real cluster while clients are at work: faults, and what operators do by plan."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace

from coordinator.api.v1 import types_pb2
from coordinator.client import AsyncClusterClient
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from tools.lib.local_cluster import LocalCluster, NotSoInTime, wait_until

WHOLE_S_MAX = 45.0
"""From the end of the last fault until every shard has its replicas again."""
GUEST = "w9"
"""A worker beyond those of the configuration, which comes and goes."""

log = logging.getLogger(__name__)


def small(config: ClusterConfig) -> ClusterConfig:
    """Sixteen shards that are repaired and balanced soon, so that a minute sees much of it."""
    placement = replace(config.placement, shards=16, hold_s=3.0, dwell_s=2.0)
    # Killing workers in turn is what quarantine is for; here it would end the test.
    return replace(config, placement=placement, moves=replace(config.moves, quarantine_workers=0))


class Faults:
    """Does things to the daemons of a cluster; after each all of them run again."""

    def __init__(self, cluster: LocalCluster, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self._cluster = cluster
        self._rng = random.Random(f"faults {seed}")
        self._kinds: list[Callable[[], Awaitable[None]]] = []

    async def run(self, seconds: float) -> None:
        """Every kind in turn, in a random order, until the time is over."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            if not self._kinds:
                self._kinds = self._every_kind()
                self._rng.shuffle(self._kinds)
            fault = self._kinds.pop()
            self.done[fault.__name__] += 1
            log.info("%.1f s left: %s", end_s - time.monotonic(), fault.__name__)
            await fault()
            await asyncio.sleep(self._rng.uniform(0.2, 2.0))

    def _every_kind(self) -> list[Callable[[], Awaitable[None]]]:
        return [
            self.kill_worker,
            self.kill_worker_briefly,
            self.pause_worker,
            self.restart_worker,
            self.drain_worker,
            self.join_or_leave,
            self.change_weight,
            self.kill_leader,
            self.stop_leader,
            self.kill_worker_and_leader,
            self.cut_shard,
            self.join_shards,
        ]

    def _worker(self) -> str:
        return self._rng.choice([name for name in self._cluster.worker_ids if self._runs(name)])

    def _runs(self, daemon_id: str) -> bool:
        return daemon_id in self._cluster.worker_ids and self._cluster.process(daemon_id).process_id is not None

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

    async def join_or_leave(self) -> None:
        """A further worker joins, and its share is on its way to it; the next time it is emptied, and leaves."""
        if not self._runs(GUEST):
            await asyncio.to_thread(self._cluster.add_worker, GUEST)
            return
        async with self.client() as client:
            await retried(lambda: client.drain_node(GUEST))
        await asyncio.to_thread(leave, self._cluster, GUEST)

    async def change_weight(self) -> None:
        """A worker is to have half of its share, and then the whole again: shards move to and fro."""
        worker = self._worker()
        async with self.client() as client:
            await retried(lambda: client.set_node_weight(worker, 0.5))
            await asyncio.sleep(self._rng.uniform(0.5, 4.0))
            await retried(lambda: client.set_node_weight(worker, 1.0))

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


class Operator:
    """Changes a cluster by plan, one thing at a time; each method returns once that is done and the cluster whole."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._client = cluster.client()

    def _shards(self) -> list[types_pb2.Shard]:
        return sorted(self._client.list_shards().shards, key=lambda shard: shard.lo)

    def _holds(self, worker_id: str) -> int:
        return sum(worker_id in shard.in_sync for shard in self._shards())

    def has_a_worker_join(self) -> None:
        """A further worker gets its share."""
        self._cluster.add_worker(GUEST)
        wait_until(lambda: self._holds(GUEST), WHOLE_S_MAX, "the new worker has its first shard")
        wait_whole(self._cluster)

    def changes_a_weight(self) -> None:
        """A worker gives half of its shards up."""
        name = self._cluster.worker_ids[0]
        before = self._holds(name)
        self._client.set_node_weight(name, 0.5)
        wait_until(lambda: self._holds(name) < before, WHOLE_S_MAX, f"{name} holds less")
        wait_whole(self._cluster)
        self._client.set_node_weight(name, 1.0)

    def drains_a_worker(self) -> None:
        """A worker is emptied, and filled again."""
        name = self._cluster.worker_ids[1]
        self._client.drain_node(name)
        wait_until(lambda: not self._holds(name), WHOLE_S_MAX, f"{name} is empty")
        wait_whole(self._cluster)
        self._client.undrain_node(name)
        wait_until(lambda: self._holds(name), WHOLE_S_MAX, f"{name} holds a shard again")
        wait_whole(self._cluster)

    def cuts_and_joins(self) -> None:
        """Every fourth shard is cut in two, and the halves are joined again before balance parts them."""
        self._client.change_settings(rebalance_paused=True)
        wait_whole(self._cluster)
        for shard in self._shards()[::4]:
            at = (shard.lo + (shard.hi or 1 << 64)) // 2
            self._client.split_shard(shard.id, at=at)
            wait_until(lambda at=at: any(one.lo == at for one in self._shards()), WHOLE_S_MAX, "it is cut")  # type: ignore[misc]
            wait_whole(self._cluster)
            lower, upper = next(pair for pair in itertools.pairwise(self._shards()) if pair[1].lo == at)
            self._client.merge_shards(lower.id, upper.id)
            wait_until(lambda at=at: all(one.lo != at for one in self._shards()), WHOLE_S_MAX, "it is joined")  # type: ignore[misc]
            wait_whole(self._cluster)
        self._client.change_settings(rebalance_paused=False)

    def restarts_every_worker(self) -> None:
        """One after the other, the next one once the one before carries its shards again."""
        for name in self._cluster.worker_ids:
            self._cluster.stop([name])
            self._cluster.start([name])
            self._cluster.wait_ready()
            wait_whole(self._cluster)

    def restarts_every_master(self) -> None:
        """One after the other, the leader among them, the next one once the one before takes part again."""
        for name in self._cluster.master_ids:
            self._cluster.stop([name])
            self._cluster.start([name])
            self._cluster.wait_back(name)

    def has_a_worker_leave(self) -> None:
        """The further worker is emptied, stopped and let go."""
        self._client.drain_node(GUEST)
        leave(self._cluster, GUEST)


async def retried(call: Callable[[], Awaitable[object]], attempts: int = 5) -> None:
    """An operator who tries again: leaders change here."""
    for attempt in range(attempts):
        try:
            await call()
            return
        except CoordinatorError as error:
            log.info("attempt %d: %s", attempt, error)
            await asyncio.sleep(0.5)


def leave(cluster: LocalCluster, worker_id: str) -> None:
    """Waits until a worker that is to be drained is empty, stops it, and returns once the masters have let it go."""
    client = cluster.client()

    def is_empty() -> bool:
        [view] = client.list_nodes(node_id=worker_id).nodes
        return not view.replicas and not view.jobs

    def has_left() -> bool:
        return all(view.node.state == types_pb2.NODE_STATE_LEFT for view in client.list_nodes(node_id=worker_id).nodes)

    wait_until(is_empty, WHOLE_S_MAX, f"{worker_id} is empty")
    cluster.stop([worker_id])
    wait_until(has_left, WHOLE_S_MAX, f"{worker_id} has left")


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
