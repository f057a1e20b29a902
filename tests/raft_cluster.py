"""Three real RaftNodes over loopback sockets in one event loop, for integration tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from coordinator.config import MasterSettings, RaftSettings
from coordinator.model import Clock, SystemClock
from coordinator.raft import Machine, RaftNode
from tests.raft_machine import MACHINE
from tools.lib.ports import free_ports

IDS = ("m1", "m2", "m3")
CLUSTER_NAME = "test"


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Returns once the condition holds; fails after the deadline."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of several masters, without one event
            await asyncio.sleep(0.002)


class Cluster:
    """Masters that can be stopped and started again on their directories."""

    def __init__(self, directory: Path, settings: RaftSettings, machine: Machine) -> None:
        self.directory = directory
        self.settings = settings
        self.machine = machine
        ports = free_ports(len(IDS))
        self.masters = tuple(
            MasterSettings(id, "127.0.0.1:1", f"127.0.0.1:{port}", "127.0.0.1:2")
            for id, port in zip(IDS, ports, strict=True)
        )
        self.clocks: dict[str, Clock] = {id: SystemClock() for id in IDS}
        self.nodes: dict[str, RaftNode] = {}

    def make(self, id: str, cluster_name: str = CLUSTER_NAME) -> RaftNode:
        """A node that is not started."""
        return RaftNode(
            self_id=id,
            masters=self.masters,
            cluster_name=cluster_name,
            directory=self.directory / id,
            settings=self.settings,
            clock=self.clocks[id],
            machine=self.machine,
        )

    async def start(self, *ids: str) -> None:
        """Starts masters; all of them without an argument."""
        for id in ids or IDS:
            self.nodes[id] = self.make(id)
            await self.nodes[id].start()

    async def stop(self, *ids: str) -> None:
        """Stops masters, which say no goodbye to each other; all of them without an argument."""
        for id in ids or tuple(self.nodes):
            await self.nodes.pop(id).stop()

    async def leader(self) -> RaftNode:
        """The leader, once all that run agree on it and are ready."""
        await until(
            lambda: any(node.is_leader for node in self.nodes.values())
            and len({node.leader_id for node in self.nodes.values()}) == 1
            and all(node.is_ready for node in self.nodes.values())
        )
        return next(node for node in self.nodes.values() if node.is_leader)

    async def followers(self) -> list[RaftNode]:
        """All but the leader."""
        leader = await self.leader()
        return [node for node in self.nodes.values() if node is not leader]

    async def agree(self) -> None:
        """Waits until all that run have applied the same."""
        await until(lambda: len({node.status().applied_index for node in self.nodes.values()}) == 1)
        assert len({node.state for node in self.nodes.values()}) == 1


@asynccontextmanager
async def cluster(
    directory: Path, settings: RaftSettings | None = None, machine: Machine = MACHINE
) -> AsyncIterator[Cluster]:
    """A cluster of three; it is started, and stopped at the end."""
    made = Cluster(directory, settings or RaftSettings(), machine)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()
