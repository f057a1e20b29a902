"""The consensus: commit latency, commits per second, failover. Three masters on loopback sockets in one event loop.

One process for all three makes the figures those of the protocol's work on one core; nothing is fsynced per commit yet.
The commands are barriers of the real machine with a hundred bytes of cause.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
import time
from pathlib import Path

from coordinator.api.v1 import command_pb2
from coordinator.config import MasterSettings, RaftSettings
from coordinator.model import SystemClock
from coordinator.raft import RaftNode
from tools.bench_lib.result import OURS, Emit

IDS = ("m1", "m2", "m3")
COMMITS_ALONE = 2_000
COMMITS_TOGETHER = 10_000
FAILOVERS = 10
COMMAND = command_pb2.Command(cause="x" * 100, barrier=command_pb2.Barrier())


def run(emit: Emit) -> None:
    """Measures and reports."""
    directory = Path(tempfile.mkdtemp(prefix="bench-raft-"))
    try:
        try:
            import uvloop
        except ImportError:
            asyncio.run(_measure(emit, directory))
        else:
            uvloop.run(_measure(emit, directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _masters() -> tuple[MasterSettings, ...]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in IDS]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return tuple(
        MasterSettings(id, "127.0.0.1:1", f"127.0.0.1:{port}", "127.0.0.1:2")
        for id, port in zip(IDS, ports, strict=True)
    )


class _Cluster:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._masters = _masters()
        self.nodes: dict[str, RaftNode] = {}

    async def start(self, id: str) -> None:
        """Starts a master on its directory."""
        node = RaftNode(
            self_id=id,
            masters=self._masters,
            cluster_name="bench",
            directory=self._directory / id,
            settings=RaftSettings(),
            clock=SystemClock(),
        )
        self.nodes[id] = node
        await node.start()

    async def leader(self) -> RaftNode:
        """The leader, once all are ready."""
        async with asyncio.timeout(30.0):
            while True:
                leading = [node for node in self.nodes.values() if node.is_leader]
                if len(leading) == 1 and all(node.is_ready for node in self.nodes.values()):
                    return leading[0]
                await asyncio.sleep(0.01)


async def _measure(emit: Emit, directory: Path) -> None:
    cluster = _Cluster(directory)
    try:
        for id in IDS:
            await cluster.start(id)
        leader = await cluster.leader()
        follower = next(node for node in cluster.nodes.values() if node is not leader)
        for name, node in (("leader", leader), ("follower", follower)):
            samples = await _alone(node)
            emit(OURS, "commit_ms", sorted(samples)[len(samples) // 2], "ms", {"through": name, "clients": 1}, samples)
            for clients in (64, 256):
                per_s = await _together(node, clients)
                emit(OURS, "commits_per_s", per_s, "1/s", {"through": name, "clients": clients})
        failovers = [await _failover(cluster) for _ in range(FAILOVERS)]
        params = {"from": "stop of the leader", "to": "next commit"}
        emit(OURS, "leader_failover_s", sorted(failovers)[FAILOVERS // 2], "s", params, failovers)
    finally:
        for node in cluster.nodes.values():
            await node.stop()


async def _alone(node: RaftNode) -> list[float]:
    """Milliseconds of each commit of one client."""
    samples = []
    for _ in range(COMMITS_ALONE):
        begun_s = time.perf_counter()
        await node.propose(COMMAND)
        samples.append((time.perf_counter() - begun_s) * 1_000)
    return samples


async def _together(node: RaftNode, clients: int) -> float:
    """Commits per second of many clients, each with one in flight."""
    left = COMMITS_TOGETHER

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await node.propose(COMMAND)

    begun_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return COMMITS_TOGETHER / (time.perf_counter() - begun_s)


async def _failover(cluster: _Cluster) -> float:
    """Seconds from the end of the leader, which says no goodbye, to the next commit elsewhere."""
    leader = await cluster.leader()
    begun_s = time.perf_counter()
    await cluster.nodes.pop(leader.self_id).stop()
    await next(iter(cluster.nodes.values())).propose(COMMAND)
    took_s = time.perf_counter() - begun_s
    await cluster.start(leader.self_id)
    return took_s
