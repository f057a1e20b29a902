"""The application of a worker: which handlers are called, in which order, whatever they do; its state."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.client.state_types import Put
from coordinator.model import HASH_SPACE, key_hash
from coordinator.model.errors import (
    ConfigError,
    InvalidRequest,
    NotPrimary,
    OutcomeUnknown,
    TimedOut,
    VersionConflict,
)
from tests.played_state import PlayedHost, PlayedShard, Rows, played_workers
from worker_agent import application as module
from worker_agent.application import Handlers, OwnedShard, load_application
from worker_agent.local_state import LocalState
from worker_agent.state_interface import Elsewhere, Place

ANN = "ann"


def shard(shard_id: int = 1, epoch: int = 1) -> OwnedShard:
    """A tenure; each call makes one of its own."""
    return OwnedShard(shard_id, 0, HASH_SPACE, epoch)


class Told:
    """An application that remembers what it is told; handlers wait at their gates, or fail."""

    def __init__(self) -> None:
        self.story: list[str] = []
        self.running: set[int] = set()
        self.gates = {"acquired": asyncio.Event(), "released": asyncio.Event()}
        for gate in self.gates.values():
            gate.set()
        self.failures: dict[str, BaseException] = {}
        self.is_stubborn = False

    async def on_acquired(self, shard: OwnedShard) -> None:
        await self._handle("acquired", shard)

    async def on_released(self, shard: OwnedShard) -> None:
        await self._handle("released", shard)

    async def _handle(self, name: str, shard: OwnedShard) -> None:
        assert shard.shard_id not in self.running, "two handlers of one shard at once"
        self.running.add(shard.shard_id)
        self.story.append(f"{name} {shard.shard_id}/{shard.epoch}")
        try:
            while True:
                try:
                    await self.gates[name].wait()
                    break
                except asyncio.CancelledError:
                    self.story.append(f"cancelled {shard.shard_id}/{shard.epoch}")
                    if not self.is_stubborn:
                        raise
            if name in self.failures:
                raise self.failures[name]
        finally:
            self.running.discard(shard.shard_id)


async def turns() -> None:
    """Lets everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Lets time pass until it is so."""
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def test_handlers_follow_the_tenures() -> None:
    """A shard is acquired once while it is served, whatever is said again, and released when it is not."""
    told = Told()
    handlers = Handlers(told, release_s_max=5)
    first = shard()
    handlers.on_serving(first, True)
    handlers.on_serving(shard(2), True)
    await turns()
    handlers.on_serving(first, False)
    await turns()
    assert told.story == ["acquired 1/1", "acquired 2/1", "released 1/1"]
    await handlers.close()
    await handlers.close()
    assert told.story[3:] == ["released 2/1"]
    handlers.on_serving(shard(3), True)
    await turns()
    assert len(told.story) == 4, "nothing is told after the end"


async def test_a_new_tenure_waits_for_the_release_of_the_old_one() -> None:
    """While a shard goes and comes back handlers come one at a time, in order; a tenure that is over is left out."""
    told = Told()
    handlers = Handlers(told, release_s_max=5)
    handlers.on_serving(shard(epoch=1), True)
    await turns()
    told.gates["released"].clear()
    for epoch in (2, 3, 4):
        handlers.on_serving(shard(epoch=epoch), False)
        handlers.on_serving(shard(epoch=epoch), True)
        await turns()
    assert told.story == ["acquired 1/1", "released 1/1"]
    told.gates["released"].set()
    await turns()
    assert told.story == ["acquired 1/1", "released 1/1", "acquired 1/4"]
    await handlers.close()


async def test_a_shard_that_goes_cancels_its_acquiring() -> None:
    """A slow on_acquired does not outlive the right to the shard: it is cancelled, and released like any other."""
    told = Told()
    told.gates["acquired"].clear()
    handlers = Handlers(told, release_s_max=5)
    handlers.on_serving(shard(epoch=1), True)
    await turns()
    handlers.on_serving(shard(epoch=1), False)
    handlers.on_serving(shard(epoch=2), True)
    await turns()
    assert told.story == ["acquired 1/1", "cancelled 1/1", "released 1/1", "acquired 1/2"]
    await handlers.close()
    assert told.story[4:] == ["cancelled 1/2", "released 1/2"]


@pytest.mark.parametrize("failure", [ValueError("broken"), SystemExit(3)], ids=["error", "exit"])
async def test_what_a_handler_raises_harms_nothing(failure: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """Each failure is logged once, with its shard; the release comes all the same, and other shards are not touched."""
    told = Told()
    told.failures = {"acquired": failure, "released": failure}
    handlers = Handlers(told, release_s_max=5)
    handlers.on_serving(shard(7), True)
    await turns()
    handlers.on_serving(shard(7), False)
    await turns()
    assert told.story == ["acquired 7/1", "released 7/1"]
    assert [record.getMessage() for record in caplog.records] == [
        "shard 7: on_acquired of the application failed",
        "shard 7: on_released of the application failed",
    ]
    told.failures.clear()
    handlers.on_serving(shard(8), True)
    await handlers.close()


async def test_a_handler_that_hangs_is_ended(caplog: pytest.LogCaptureFixture) -> None:
    """A handler that takes too long is cancelled and told in the log; its shard is released as if it had ended."""
    told = Told()
    told.gates["acquired"].clear()
    handlers = Handlers(told, release_s_max=5, acquire_s_max=0.01)
    handlers.on_serving(shard(), True)
    await until(lambda: len(told.story) == 2)
    assert "shard 1: on_acquired of the application took over 0.01 s; cancelled" in caplog.text
    await handlers.close()
    assert told.story == ["acquired 1/1", "cancelled 1/1", "released 1/1"]


async def test_a_handler_that_cannot_be_ended_holds_up_its_shard_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ignores its cancelling keeps its own shard waiting, so that nothing overlaps; the end gives it up."""
    monkeypatch.setattr(module, "HEED_S_MAX", 0.01)
    told = Told()
    told.gates["released"].clear()
    told.is_stubborn = True
    handlers = Handlers(told, release_s_max=0.01)
    handlers.on_serving(shard(1), True)
    await turns()
    handlers.on_serving(shard(1), False)
    handlers.on_serving(shard(1, epoch=2), True)
    handlers.on_serving(shard(2), True)
    await until(lambda: "cannot be cancelled" in caplog.text)
    assert "acquired 2/1" in told.story
    assert "acquired 1/2" not in told.story
    with caplog.at_level(logging.ERROR):
        await asyncio.wait_for(handlers.close(), 5)
    assert "handlers of shard 1 of the application did not end; given up" in caplog.text
    told.gates["released"].set()
    await turns()


