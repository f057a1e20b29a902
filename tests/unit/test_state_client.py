"""The state client against played workers and masters: it finds, follows, retries, and knows what is sure."""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
from typing import Any

import pytest

import coordinator.client
from coordinator.api.v1 import state_pb2, types_pb2
from coordinator.client import AsyncStateClient, Delete, Put, Read, Scan, StateClient, Write, Written, state_calls
from coordinator.client.shard_map import ShardTable
from coordinator.client.state_calls import Tries
from coordinator.client.state_types import Entries, Page
from coordinator.config import StateSettings
from coordinator.model import HASH_SPACE, errors, key_hash
from coordinator.model.errors import CoordinatorError, InvalidRequest, OutcomeUnknown, Refused, VersionConflict
from tests.played_cluster import cluster, one_shard, promote, two_replicas
from tests.played_state import PlayedHost, PlayedShard, Rows
from worker_agent.state_interface import Elsewhere

ANN = "ann"
HALF = HASH_SPACE // 2
LOW = next(name for name in map(str, range(99)) if key_hash(name) < HALF)
HIGH = next(name for name in map(str, range(99)) if key_hash(name) >= HALF)


async def test_what_was_written_is_read() -> None:
    """Put, get, batch, delete, scan and describe do what they say, and the map is fetched once for all of them."""
    async with cluster(one_shard()) as c:
        assert await c.client.put(ANN, "a", b"1") == Written(1, False)
        batch = await c.client.write(ANN, [Put("b", b"2"), Put("c", b"\xff"), Delete("a", expected_version=1)])
        assert batch.version == 2
        assert await c.client.get(ANN, "a") is None
        found = await c.client.get_many(ANN, ["c", "a", "b"])
        assert list(found) == ["c", "b"]
        assert [(entry.value, entry.version) for entry in found.values()] == [(b"\xff", 2), (b"2", 2)]
        assert [entry.key async for entry in c.client.scan(ANN, page_size=1)] == ["b", "c"]
        about = await c.client.describe_user(ANN)
        assert (about.keys, about.bytes, about.shard_id, about.key_hash) == (2, 4, 1, key_hash(ANN))
        assert [type(request).__name__ for request in c.master.requests].count("ListShardsRequest") == 1


async def test_refusals_arrive_as_they_are() -> None:
    """A conflict names the version found, a limit what is allowed; neither is retried."""
    async with cluster(one_shard(), settings=StateSettings(user_keys_max=1)) as c:
        await c.client.put(ANN, "a", b"1", expected_version=0)
        with pytest.raises(VersionConflict) as caught:
            await c.client.put(ANN, "a", b"2", expected_version=0)
        assert (caught.value.key, caught.value.found_version) == ("a", 1)
        with pytest.raises(Refused, match="would keep 2 keys, and 1 are allowed"):
            await c.client.put(ANN, "b", b"1")
        with pytest.raises(InvalidRequest):
            await c.client.put("", "a", b"1")
        assert len(c.workers[0].calls) == 3


async def test_a_redirect_is_followed_at_once() -> None:
    """A worker that names the primary sends the client there, before the masters know."""
    async with cluster(*two_replicas()) as c:
        await c.client.put(ANN, "a", b"1")
        promote(c, to=1, told=False)
        c.workers[0].host.shards.clear()  # So that it does not pass the request on by itself.
        c.workers[0].host.elsewhere = Elsewhere(1, 2, c.workers[1].place)
        c.workers[0].service.router._links.connect = _no_way  # type: ignore[method-assign, assignment]
        assert (await c.client.put(ANN, "a", b"2")).version == 2
        assert c.workers[1].calls[-1] == ("Write", "OK")


async def _no_way(address: str, timeout_s: float) -> None:
    raise errors.NotPrimary("w1 does not answer for shard 1; ask w2", "w2", address, 1)


async def test_a_killed_primary_is_left_for_its_successor() -> None:
    """When the primary is gone the map is fetched until it has another one; the calls of one client share that."""
    async with cluster(*two_replicas()) as c:
        await c.client.put(ANN, "a", b"1")
        await c.workers[0].stop()
        c.world.asked.clear()
        writing = [asyncio.create_task(c.client.put(ANN, f"k{number}", b"2")) for number in range(20)]
        await c.world.asked.wait()
        promote(c, to=1)
        versions = sorted(written.version for written in await asyncio.gather(*writing))
        assert versions == list(range(2, 22))
        assert c.client._calls.map.fetches < 20


async def test_a_write_whose_answer_was_lost_is_applied_once() -> None:
    """The connection breaks after the write was taken: the retry has the same request id and finds it done."""
    async with cluster(*two_replicas()) as c:
        primary = c.shards[0]
        primary.is_held = True
        primary.has_submitted.clear()
        writing = asyncio.create_task(c.client.put(ANN, "a", b"1"))
        await primary.has_submitted.wait()
        primary.apply_next = lambda: None  # type: ignore[method-assign]
        payload, _ = primary.submitted[0]
        primary.rows.apply(payload)
        await c.workers[0].stop()
        promote(c, to=1)
        assert await writing == Written(1, True)
        assert primary.rows.sequence == 1


