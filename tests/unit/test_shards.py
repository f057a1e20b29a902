"""The host of a worker's shards: questions that come before a store is open, and where to ask once a shard has gone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.api.v1 import replication_pb2
from coordinator.config import StateSettings
from coordinator.model import HASH_SPACE, SystemClock
from worker_agent import shard as shard_module
from worker_agent.shard_interface import ReplicaRole, ReplicaTimes, ShardView
from worker_agent.shard_store import find_store
from worker_agent.shards import Shards
from worker_agent.state_interface import Elsewhere, Place

JOINING = ShardView(1, 0, HASH_SPACE, 2, ReplicaRole.JOINING, "w1", ("w1",), ("w2",))
IN_SYNC = ShardView(1, 0, HASH_SPACE, 3, ReplicaRole.IN_SYNC, "w1", ("w1", "w2"), ())


class Peers:
    """The streams to other workers: what was said over them."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[replication_pb2.ShardMessage] = asyncio.Queue()

    def follow(self, peers: dict[str, str]) -> None:
        """Nothing to do: nobody is there."""

    def open_peers(self) -> tuple[str, ...]:
        return ()

    def send(self, node_id: str, message: replication_pb2.ShardMessage, *, is_answer: bool) -> None:
        if is_answer:
            self.said.put_nowait(message)


def make(path: Path) -> tuple[Shards, Peers]:
    """A host without peers."""
    shards = Shards(
        "w2", path, SystemClock(), StateSettings(scrub_s=0), ReplicaTimes(), lambda now: True, lambda report: None
    )
    peers = Peers()
    shards.attach(peers)  # type: ignore[arg-type]
    return shards, peers


async def test_a_question_that_comes_too_early_is_answered_as_soon_as_the_store_is_open(tmp_path: Path) -> None:
    """A primary that hears of a new replica first is told that there is no store, and where it stands once there is."""
    shards, peers = make(tmp_path)
    try:
        probe = replication_pb2.ShardMessage(shard_id=1, epoch=2, probe=replication_pb2.Probe(sent_at_us=5))
        shards.on_message("w1", probe, False)
        assert (await peers.said.get()).WhichOneof("message") == "refuse"
        shards.follow([JOINING], {"w1": "here:1"}, 0)
        async with asyncio.timeout(10):
            answer = await peers.said.get()
        assert answer.standing.sent_at_us == 5
    finally:
        await shards.close()


async def test_both_halves_of_a_cut_are_made_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are made of the same files, one right after the other: neither finds them in use and waits to try again."""
    shards, _ = make(tmp_path)
    whole = ShardView(1, 0, HASH_SPACE, 1, ReplicaRole.PRIMARY, "w2", ("w2",), (), is_formed=False)
    middle = HASH_SPACE // 2
    halves = [
        ShardView(shard_id, lo, hi, 3, ReplicaRole.PRIMARY, "w2", ("w2",), (), parents=(1,))
        for shard_id, lo, hi in ((2, 0, middle), (3, middle, HASH_SPACE))
    ]

    async def are_open(count: int) -> None:
        async with asyncio.timeout(10):
            while [shard.is_open for shard in shards.shards] != [True] * count:
                await shards.changed()

    try:
        shards.follow([whole], {}, 0)
        await are_open(1)
        shards.follow(halves, {}, 0)
        await are_open(2)
        assert not caplog.records, caplog.text
        async with asyncio.timeout(10):
            while (tmp_path / "1.sqlite").exists():  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.01)
    finally:
        await shards.close()


async def test_who_has_a_shard_that_has_gone_is_known_although_nothing_is_shared_with_him(tmp_path: Path) -> None:
    """The assignment that takes the last shard away names no peers; requests are passed on all the same."""
    shards, _ = make(tmp_path)
    try:
        shards.follow([IN_SYNC], {"w1": "here:1"}, 0)
        shards.follow([], {}, 0)
        found = shards.locate(7)
        assert isinstance(found, Elsewhere)
        assert found.primary == Place("w1", "here:1")
    finally:
        await shards.close()


async def test_after_a_cut_a_half_that_moved_on_is_asked_for_where_it_went(tmp_path: Path) -> None:
    """A worker that gave a half up names who has it, and not itself, which had the whole before."""
    shards, _ = make(tmp_path)
    whole = ShardView(1, 0, HASH_SPACE, 1, ReplicaRole.PRIMARY, "w2", ("w2",), (), is_formed=False)
    middle = HASH_SPACE // 2
    first, second = (
        ShardView(shard_id, lo, hi, 3, ReplicaRole.PRIMARY, "w2", ("w2",), (), parents=(1,))
        for shard_id, lo, hi in ((2, 0, middle), (3, middle, HASH_SPACE))
    )
    try:
        shards.follow([whole], {}, 0)
        shards.follow([first, second], {}, 0)
        shards.follow([replace(first, epoch=5, role=ReplicaRole.IN_SYNC, primary="w3"), second], {"w3": "there:3"}, 0)
        shards.follow([second], {}, 0)
        assert shards.locate(7) == Elsewhere(2, 5, Place("w3", "there:3"))
        assert not isinstance(shards.locate(middle), Elsewhere)
    finally:
        await shards.close()


async def test_what_a_shard_is_to_be_made_of_is_not_forgotten_before_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full for longer than files are kept costs no data: the half is made once there is room."""
    shards, _ = make(tmp_path)
    whole = ShardView(1, 0, HASH_SPACE, 1, ReplicaRole.PRIMARY, "w2", ("w2",), (), is_formed=False)
    half = ShardView(2, 0, HASH_SPACE // 2, 3, ReplicaRole.PRIMARY, "w2", ("w2",), (), parents=(1,))
    has_room, tried = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def find_room(path: Path, view: ShardView, *rest: Any) -> Any:
        if view.shard_id == 2 and not has_room.is_set():
            loop.call_soon_threadsafe(tried.set)
            raise OSError("no space left on device")
        return find_store(path, view, *rest)

    monkeypatch.setattr(shard_module, "find_store", find_room)
    monkeypatch.setattr(shard_module, "OPEN_AGAIN_S", 0.01)
    monkeypatch.setattr(shard_module, "OPEN_ATTEMPTS", 1_000)
    try:
        async with asyncio.timeout(20):
            shards.follow([whole], {}, 0)
            while not shards.shards[0].is_open:
                await shards.changed()
            shards.follow([half], {}, 0)
            await tried.wait()
            await shards._forget(1)
            assert (tmp_path / "1.sqlite").exists()
            has_room.set()
            while not shards.shards[0].is_open:
                await shards.changed()
            while (tmp_path / "1.sqlite").exists():  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.01)
    finally:
        await shards.close()
