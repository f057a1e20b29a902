"""A real worker whose disk is full: clear refusals, reads all along, its roles go to others, and it comes back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from coordinator.client.state import AsyncStateClient
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from tests.small_disk import fill, small_disk
from tools.lib.local_cluster import LocalCluster, wait_until

WORKER_DISK_BYTES = 24 << 20
USERS = [f"user-{number}" for number in range(24)]
VALUE = bytes(20_000)


def eight_shards(config: ClusterConfig) -> ClusterConfig:
    """Few shards, so that the disk may be small; repaired soon."""
    return replace(config, placement=replace(config.placement, shards=8, hold_s=1.0, dwell_s=1.0))


async def written(client: AsyncStateClient, key: str) -> list[CoordinatorError]:
    """Writes a key of every user; what failed."""
    outcomes = await asyncio.gather(*(client.put(user, key, VALUE) for user in USERS), return_exceptions=True)
    return [outcome for outcome in outcomes if isinstance(outcome, CoordinatorError)]


async def test_a_full_disk_of_a_worker_costs_no_state(tmp_path: Path) -> None:
    """Writes are refused until the roles have moved, reads never fail, status tells; with room it serves again."""
    full = tmp_path / "data" / "w1"
    with small_disk(full, WORKER_DISK_BYTES), LocalCluster(tmp_path, workers=2, change=eight_shards) as cluster:
        cluster.start()
        await asyncio.to_thread(cluster.wait_ready)
        addresses = [master.grpc_address for master in cluster.config.masters]
        async with AsyncStateClient(addresses, credentials=cluster.credentials(), timeout_s=5.0) as client:
            assert await written(client, "before") == []
            ballast = fill(full)
            give_up_at_s = time.monotonic() + 60.0
            rounds = 0
            while failed := await written(client, f"full-{rounds}"):
                assert all(await asyncio.gather(*(client.get(user, "before") for user in USERS)))
                assert time.monotonic() < give_up_at_s, failed[0]
                rounds += 1
            await asyncio.to_thread(wait_until, lambda: "w1 takes no writes" in problems_of(cluster), 30.0, "told")
            primaries = {shard.primary for shard in cluster.client().list_shards().shards}
            assert primaries == {"w2"}
            ballast.unlink()
            await asyncio.to_thread(wait_until, lambda: serves_again(cluster), 60.0, "w1 is primary of some again")
            assert await written(client, "after") == []
            for user in USERS:
                assert set(await client.get_many(user, ["before", "after"])) == {"before", "after"}
            assert "takes no writes" not in problems_of(cluster)


def problems_of(cluster: LocalCluster) -> str:
    """What `clusterctl status` warns of."""
    return "; ".join(cluster.client().get_status().problems)


def serves_again(cluster: LocalCluster) -> bool:
    """True when every shard has both copies and w1 is primary of some."""
    shards = cluster.client().list_shards().shards
    return all(len(shard.in_sync) == 2 for shard in shards) and any(shard.primary == "w1" for shard in shards)