async def test_a_frozen_primary_costs_no_more_than_a_killed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent attempt is given up as soon as the masters name another primary, long before its timeout."""
    monkeypatch.setattr(state_calls, "WATCH_S", 0.02)
    async with cluster(*two_replicas()) as c:
        await c.client.put(ANN, "a", b"1")
        frozen = c.shards[0]
        frozen.has_lease = False
        frozen.barrier_gate.clear()
        async with asyncio.timeout(2.0):
            reading = asyncio.create_task(c.client.get(ANN, "a"))
            batch = asyncio.create_task(c.client.execute([Read(ANN, ["a"])]))
            await frozen.has_barriers(2)
            c.shards[1].is_primary = c.shards[1].is_serving = True
            c.world.move("w2")
            entry = await reading
            assert entry is not None
            assert entry.value == b"1"
            assert isinstance((await batch)[0], Entries)


async def test_stale_reads_go_to_any_replica() -> None:
    """With `stale` every in-sync replica is asked now and then, and says how old its answer may be."""
    async with cluster(*two_replicas()) as c:
        await c.client.put(ANN, "a", b"1")
        c.shards[1].age_s = 0.25
        ages = {(await c.client.read(ANN, ["a"], stale=True)).age_s for _ in range(20)}
        assert ages == {0.0, 0.25}


async def test_a_batch_is_split_by_worker_and_keeps_its_order() -> None:
    """Operations of many users go to their workers side by side; outcomes come in the order of the operations."""
    low, high = PlayedShard(Rows(), 1, hi=HALF), PlayedShard(Rows(), 2, lo=HALF, node_id="w2")
    async with cluster(PlayedHost(low), PlayedHost(high)) as c:
        outcomes = await c.client.execute(
            [
                Write(HIGH, [Put("a", b"1")]),
                Write(LOW, [Put("a", b"2")]),
                Write(HIGH, [Put("a", b"3", expected_version=9)]),
                Write("", [Put("a", b"4")]),
            ]
        )
        assert outcomes[:2] == [Written(1, False), Written(1, False)]
        assert [type(outcome) for outcome in outcomes[2:]] == [VersionConflict, InvalidRequest]
        found = await c.client.execute([Read(LOW, ["a"]), Read(HIGH, ["a"]), Scan(HIGH)])
        values = [one.entries[0].value for one in found if isinstance(one, Entries | Page)]
        assert values == [b"2", b"1", b"1"]
        assert [worker.calls for worker in c.workers] == [[("Execute", "OK")] * 2] * 2
        assert await c.client.execute([]) == []


async def test_a_batch_outlives_a_worker() -> None:
    """Operations whose worker is gone wait for its successor; the others are done at once, and none is done twice."""
    async with cluster(*two_replicas()) as c:
        await c.client.put(ANN, "a", b"1")
        await c.workers[0].stop()
        c.world.asked.clear()
        running = asyncio.create_task(c.client.execute([Write(ANN, [Put(f"k{n}", b"x")]) for n in range(10)]))
        await c.world.asked.wait()
        promote(c, to=1)
        outcomes = await running
        assert sorted(one.version for one in outcomes if isinstance(one, Written)) == list(range(2, 12))


async def test_without_masters_the_last_map_serves() -> None:
    """Once the map is known, calls need no master; and a fetch that fails does not take the map away."""
    async with cluster(one_shard()) as c:
        await c.client.put(ANN, "a", b"1")
        c.world.error = errors.NoLeader("nobody leads")
        assert await c.client.get(ANN, "a")
        shard = c.shards[0]
        shard.is_serving = False
        with pytest.raises(CoordinatorError):
            await c.client.get(ANN, "a", timeout_s=0.3)
        shard.is_serving = True
        assert await c.client.get(ANN, "a")


async def test_a_client_without_any_master_says_so() -> None:
    """Before the first map nothing can be found: the error is that of the masters."""
    async with AsyncStateClient(["127.0.0.1:9"], timeout_s=0.5) as client:
        with pytest.raises((errors.Unreachable, errors.TimedOut)):
            await client.get(ANN, "a")


async def test_the_budget_delays_retries_and_fails_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """When more calls fail than may be retried at once, they wait for their turn instead of giving up."""
    monkeypatch.setattr(state_calls, "RETRIES_AT_ONCE", 2.0)
    async with cluster(*two_replicas()) as c:
        await c.client.put(ANN, "a", b"1")
        await c.workers[0].stop()
        promote(c, to=1)
        assert all(await asyncio.gather(*(c.client.get(ANN, "a") for _ in range(10))))


def test_an_older_table_never_replaces_a_newer_one() -> None:
    """Generations only go forward, whichever master answers."""

    async def check() -> None:
        async with cluster(one_shard()) as c:
            await c.client.put(ANN, "a", b"1")
            shards = c.client._calls.map
            c.world.generation = 0
            c.world.shards = []
            assert len(await shards.renew(1.0)) == 1

    asyncio.run(check())


def test_a_table_locates_every_hash() -> None:
    """A user lives in the shard whose range has its hash; without a primary, or its address, that is left empty."""
    shards = [
        types_pb2.Shard(id=2, lo=HALF, hi=0, primary="w9", in_sync=["w9"], epoch=4),
        types_pb2.Shard(id=1, lo=0, hi=HALF, primary="w1", in_sync=["w1", "w9"], epoch=3),
    ]
    table = ShardTable(shards, {"w1": "here:1"}, 7)
    low, high = table.locate(LOW), table.locate(HIGH)
    assert (low.shard_id, low.epoch, low.primary_address, low.addresses) == (1, 3, "here:1", ("here:1",))
    assert (high.shard_id, high.primary, high.primary_address, high.addresses) == (2, "w9", "", ())
    with pytest.raises(errors.NotPrimary, match="no shards yet"):
        ShardTable([], {}, 0).locate(LOW)


def doubtful(request: Any, *failures: CoordinatorError) -> CoordinatorError:
    tries = Tries(request)
    for failure in failures:
        tries.failed(failure)
    return tries.final()


@pytest.mark.parametrize(
    ("expected_version", "last", "expected"),
    [
        (None, errors.NotPrimary("elsewhere"), OutcomeUnknown),
        (None, Refused(errors.RefusalReason.PRECONDITION, "full"), OutcomeUnknown),
        (None, InvalidRequest("faulty"), InvalidRequest),
        (4, VersionConflict("other"), VersionConflict),
        (0, VersionConflict("other"), OutcomeUnknown),
        (None, errors.TimedOut("late"), OutcomeUnknown),
    ],
)
def test_doubt_stays_until_it_is_answered(
    expected_version: int | None, last: CoordinatorError, expected: type[CoordinatorError]
) -> None:
    """After an attempt of unknown outcome only an error that holds for that one too is passed on as definite."""
    mutation = state_pb2.Mutation(key="a", put=b"1", expected_version=expected_version)
    write = state_pb2.WriteRequest(user=ANN, mutations=[mutation], request_id="r")
    assert type(doubtful(write, OutcomeUnknown("cut off"), last)) is expected
    assert type(doubtful(write, last)) is type(last)
    if last.DEFINITE:  # What only reads leaves no doubt.
        assert type(doubtful(state_pb2.ReadRequest(user=ANN), OutcomeUnknown("cut off"), last)) is type(last)


# The examples of the documentation

ASYNC_ORDER = ("put", "get", "get_many", "read", "scan", "describe_user", "delete", "write", "execute")
SYNC_ORDER = ("get", "scan", "put", "write", "execute")
NAMES = {name: getattr(coordinator.client, name) for name in coordinator.client.__all__}


def examples(kind: type, order: tuple[str, ...]) -> list[doctest.Example]:
    """The examples of a class's methods, in an order in which they make one story."""
    methods = inspect.getmembers(kind, inspect.isfunction)
    documented = {name for name, method in methods if ">>>" in (method.__doc__ or "")}
    assert documented == set(order)
    parser = doctest.DocTestParser()
    return [example for name in order for example in parser.get_examples(inspect.getdoc(getattr(kind, name)) or "")]


