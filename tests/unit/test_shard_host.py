"""One hosted shard with a real store: who is told that it serves, and what damage on its disk does to it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from coordinator.api.v1 import replication_pb2, session_pb2
from coordinator.model import HASH_SPACE, Monotonic, SystemClock
from worker_agent.shard import Shard
from worker_agent.shard_context import ShardContext
from worker_agent.shard_interface import ReplicaRole, ReplicaTimes, ShardView
from worker_agent.state_interface import Place
from worker_agent.store import StoreSettings

ALONE = ShardView(1, 0, HASH_SPACE, 1, ReplicaRole.PRIMARY, "w1", ("w1",), (), is_formed=False)


@dataclass
class Hosting:
    """A shard of its own, and what it told."""

    path: Path
    shard: Shard
    serving: list[bool] = field(default_factory=list)
    reports: list[session_pb2.ReplicaReport] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def next_change(self) -> None:
        """Returns at the next change that the shard tells."""
        self.changed.clear()
        await self.changed.wait()

    async def until_serving(self, wanted: bool) -> None:
        """Returns once it serves, or does not."""
        async with asyncio.timeout(10):
            while self.shard.is_serving != wanted:
                await self.next_change()

    async def put(self, key: str) -> None:
        """A write."""
        effects = replication_pb2.Effects(user="ann", effects=[replication_pb2.Effect(key=key, value=b"value")])
        await self.shard.submit(effects.SerializeToString())

    def damage(self) -> None:
        """Somebody changes the rows behind the store's back."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("UPDATE entries SET value = x'00'")

    async def scrub(self) -> None:
        """A whole round."""
        cursor = await self.shard.scrub(b"")
        while cursor:
            cursor = await self.shard.scrub(cursor)


@pytest.fixture
async def hosting(tmp_path: Path) -> AsyncIterator[Hosting]:
    """A shard that has one replica, which serves it."""
    with ThreadPoolExecutor(2) as pool:
        context = ShardContext(
            node_id="w1",
            pool=pool,
            copies_pool=pool,
            clock=SystemClock(),
            store_settings=StoreSettings(),
            times=ReplicaTimes(replica_lease_s=0.1, heartbeat_s=0.02),
            has_session_lease=lambda now: True,
            report=lambda report: made.reports.append(report),
            send=lambda node_id, message, is_answer: None,
            connected_peers=lambda: (),
            place=lambda node_id: Place(node_id, ""),
            on_changed=lambda: made.changed.set(),
            changed=lambda: made.next_change(),
            on_serving=lambda shard, is_serving: made.serving.append(is_serving),
        )
        shard = Shard(ALONE, tmp_path / "1.sqlite", context, Monotonic(0.0))
        made = Hosting(tmp_path / "1.sqlite", shard)
        await shard.open()
        shard.assign(replace(ALONE, is_formed=True))
        await made.until_serving(True)
        yield made
        await shard.close()


async def test_serving_is_told_in_order(hosting: Hosting) -> None:
    """Whoever follows a shard hears of each beginning and each end once, the closing included."""
    assert hosting.serving == [True]
    await hosting.put("a")
    hosting.shard.assign(replace(ALONE, is_formed=True, epoch=2, role=ReplicaRole.IN_SYNC, primary="w2"))
    hosting.shard.assign(replace(ALONE, is_formed=True, epoch=3))
    await hosting.until_serving(True)
    assert hosting.serving == [True, False, True]
    await hosting.shard.close()
    await hosting.shard.close()
    assert hosting.serving == [True, False, True, False]


async def test_the_last_copy_stays_in_service(hosting: Hosting, caplog: pytest.LogCaptureFixture) -> None:
    """Damage in the only copy is told in the log, and the shard goes on: what is sound in it is all that there is."""
    await hosting.put("a")
    await hosting.scrub()
    assert not caplog.records, "a sound store is no news"
    hosting.damage()
    await hosting.scrub()
    assert "its last copy is damaged, and stays in service" in caplog.text
    assert hosting.shard.is_serving
    await hosting.put("b")


async def test_a_damaged_copy_beside_others_is_lost(hosting: Hosting) -> None:
    """Where there is another copy, a damaged one stops at once, says LOST, and is not checked any more."""
    await hosting.put("a")
    hosting.shard.assign(replace(ALONE, is_formed=True, epoch=2, in_sync=("w1", "w2")))
    hosting.damage()
    await hosting.scrub()
    assert hosting.shard.state == "lost"
    assert hosting.serving == [True, False]
    assert hosting.reports[-1].progress == session_pb2.REPLICA_PROGRESS_LOST
    assert "does not match" in hosting.reports[-1].reason
    assert await hosting.shard.scrub_rows() == 0
