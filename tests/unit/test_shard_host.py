"""One hosted shard with a real store: who is told that it serves, and what damage on its disk does to it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest

from coordinator.api.v1 import replication_pb2, session_pb2
from coordinator.config import StateSettings
from coordinator.model import HASH_SPACE, Monotonic, SystemClock
from coordinator.model.errors import Damaged
from worker_agent.shard import Shard
from worker_agent.shard_context import CopyRate, ShardContext
from worker_agent.shard_interface import PeerConnected, PeerSaid, ReplicaRole, ReplicaTimes, ShardView
from worker_agent.shards import Shards
from worker_agent.state_interface import Place
from worker_agent.store import StoreSettings
from worker_agent.store_care import ScrubTally

Said = TypeVar("Said")
ALONE = ShardView(1, 0, HASH_SPACE, 1, ReplicaRole.PRIMARY, "w1", ("w1",), (), is_formed=False)


@dataclass
class Hosting:
    """A shard of its own, and what it told."""

    path: Path
    shard: Shard
    serving: list[bool] = field(default_factory=list)
    reports: list[session_pb2.ReplicaReport] = field(default_factory=list)
    sent: list[replication_pb2.ShardMessage] = field(default_factory=list)
    told: asyncio.Event = field(default_factory=asyncio.Event)
    tally: ScrubTally = field(default_factory=ScrubTally)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def next_change(self) -> None:
        """Returns at the next change that the shard tells."""
        self.changed.clear()
        await self.changed.wait()

    def say(self, what: list[Said], word: Said) -> None:
        """It told a peer or the leader something."""
        what.append(word)
        self.told.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Returns once it has told enough."""
        async with asyncio.timeout(10):
            while not is_so():
                self.told.clear()
                await self.told.wait()

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

    def flip(self) -> None:
        """A bit of the rows flips."""
        with closing(sqlite3.connect(self.path)) as connection, connection:
            connection.execute("UPDATE entries SET value = x'76616c7566'")

    async def damage_told(self) -> str:
        """What the leader hears."""
        figure = await self.shard.figures()
        assert figure is not None
        return figure.damage

    async def scrub(self) -> None:
        """A whole round."""
        cursor = await self.shard.care.scrub(b"")
        while cursor:
            cursor = await self.shard.care.scrub(cursor)


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
            report=lambda report: made.say(made.reports, report),
            send=lambda node_id, message, is_answer: made.say(made.sent, message),
            connected_peers=lambda: (),
            place=lambda node_id: Place(node_id, ""),
            on_changed=lambda: made.changed.set(),
            changed=lambda: made.next_change(),
            on_serving=lambda shard, is_serving: made.serving.append(is_serving),
        )
        shard = Shard(ALONE, tmp_path / "1.sqlite", context, Monotonic(0.0))
        made = Hosting(tmp_path / "1.sqlite", shard, tally=context.scrub_tally)
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
    assert "does not match" in await hosting.damage_told()
    assert (hosting.tally.found, hosting.tally.mended) == (1, 0)


async def test_a_damaged_row_that_is_written_again_is_forgiven(hosting: Hosting) -> None:
    """A clean round of the scrub ends what the leader is told, and the copy counts as mended."""
    await hosting.put("a")
    hosting.flip()
    await hosting.scrub()
    assert await hosting.damage_told()
    assert hosting.tally.bytes == 0, "what is damaged does not count as checked"
    await hosting.put("a")
    await hosting.scrub()
    assert await hosting.damage_told() == ""
    assert (hosting.tally.found, hosting.tally.mended) == (1, 1)
    assert hosting.tally.bytes > len("annavalue")


async def test_a_damaged_last_copy_goes_when_there_is_another(hosting: Hosting) -> None:
    """As soon as another worker is in sync the damaged copy is given up, and the files of it are not to be used."""
    await hosting.put("a")
    hosting.damage()
    await hosting.scrub()
    hosting.shard.assign(replace(ALONE, is_formed=True, epoch=2, in_sync=("w1", "w2")))
    assert hosting.shard.state == "lost"
    assert hosting.shard.care.is_given_up
    assert hosting.reports[-1].progress == session_pb2.REPLICA_PROGRESS_LOST


async def test_a_copy_of_a_damaged_last_copy_fails_and_harms_nothing(hosting: Hosting) -> None:
    """A chunk with a damaged row cannot be sent: the primary says so of the joining replica, and serves on."""
    await hosting.put("a")
    hosting.damage()
    hosting.shard.assign(replace(ALONE, is_formed=True, epoch=2, joining=("w2",)))
    hosting.shard.feed(PeerConnected("w2"))
    standing = replication_pb2.ShardMessage(shard_id=1, epoch=2, standing=replication_pb2.Standing())
    await hosting.until(lambda: any(message.HasField("probe") for message in hosting.sent))
    hosting.shard.feed(PeerSaid("w2", standing, True))
    await hosting.until(lambda: bool(hosting.reports[-1].lagging))
    assert list(hosting.reports[-1].lagging) == ["w2"]
    assert "w2 cannot be given a copy" in hosting.reports[-1].reason
    assert "does not match" in await hosting.damage_told()
    assert hosting.shard.is_serving
    await hosting.put("b")


