"""What sets shards in motion by itself, on real workers with the settings of the specification: users, and membership.

The third trigger, memory, cannot differ between workers of one machine; tests/unit/test_control_sizes.py has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.client.state import AsyncStateClient
from coordinator.client.state_types import Delete, Put, Read, Request, Write
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError
from tools.lib.local_cluster import LocalCluster, wait_until

USERS_MAX = 1_200
"""Of the specification, and the default."""
BATCH = 400


def one_shard(config: ClusterConfig) -> ClusterConfig:
    """One shard for everybody; what is small is joined soon."""
    assert config.placement.users_max == USERS_MAX
    return replace(config, placement=replace(config.placement, shards=1, merge_after_s=3.0, dwell_s=1.0))


def users_of_shards(cluster: LocalCluster) -> list[int]:
    """Users of each shard as their primaries told last; fewer than there are shards while some have not."""
    return sorted(figure.users for figure in cluster.client().list_shards(with_figures=True).figures)


async def do(client: AsyncStateClient, operations: Iterable[Request]) -> None:
    """Many operations; none may fail."""
    waiting = list(operations)
    for start in range(0, len(waiting), BATCH):
        for outcome in await client.execute(waiting[start : start + BATCH]):
            if isinstance(outcome, CoordinatorError):
                raise outcome


async def work(client: AsyncStateClient, until: asyncio.Event) -> int:
    """A client that writes and reads all the time; how often. Raises at the first error."""
    count = 0
    while not until.is_set():
        user = f"user-{count * 7 % USERS_MAX}"
        written = await client.put(user, "seen", b"%d" % count)
        entry = await client.get(user, "seen")
        assert entry is not None
        assert (entry.value, entry.version) == (b"%d" % count, written.version)
        count += 1
    return count


@pytest.mark.timeout(180)
async def test_users_cut_a_shard_and_join_it_again(tmp_path: Path) -> None:
    """1,200 users leave a shard whole, one more cuts it at their median, with few left it is joined; nobody sees it."""
    with LocalCluster(tmp_path, workers=2, change=one_shard) as cluster:
        cluster.start()
        await asyncio.to_thread(cluster.wait_ready)
        addresses = [master.grpc_address for master in cluster.config.masters]
        async with AsyncStateClient(addresses, credentials=cluster.credentials(), timeout_s=20.0) as client:
            names = [f"user-{number}" for number in range(USERS_MAX + 1)]
            await do(client, (Write(name, [Put("name", name.encode())]) for name in names[:USERS_MAX]))

            def wait_users(*expected: int) -> None:
                wait_until(lambda: users_of_shards(cluster) == list(expected), 60, f"shards of {expected} users")

            await asyncio.to_thread(wait_users, USERS_MAX)
            await asyncio.sleep(5)  # Two more reports of the figures: nothing follows from them.
            assert users_of_shards(cluster) == [USERS_MAX]
            until = asyncio.Event()
            working = asyncio.create_task(work(client, until))
            await client.put(names[-1], "name", b"one too many")
            await asyncio.to_thread(wait_users, USERS_MAX // 2, USERS_MAX // 2 + 1)
            moves = cluster.client().list_moves(include_ended=True).moves
            [cut] = [move for move in moves if move.kind == types_pb2.MOVE_KIND_SPLIT]
            assert cut.phase == types_pb2.MOVE_PHASE_DONE
            assert cut.reason == "1201 users, at most 1200 are wanted"
            for start in range(0, len(names), BATCH):
                part = names[start : start + BATCH]
                outcomes = await client.execute([Read(name, ["name"]) for name in part])
                for name, outcome in zip(part, outcomes, strict=True):
                    assert not isinstance(outcome, CoordinatorError), name
                    assert len(outcome.entries) == 1, name  # type: ignore[union-attr]
            until.set()
            assert await working > 10
            await do(client, (Write(name, [Delete("name"), Delete("seen")]) for name in names[100:]))
            left = 100
            await asyncio.to_thread(wait_users, left)
            assert len(cluster.client().list_shards().shards) == 1
        assert cluster.stop() == []


@pytest.mark.timeout(180)
def test_membership_moves_shards(tmp_path: Path) -> None:
    """A worker that comes, one whose weight changes, one to be drained: each sets moves off, and they end."""

    def small(config: ClusterConfig) -> ClusterConfig:
        return replace(config, placement=replace(config.placement, shards=24, dwell_s=0.0, hold_s=1.0))

    with LocalCluster(tmp_path, workers=2, change=small) as cluster:
        cluster.start()
        cluster.wait_ready()
        client = cluster.client()

        def held() -> dict[str, int]:
            names = [name for shard in client.list_shards().shards for name in shard.in_sync]
            return {name: names.count(name) for name in ("w1", "w2", "w3")}

        def is_still() -> bool:
            shards = client.list_shards().shards
            return not client.list_moves().moves and all(len(shard.in_sync) == 2 for shard in shards)

        assert held() == {"w1": 24, "w2": 24, "w3": 0}
        cluster.add_worker("w3")
        wait_until(lambda: is_still() and 14 <= held()["w3"] <= 18, 60, "the new worker has its third")
        client.set_node_weight("w3", 0.25)
        wait_until(lambda: is_still() and 4 <= held()["w3"] <= 8, 60, "it has less with less weight")
        client.drain_node("w3")
        wait_until(lambda: is_still() and held()["w3"] == 0, 60, "it is empty")
        reasons = {move.reason for move in client.list_moves(include_ended=True).moves}
        assert "w3 is draining" in reasons
        assert cluster.stop() == []