# Loading


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


SOUND = """
class Sound:
    def __init__(self, state):
        self.state = state
    async def on_acquired(self, shard): ...
    async def on_released(self, shard): ...
class Half(Sound):
    def on_released(self, shard): ...
class Broken(Sound):
    def __init__(self, state):
        raise OSError("no such agent")
"""


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("app_one:Nothing", "cannot be loaded: python 'app_one:Nothing': 'app_one' has no 'Nothing'"),
        ("app_two:Sound", "cannot be loaded: python 'app_two:Sound': there is no module 'app_two' on this worker"),
        ("app_one:Half", "has no `async def on_released(self, shard)`"),
        ("app_one:Broken", "cannot be made: OSError: no such agent"),
    ],
)
async def test_an_application_that_cannot_be_had_is_told_in_a_line(package: Path, target: str, problem: str) -> None:
    """What is wrong with it stands on one line, with the option."""
    (package / "app_one.py").write_text(SOUND)
    async with one_shard() as (_, state):
        assert vars(load_application("app_one:Sound", state))["state"] is state
        with pytest.raises(ConfigError) as caught:
            load_application(target, state)
    assert str(caught.value).startswith(f'worker.application = "{target}" ')
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


# Its state


@asynccontextmanager
async def one_shard() -> AsyncIterator[tuple[PlayedShard, LocalState]]:
    """A worker that serves everybody, and its local state."""
    played = PlayedShard(Rows())
    host = PlayedHost(played)
    async with played_workers(host) as [worker]:
        yield played, LocalState("w1", worker.core, host, timeout_s=5)


