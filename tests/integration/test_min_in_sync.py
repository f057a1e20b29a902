"""What `[state] min_in_sync = 2` promises, on real workers: what was acknowledged is on two disks at that moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.client.state import AsyncStateClient
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError, TooFewReplicas
from tools.lib.local_cluster import LocalCluster

USERS = [f"user-{number}" for number in range(40)]


def two_copies(config: ClusterConfig) -> ClusterConfig:
    """Eight shards, no write on one copy."""
    placement = replace(config.placement, shards=8)
    return replace(config, placement=placement, state=replace(config.state, min_in_sync=2))


@pytest.mark.timeout(120)
async def test_two_workers_may_die_at_once_after_an_acknowledgement(tmp_path: Path) -> None:
    """Writes go on when a worker dies, each acknowledged by both others; of these one may die right after the last."""
    with LocalCluster(tmp_path, workers=3, change=two_copies) as cluster:
        cluster.start()
        await asyncio.to_thread(cluster.wait_ready)
        addresses = [master.grpc_address for master in cluster.config.masters]
        async with AsyncStateClient(addresses, credentials=cluster.credentials(), timeout_s=30.0) as client:
            is_over = asyncio.Event()
            acknowledged: dict[str, bytes] = {}

            async def work(user: str) -> None:
                number = 0
                while not is_over.is_set():
                    number += 1
                    await client.put(user, "number", b"%d" % number)
                    acknowledged[user] = b"%d" % number

            working = [asyncio.ensure_future(work(user)) for user in USERS]
            while len(acknowledged) < len(USERS):
                await asyncio.wait(working, timeout=0.05)
            cluster.kill("w1")
            # What was in flight is over by the second round; whatever is acknowledged then is acknowledged without w1.
            before = dict(acknowledged)
            while any(int(acknowledged[user]) < int(before[user]) + 2 for user in USERS):
                done, _ = await asyncio.wait(working, timeout=0.05)
                for task in done:
                    task.result()
            cluster.kill("w2")
            last = dict(acknowledged)
            is_over.set()
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
            for user in USERS:
                entry = await client.get(user, "number")
                assert entry is not None
                assert int(entry.value) >= int(last[user]), f"{user} has lost what was acknowledged"
        async with AsyncStateClient(addresses, credentials=cluster.credentials(), timeout_s=2.0) as client:
            # While the masters do not know of the second loss, a write is taken and waits: its outcome is in doubt. No
            # write is acknowledged, and once they know it is refused for good.
            refused: CoordinatorError | None = None
            while not isinstance(refused, TooFewReplicas):
                with pytest.raises(CoordinatorError) as caught:
                    await client.put(USERS[0], "number", b"0")
                refused = caught.value
