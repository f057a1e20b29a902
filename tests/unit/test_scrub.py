"""The scrub of a worker: every stretch of every shard once in a round, spread over its time; and a store's queue."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.model import HASH_SPACE, ManualClock
from coordinator.model.errors import Damaged
from worker_agent.scrub import EMPTY_WAIT_S_MAX, Scrub, stretches
from worker_agent.shard_interface import ReadChunk, SeeEpoch, StoreDone, StoreFailed
from worker_agent.store import ShardStore, create_store
from worker_agent.store_care import ScrubTally
from worker_agent.store_queue import StoreQueue
from worker_agent.store_scan import SCRUB_ROWS


class Played:
    """A shard with a store of some stretches."""

    def __init__(self, rows: int, steps: int) -> None:
        self.count = rows
        self.steps = steps
        self.asked: list[tuple[float, bytes]] = []

    async def rows(self) -> int:
        return self.count

    async def scrub(self, cursor: bytes) -> bytes:
        self.asked.append((asyncio.get_running_loop().time(), cursor))
        number = int(cursor or b"0") + 1
        return b"%d" % number if number < self.steps else b""


class Turns:
    """Lets the scrub sleep without time passing, and adds up how long it wanted to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.slept_s: list[float] = []
        self._left = count
        sleep = asyncio.sleep

        async def on_sleep(seconds: float) -> None:
            self.slept_s.append(seconds)
            self._left -= 1
            if self._left < 0:
                raise EndOfTest
            await sleep(0)

        monkeypatch.setattr(asyncio, "sleep", on_sleep)


class EndOfTest(Exception):
    """Enough turns."""


async def test_a_round_visits_every_stretch_and_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is checked from its beginning to its end; a large one gets its share of the round's time."""
    small, large, closed = Played(10, 3), Played(4 * SCRUB_ROWS, 7), Played(0, 1)
    tally, clock = ScrubTally(), ManualClock()
    scrub = Scrub(lambda: [small, large, closed], 1_000.0, tally, clock)
    turns = Turns(monkeypatch, 3 + 7 + 2)
    with pytest.raises(EndOfTest):
        await scrub.run()
    assert [cursor for _, cursor in small.asked] == [b"", b"1", b"2"]
    assert [cursor for _, cursor in large.asked] == [b"", *(b"%d" % number for number in range(1, 7))]
    assert (closed.asked, tally.rounds, tally.round_ended_at) == ([], 1, clock.monotonic())
    assert stretches(10) + stretches(4 * SCRUB_ROWS) == 10
    assert turns.slept_s[0] == pytest.approx(100.0), "ten stretches in a thousand seconds"


async def test_a_worker_without_shards_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to check it looks again after a while, and does not spin."""
    turns = Turns(monkeypatch, 2)
    with pytest.raises(EndOfTest):
        await Scrub(lambda: [], 86_400.0, ScrubTally(), ManualClock()).run()
    assert turns.slept_s == [EMPTY_WAIT_S_MAX] * 3


async def test_a_question_to_a_store_ends_in_any_case(tmp_path: Path) -> None:
    """Behind an operation that failed nothing is done, and who asked there is told so, and does not wait for ever."""
    store = create_store(tmp_path / "1.sqlite", 1, 0, HASH_SPACE)
    events: list[StoreDone | StoreFailed] = []

    def damage(store: ShardStore) -> int:
        raise Damaged("it is damaged")

    with ThreadPoolExecutor(1) as pool:
        queue = StoreQueue(store, pool, pool, events.append)
        assert await queue.ask(lambda store: store.position().last) == 0
        with pytest.raises(Damaged):
            await queue.ask(damage)
        queue.put(SeeEpoch("no epoch"))  # type: ignore[arg-type]
        assert await queue.ask(lambda store: store.position().last) is None
        assert [type(event) for event in events] == [StoreFailed]
        assert await queue.ask(lambda store: store.position().last) == 0
        await queue.close()
        assert await queue.ask(lambda store: store.position().last) is None


async def test_chunks_of_a_copy_are_read_beside_what_else_is_done(tmp_path: Path) -> None:
    """A chunk does not wait for the shard's other operations, nor they for it; one that fails is tried in its turn."""
    store = create_store(tmp_path / "1.sqlite", 1, 0, HASH_SPACE)
    events: asyncio.Queue[StoreDone | StoreFailed] = asyncio.Queue()
    gate = threading.Event()

    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as copies_pool:
        queue = StoreQueue(store, pool, copies_pool, events.put_nowait)
        held = asyncio.create_task(queue.ask(lambda store: gate.wait(10)))
        await asyncio.sleep(0)  # It has its turn: the others stand behind it.
        chunk = ReadChunk("w2", b"")
        queue.put(chunk)
        queue.start()
        done = await events.get()
        assert isinstance(done, StoreDone)
        assert done.operation is chunk
        assert done.chunk is not None
        faulty = ReadChunk("w2", b"no cursor")
        queue.put(faulty)
        queue.start()
        gate.set()
        failed = await events.get()
        assert isinstance(failed, StoreFailed)
        assert failed.operation is faulty
        assert await held
        await queue.close()