async def test_local_state_reads_and_writes() -> None:
    """The calls of the state client, answered by the replica beside the application, with the same conflicts."""
    async with one_shard() as (played, state):
        assert state.serves(ANN)
        assert await state.get(ANN, "name") is None
        written = await state.put(ANN, "name", b"Ann", expected_version=0)
        assert (await state.put(ANN, "name", b"x", request_id="r1")).is_repeated is False
        assert (await state.put(ANN, "name", b"x", request_id="r1")).is_repeated is True
        with pytest.raises(VersionConflict):
            await state.put(ANN, "name", b"Anna", expected_version=written.version)
        await state.write(ANN, [Put("a", b"1"), Put("b", b"2"), Put("c", b"3")])
        assert [entry.key async for entry in state.scan(ANN, page_size=2)] == ["a", "b", "c", "name"]
        assert sorted(await state.get_many(ANN, ["a", "z"])) == ["a"]
        await state.delete(ANN, "name")
        about = await state.describe_user(ANN)
        assert (about.keys, about.shard_id, about.key_hash) == (3, 1, key_hash(ANN))
        played.has_lease = False
        assert (await state.read(ANN, ["a"])).entries[0].value == b"1"
        assert played.barriers == 1, "without the lease a read here needs the replicas' word too"


async def test_local_state_lists_the_users_of_a_shard() -> None:
    """Everybody with a key, page by page, as a read is answered; nobody of a shard that is not served, or was cut."""
    async with one_shard() as (played, state):
        assert [user async for user in state.users(shard())] == []
        names = {f"user-{number}" for number in range(25)}
        for name in names:
            await state.put(name, "a", b"1")
        await state.delete("user-3", "a")
        found = [user async for user in state.users(shard(), page_size=10)]
        assert (set(found), len(found)) == (names - {"user-3"}, 24)
        played.has_lease = False
        assert len([user async for user in state.users(shard())]) == 24
        assert played.barriers == 1, "without the lease the replicas are asked"
        with pytest.raises(InvalidRequest, match="at least one"):
            await anext(state.users(shard(), page_size=0))
        with pytest.raises(NotPrimary, match="does not serve shard 2"):
            await anext(state.users(shard(2)))
        listing = state.users(shard(), page_size=1)
        await anext(listing)
        played.is_serving = False
        with pytest.raises(NotPrimary):
            await anext(listing)


async def test_local_state_never_leaves_the_worker() -> None:
    """A user who is not served here is refused at once, with who to ask; nothing is sent to anybody."""
    here, there = PlayedShard(Rows()), PlayedShard(Rows(), node_id="w2")
    host = PlayedHost(here)
    async with played_workers(host, PlayedHost(there)) as [one, two]:
        state = LocalState("w1", one.core, host)
        here.is_primary = here.is_serving = False
        here.primary = two.place
        with pytest.raises(NotPrimary, match="w1 does not serve shard 1; ask w2") as caught:
            await state.put(ANN, "a", b"1")
        assert (caught.value.primary_id, caught.value.primary_address) == ("w2", two.address)
        host.shards.clear()
        host.elsewhere = Elsewhere(1, 3, Place("w2", two.address))
        for call in (state.get(ANN, "a"), state.describe_user(ANN), anext(state.scan(ANN))):
            with pytest.raises(NotPrimary):
                await call
        with pytest.raises(InvalidRequest):
            await state.get("", "a")
        assert two.calls == []


async def test_local_state_tells_how_sure_an_error_is() -> None:
    """A shard that goes while a write is on its way leaves the outcome open; a deadline does too."""
    async with one_shard() as (played, state):
        played.is_held = True
        with pytest.raises(TimedOut):
            await state.put(ANN, "a", b"1", timeout_s=0.05)
        writing = asyncio.create_task(state.put(ANN, "b", b"1"))
        await turns()
        played.primary = Place("w2", "")
        played.stop_serving(OutcomeUnknown("closed"), is_primary=False)
        with pytest.raises(OutcomeUnknown):
            await writing