def run_example(example: doctest.Example, names: dict[str, Any]) -> Any:
    """What an example gives: a coroutine when it awaits."""
    single = example.source.count("\n") == 1 and not example.source.startswith(("try", "for"))
    mode = "eval" if single and example.want else "exec"
    code = compile(example.source, "<example>", mode, flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    return eval(code, names)


async def test_the_examples_of_the_asynchronous_client_are_true(capsys: pytest.CaptureFixture[str]) -> None:
    """Every example in the docstrings gives what stands below it."""
    async with cluster(one_shard()) as c:
        names: dict[str, Any] = {**NAMES, "state": c.client, "VersionConflict": VersionConflict}
        for example in examples(AsyncStateClient, ASYNC_ORDER):
            value = run_example(example, names)
            value = await value if inspect.isawaitable(value) else value
            got = capsys.readouterr().out + ("" if value is None else f"{value!r}\n")
            assert got == example.want, example.source


async def test_the_examples_of_the_synchronous_client_are_true() -> None:
    """So do those of the client for programs without an event loop, which any thread may call."""
    async with cluster(one_shard()) as c:

        def use() -> None:
            with StateClient([c.master.address]) as state:
                names: dict[str, Any] = {**NAMES, "state": state}
                for example in examples(StateClient, SYNC_ORDER):
                    value = run_example(example, names)
                    assert ("" if value is None else f"{value!r}\n") == example.want, example.source
                assert state.get_many("ann", ["city"])["city"].value == b"Bern"
                assert state.delete("ann", "city").version == 4
                assert state.describe_user("ann").keys == 0
                assert state.scan_page(Scan("ann")).entries == ()
                assert state.read("ann", ["city"]).entries == ()

        await asyncio.to_thread(use)
