"""A cluster that a test plays: masters that say where the shards are, workers that serve them, and a client."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.client import AsyncStateClient
from coordinator.config import StateSettings
from coordinator.model import HASH_SPACE
from coordinator.model.errors import CoordinatorError
from tests.played_state import PlayedHost, PlayedShard, PlayedWorker, Rows, played_workers
from tests.unit.scripted_masters import ScriptedMaster, masters


@dataclass(slots=True)
class World:
    """What the played masters say."""

    addresses: dict[str, str]
    shards: list[types_pb2.Shard]
    generation: int = 1
    error: CoordinatorError | None = None
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a master is asked for the shards."""

    def answer(self, request: Any) -> Any:
        if self.error is not None:
            return self.error
        if isinstance(request, cluster_pb2.ListNodesRequest):
            nodes = [types_pb2.Node(id=node_id, grpc_address=address) for node_id, address in self.addresses.items()]
            return cluster_pb2.ListNodesResponse(nodes=[cluster_pb2.NodeView(node=node) for node in nodes])
        self.asked.set()
        return cluster_pb2.ListShardsResponse(shards=self.shards, generation=self.generation)

    def move(self, primary: str, shard: int = 0) -> None:
        """Another primary, decided by the masters."""
        self.generation += 1
        self.shards[shard].primary = primary
        self.shards[shard].epoch += 1


@dataclass(slots=True)
class Cluster:
    """Workers, what masters say of them, and a client."""

    world: World
    master: ScriptedMaster
    workers: list[PlayedWorker]
    client: AsyncStateClient

    @property
    def shards(self) -> list[PlayedShard]:
        return [shard for worker in self.workers for shard in worker.host.shards]


@asynccontextmanager
async def cluster(*hosts: PlayedHost, settings: StateSettings | None = None) -> AsyncIterator[Cluster]:
    """A client of a cluster whose masters say what the workers' shards say of themselves."""
    async with played_workers(*hosts, settings=settings) as workers:
        shards: dict[int, types_pb2.Shard] = {}
        for worker in workers:
            for shard in worker.host.shards:
                known = shards.setdefault(
                    shard.shard_id, types_pb2.Shard(id=shard.shard_id, lo=shard.lo, hi=shard.hi % HASH_SPACE, epoch=1)
                )
                known.in_sync.append(worker.node_id)
                if shard.is_primary:
                    known.primary = worker.node_id
        world = World({worker.node_id: worker.address for worker in workers}, list(shards.values()))
        async with masters(world.answer) as [master]:
            async with AsyncStateClient([master.address], timeout_s=5.0, rng=random.Random(1)) as client:
                yield Cluster(world, master, workers, client)


def one_shard() -> PlayedHost:
    return PlayedHost(PlayedShard(Rows()))


def two_replicas() -> tuple[PlayedHost, PlayedHost]:
    """One shard on two workers with the same rows, the first one primary."""
    rows = Rows()
    second = PlayedShard(rows, node_id="w2")
    second.is_primary = second.is_serving = False
    return PlayedHost(PlayedShard(rows)), PlayedHost(second)


def promote(cluster_: Cluster, to: int, *, told: bool = True) -> None:
    """The other worker becomes primary; the masters say so when `told`."""
    for index, worker in enumerate(cluster_.workers):
        [shard] = worker.host.shards
        shard.is_primary = shard.is_serving = index == to
        shard.primary = cluster_.workers[to].place
        shard.epoch += 1
        worker.host.tell()
    if told:
        cluster_.world.move(cluster_.workers[to].node_id)