async def test_a_damaged_last_copy_is_not_cut(hosting: Hosting) -> None:
    """It does not stop for a cut that could not be made of it; a sound one does."""
    await hosting.put("a")
    assert not hosting.shard.note_damage(Damaged("a row"))
    hosting.shard.assign(replace(ALONE, is_formed=True, is_sealed=True))
    assert hosting.shard.is_serving
    hosting.shard.care.damage = ""
    hosting.shard.assign(replace(ALONE, is_formed=True))
    hosting.shard.assign(replace(ALONE, is_formed=True, is_sealed=True))
    await hosting.until(lambda: hosting.reports[-1].progress == session_pb2.REPLICA_PROGRESS_CEDED)


async def test_a_read_that_finds_damage_gives_the_copy_up(hosting: Hosting) -> None:
    """Beside another copy the replica goes at once, not at the next scrub; a last copy stays and tells."""
    await hosting.put("a")
    assert not hosting.shard.note_damage(Damaged("a row"))
    assert (hosting.shard.is_serving, await hosting.damage_told()) == (True, "a row")
    hosting.shard.care.damage = ""
    hosting.shard.assign(replace(ALONE, is_formed=True, epoch=2, in_sync=("w1", "w2")))
    assert hosting.shard.note_damage(Damaged("a row"))
    assert hosting.shard.note_damage(Damaged("another row"))
    assert hosting.shard.state == "lost"
    assert (hosting.tally.found, hosting.serving) == (1, [True, False])


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
    assert await hosting.shard.care.rows() == 0


async def test_who_opens_a_store_says_so(tmp_path: Path) -> None:
    """A primary that asks hears that the store is about to be open, or that there is none; and then where it stands."""
    told: list[replication_pb2.ShardMessage] = []
    answered = asyncio.Event()

    class Streams:
        """Keeps what goes down."""

        def send(self, node_id: str, message: replication_pb2.ShardMessage, *, is_answer: bool) -> None:
            told.append(message)
            answered.set()

        def follow(self, peers: object) -> None:
            """Nobody is connected."""

        def open_peers(self) -> tuple[str, ...]:
            return ()

    shards = Shards(
        "w1", tmp_path, SystemClock(), StateSettings(), ReplicaTimes(), lambda now: True, lambda report: None
    )
    shards.attach(Streams())  # type: ignore[arg-type]
    shards.follow([replace(ALONE, role=ReplicaRole.IN_SYNC, primary="w2", in_sync=("w1", "w2"))], {}, 0)
    probe = replication_pb2.ShardMessage(shard_id=1, epoch=1, probe=replication_pb2.Probe(sent_at_us=1))
    shards.on_message("w2", probe, False)
    shards.on_message("w2", replication_pb2.ShardMessage(shard_id=9, epoch=1), False)
    assert [(message.shard_id, message.refuse.is_opening) for message in told] == [(1, True), (9, False)]
    async with asyncio.timeout(10):
        while not shards.shards[0].is_open:
            await shards.changed()
        answered.clear()
        shards.on_message("w2", probe, False)
        await answered.wait()
    assert told[-1].WhichOneof("message") == "standing"
    await shards.close()


def test_the_rate_of_copies_counts_for_what_waits_already() -> None:
    """A second's worth leaves at once, the rest in line at the rate; a new rate holds for those in line too."""
    rate = CopyRate()
    rate.set(0.0, 0)
    assert rate.delay_s(0.0, rate.book(0.0, 10_000_000)) == 0.0
    rate.set(10.0, 1_000)
    first, second, third = (rate.book(10.0, 600) for _ in range(3))

    def left_at(place: int, now_s: float) -> float:
        while delay_s := rate.delay_s(now_s, place):
            assert delay_s <= CopyRate.LOOK_S
            now_s += delay_s
        return now_s

    assert left_at(first, 10.0) == pytest.approx(10.6), "it was not idle at this rate before"
    assert left_at(second, 10.6) == pytest.approx(11.2)
    rate.set(11.2, 100)
    assert rate.delay_s(11.2, third) == CopyRate.LOOK_S
    assert left_at(third, 11.2) == pytest.approx(17.2)
    slow = rate.book(20.0, 1_000_000)
    rate.set(20.0, 1)
    assert rate.delay_s(30.0, slow) == CopyRate.LOOK_S
    rate.set(30.0, 0)
    assert rate.delay_s(30.0, slow) == 0.0
    rate.set(40.0, 1_000)
    assert left_at(rate.book(41.0, 900), 41.0) == 41.0, "a second's worth is free"
