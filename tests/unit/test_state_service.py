"""The state service of a worker: what is answered here, what waits, what is passed on, and how sure every error is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from grpc import aio

from coordinator.api.v1 import cluster_pb2, replication_pb2, state_pb2, state_pb2_grpc
from coordinator.client.channels import channel_options
from coordinator.client.errors import error_of, error_of_detail
from coordinator.config import StateSettings
from coordinator.model import key_hash
from coordinator.model.errors import (
    CoordinatorError,
    Damaged,
    Expired,
    InvalidRequest,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    TimedOut,
    TooFewReplicas,
    VersionConflict,
)
from tests.played_state import PlayedHost, PlayedShard, PlayedWorker, Rows, played_workers
from worker_agent import state_route
from worker_agent.state_interface import Elsewhere, Place
from worker_agent.state_route import Known, Scope, known_of, metadata_of
from worker_agent.store_interface import StateItem, StoreFull

ANN = "ann"
SOON_S = 0.05


def put(key: str, value: bytes = b"x", expected: int | None = None, request_id: str = "") -> state_pb2.WriteRequest:
    mutation = state_pb2.Mutation(key=key, put=value, expected_version=expected)
    return state_pb2.WriteRequest(user=ANN, mutations=[mutation], request_id=request_id)


def get(*keys: str, stale: bool = False) -> state_pb2.ReadRequest:
    return state_pb2.ReadRequest(user=ANN, keys=keys, stale=stale)


def scope(seconds: float = 5.0, *, may_repeat: bool = True, known: Known = Known(), forwarded: bool = False) -> Scope:  # noqa: B008
    return Scope(asyncio.get_running_loop().time() + seconds, forwarded, known, 100, may_repeat)


@asynccontextmanager
async def one_worker(settings: StateSettings | None = None) -> AsyncIterator[tuple[PlayedShard, PlayedWorker]]:
    """A worker with one shard that has all users."""
    shard = PlayedShard(Rows())
    async with played_workers(PlayedHost(shard), settings=settings) as [worker]:
        yield shard, worker


async def until(condition: object) -> None:
    """Gives the other tasks turns until the condition holds."""
    assert callable(condition)
    for _ in range(1_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


# Reading


async def test_a_read_with_the_lease_needs_nobody() -> None:
    """While the leases hold a read is answered from applied rows, at once."""
    async with one_worker() as (shard, worker):
        assert (await worker.core.write(put("a", b"1"), scope())).version == 1
        response = await worker.core.read(get("b", "a"), scope())
        assert [(item.key, item.value, item.version) for item in response.items] == [("a", b"1", 1)]
        assert shard.barriers == 0


async def test_a_read_in_doubt_stands_behind_a_barrier() -> None:
    """Without a lease nothing is told before the replicas have confirmed; what is told then is what is applied then."""
    async with one_worker() as (shard, worker):
        shard.has_lease = False
        shard.barrier_gate.clear()
        reading = asyncio.create_task(worker.core.read(get("a"), scope()))
        await until(lambda: shard.barriers == 1)
        assert not reading.done()
        await worker.core.write(put("a", b"new"), scope())
        shard.barrier_gate.set()
        assert [item.value for item in (await reading).items] == [b"new"]


async def test_a_lease_that_ends_during_the_read_counts_for_nothing() -> None:
    """The lease is asked for again before the answer: one that ran out meanwhile sends the read behind a barrier."""
    async with one_worker() as (shard, worker):
        answers = iter([True, False])
        shard.may_read = lambda: next(answers)  # type: ignore[method-assign]
        await worker.core.read(get("a"), scope())
        assert shard.barriers == 1


async def test_a_stale_read_says_how_old_it_may_be() -> None:
    """Any replica answers a stale read from what it has, with its age; one with nothing to tell passes it on."""
    primary, replica = PlayedShard(Rows()), PlayedShard(Rows(), node_id="w2")
    async with played_workers(PlayedHost(primary), PlayedHost(replica)) as [one, two]:
        replica.is_primary = replica.is_serving = False
        replica.primary, replica.age_s = one.place, 0.7
        assert (await two.core.read(get("a", stale=True), scope())).age_s == 0.7
        page = await two.core.scan(state_pb2.ScanRequest(user=ANN, stale=True), scope())
        assert page.age_s == 0.7
        assert one.calls == []
        replica.age_s = None
        assert (await two.core.read(get("a", stale=True), scope())).age_s == 0.0
        assert one.calls == [("Read", "OK")]


class Damageable(Rows):
    """Rows of which one is damaged on the disk."""

    def get(self, user: str, keys: Sequence[str]) -> list[StateItem]:
        if "bad" in keys:
            raise Damaged("key 'bad' does not match its checksum")
        return super().get(user, keys)


async def test_damage_is_answered_by_another_copy() -> None:
    """A read, a batch and a condition that meet damage go on at the next primary; of a last copy the caller hears."""
    good = Rows()
    primary, replica = PlayedShard(Damageable()), PlayedShard(good, node_id="w2")
    async with played_workers(PlayedHost(primary), PlayedHost(replica)) as [one, two]:
        await two.core.write(put("bad", b"1"), scope())
        primary.primary = two.place
        for _ in range(2):
            primary.is_primary = primary.is_serving = True
            assert [item.value for item in (await one.core.read(get("bad"), scope())).items] == [b"1"]
        primary.is_primary = primary.is_serving = True
        assert one.core.try_read(get("bad")) is None
        primary.is_primary = primary.is_serving = True
        assert one.core.try_write(put("bad", b"2", expected=1)) is None
        primary.is_primary = primary.is_serving = True
        assert (await one.core.write(put("bad", b"2", expected=1), scope())).version == 2
        assert len(primary.damages) == 5
        assert {method for method, _ in two.calls} == {"Read", "Write"}
        primary.is_primary = primary.is_serving = True
        primary.in_sync_count = 1
        with pytest.raises(Damaged, match="does not match"):
            await one.core.read(get("bad"), scope())
        assert list((await one.core.read(get("good"), scope())).items) == []


async def test_a_refusal_is_a_read() -> None:
    """A conflict tells what is applied, so without a lease it too waits for the replicas' word, and is judged anew."""
    async with one_worker() as (shard, worker):
        await worker.core.write(put("a"), scope())
        shard.has_lease = False
        shard.barrier_gate.clear()
        writing = asyncio.create_task(worker.core.write(put("a", b"2", expected=2), scope()))
        await until(lambda: shard.barriers == 1)
        shard.rows.apply(shard_payload("a", b"other"))
        shard.barrier_gate.set()
        assert (await writing).version == 3
        with pytest.raises(VersionConflict):
            await worker.core.write(put("a", expected=9), scope())
        assert shard.barriers == 2


def shard_payload(key: str, value: bytes) -> bytes:
    effect = replication_pb2.Effect(key=key, value=value)
    return replication_pb2.Effects(user=ANN, effects=[effect]).SerializeToString()


# Writing


async def test_a_compare_and_set_waits_for_what_it_is_judged_against() -> None:
    """While a write of the key is pending nothing is judged; then exactly one of two that expect its version wins."""
    async with one_worker() as (shard, worker):
        shard.is_held = True
        first = asyncio.create_task(worker.core.write(put("a"), scope()))
        await until(lambda: len(shard.submitted) == 1)
        rivals = [asyncio.create_task(worker.core.write(put("a", expected=1), scope())) for _ in range(2)]
        behind = asyncio.create_task(worker.core.write(put("b"), scope()))
        await asyncio.sleep(0)
        assert len(shard.submitted) == 1
        shard.is_held = False
        shard.apply_next()
        assert (await first).version == 1
        versions, conflicts = [], []
        for rival in rivals:
            try:
                versions.append((await rival).version)
            except VersionConflict as conflict:
                conflicts.append(conflict.found_version)
        assert versions == conflicts == [2]
        assert (await behind).version == 3


async def test_a_repeat_of_a_pending_request_has_the_same_outcome() -> None:
    """Two calls with one request id are one write with one version, also while the first is on its way."""
    async with one_worker() as (shard, worker):
        shard.is_held = True
        calls = [asyncio.create_task(worker.core.write(put("a", request_id="r1"), scope())) for _ in range(3)]
        await until(lambda: len(shard.submitted) == 1)
        await asyncio.sleep(0)
        shard.apply_next()
        responses = await asyncio.gather(*calls)
        assert [(one.version, one.is_repeated) for one in responses] == [(1, False), (1, True), (1, True)]
        assert (await worker.core.write(put("a", request_id="r1"), scope())).is_repeated
        assert shard.rows.sequence == 1


async def test_too_few_replicas_refuse_writes_and_go_on_reading() -> None:
    """Below `min_in_sync` writes are refused, definitely, and reads are not."""
    async with one_worker(StateSettings(min_in_sync=2)) as (shard, worker):
        await worker.core.write(put("a", request_id="r1"), scope())
        shard.in_sync_count = 1
        with pytest.raises(TooFewReplicas, match="has 1 in-sync replicas, and writes need 2"):
            await worker.core.write(put("a"), scope())
        assert worker.core.try_write(put("a")) is None
        assert (await worker.core.read(get("a"), scope())).items


async def test_a_write_is_not_acknowledged_on_too_few_replicas() -> None:
    """One that was on its way when a replica left waits until another one has it too, and so does its repetition."""
    async with one_worker(StateSettings(min_in_sync=2)) as (shard, worker):
        shard.is_held = True
        calls = [asyncio.ensure_future(worker.core.write(put("a", request_id="r1"), scope())) for _ in range(2)]
        write = put("b")
        submitted = worker.core.try_write(write)
        assert isinstance(submitted, asyncio.Future)
        calls.append(asyncio.ensure_future(worker.core.settle(submitted, write, scope())))
        await until(lambda: len(shard.submitted) == 2)
        shard.in_sync_count = 1
        shard.apply_next()
        shard.apply_next()
        with pytest.raises(TimedOut, match="it may still be"):
            await worker.core.write(put("a", request_id="r1"), scope(SOON_S))
        assert not any(call.done() for call in calls)
        assert (await worker.core.read(get("a"), scope())).items, "it is applied all the same"
        calls.append(asyncio.ensure_future(worker.core.write(put("a", request_id="r1"), scope())))
        await asyncio.sleep(0)
        shard.in_sync_count = 2
        worker.host.tell()
        assert [(await call).version for call in calls] == [2, 2, 1, 2]
        shard.is_held = True
        last = asyncio.ensure_future(worker.core.write(put("c"), scope(may_repeat=False)))
        await until(lambda: shard.submitted)
        shard.in_sync_count = 1
        shard.apply_next()
        await worker.host.waits.wait()
        shard.stop_serving(NotPrimary("it is another one now"))
        worker.host.tell()
        with pytest.raises(OutcomeUnknown, match="stopped serving before enough replicas had the write"):
            await last


async def test_deadlines_say_how_sure_they_are() -> None:
    """What was submitted ends as TimedOut, what waited for its turn or for the shard as Expired, which is definite."""
    async with one_worker() as (shard, worker):
        shard.is_held = True
        with pytest.raises(TimedOut, match="it may still be"):
            await worker.core.write(put("a"), scope(SOON_S))
        with pytest.raises(Expired, match="waited for others of the same user"):
            await worker.core.write(put("a", expected=1), scope(SOON_S))
        shard.has_lease = False
        shard.barrier_gate.clear()
        with pytest.raises(Expired, match="did not confirm in time"):
            await worker.core.read(get("a"), scope(SOON_S))
        shard.is_serving = False
        with pytest.raises(NotPrimary, match="does not serve yet"):
            await worker.core.write(put("b"), scope(SOON_S))
        # What was submitted and given up is judged against all the same.
        shard.is_serving = shard.has_lease = True
        shard.apply_next()
        assert (await worker.core.read(get("a"), scope())).items[0].version == 1
        assert shard.rows.sequence == 1


# Changes of the primary


async def test_requests_wait_out_a_change_and_are_passed_on() -> None:
    """Held while the shard cedes, requests go on at the new primary: the clients see a pause and no error."""
    rows = Rows()
    old, new = PlayedShard(rows), PlayedShard(rows, node_id="w2")
    hosts = PlayedHost(old), PlayedHost(new)
    async with played_workers(*hosts) as [one, two]:
        await one.core.write(put("a"), scope())
        old.is_serving = new.is_serving = new.is_primary = False
        new.primary = one.place
        writing = asyncio.create_task(one.core.write(put("a", expected=1), scope(may_repeat=False)))
        reading = asyncio.create_task(one.core.read(get("a"), scope()))
        await until(lambda: one.service.router.held == 2)
        # The old primary hears of the change first: what it passes on waits at the new one for its assignment.
        old.is_primary, old.primary, old.epoch = False, two.place, 2
        hosts[0].tell()
        await hosts[1].waits.wait()
        assert not writing.done()
        assert not reading.done()
        new.epoch, new.primary, new.is_primary, new.is_serving = 2, two.place, True, True
        hosts[1].tell()
        assert (await writing).version == 2
        assert (await reading).items
        assert one.service.router.held == 0
        assert one.service.router.forwarded == 2


async def test_what_a_shard_passes_on_that_has_ceded_waits_for_the_next_epoch() -> None:
    """Before either has heard of the cutover, the old primary passes on and the new one holds it."""
    rows = Rows()
    old, new = PlayedShard(rows), PlayedShard(rows, node_id="w2")
    hosts = PlayedHost(old), PlayedHost(new)
    async with played_workers(*hosts) as [one, two]:
        old.is_serving = old.is_primary = new.is_serving = new.is_primary = False
        old.has_ceded, old.primary, new.primary = True, two.place, one.place
        writing = asyncio.create_task(one.core.write(put("a"), scope(may_repeat=False)))
        await hosts[1].waits.wait()
        assert not writing.done()
        new.epoch, new.primary, new.is_primary, new.is_serving = 2, two.place, True, True
        hosts[1].tell()
        assert (await writing).version == 1


async def test_a_write_in_flight_goes_on_when_the_shard_stops() -> None:
    """A write that was in flight is tried again: always when it is definite, else only with a request id."""
    for error, request, expected in (
        (NotPrimary("stopped"), put("a"), None),
        (OutcomeUnknown("stopped"), put("a", request_id="r1"), None),
        (OutcomeUnknown("stopped"), put("a"), OutcomeUnknown),
    ):
        shard = PlayedShard(Rows())
        host = PlayedHost(shard)
        async with played_workers(host) as [worker]:
            shard.is_held = True
            bounds = scope(may_repeat=bool(request.request_id))
            writing = asyncio.create_task(worker.core.write(request, bounds))
            await until(lambda shard=shard: shard.submitted)
            shard.stop_serving(error)
            if expected is not None:
                with pytest.raises(expected):
                    await writing
                continue
            await host.waits.wait()
            shard.is_held, shard.is_serving, shard.is_primary = False, True, True
            host.tell()
            assert (await writing).version == 1


async def test_doubt_is_never_forgotten() -> None:
    """A write whose first try may have been applied does not end in a definite error because nobody could be asked."""
    shard = PlayedShard(Rows())
    host = PlayedHost(shard)
    async with played_workers(host) as [worker]:
        shard.is_held = True
        writing = asyncio.create_task(worker.core.write(put("a", request_id="r1"), scope()))
        await until(lambda: shard.submitted)
        shard.stop_serving(OutcomeUnknown("stopped in the middle"))
        await host.waits.wait()
        host.shards.clear()
        host.tell()
        with pytest.raises(OutcomeUnknown, match="stopped in the middle; then: w1 does not answer"):
            await writing


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (StoreFull("no room"), OutcomeUnknown),
        (TooFewReplicas("one is left"), OutcomeUnknown),
        (TimedOut("late"), TimedOut),
        (VersionConflict("another one"), VersionConflict),
    ],
)
async def test_what_ends_the_second_try_is_not_said_of_the_first(
    second: CoordinatorError, expected: type[CoordinatorError]
) -> None:
    """What was sent when the disk became full may be applied once there is room, whatever its repetition is told."""
    for calls_execute in (False, True):
        async with one_worker() as (shard, worker):
            shard.is_held = True
            write = put("a", request_id="r1")
            bounds = scope(1.0 if expected is TimedOut else 5.0)  # Who is late is waited for until then.
            if calls_execute:
                submitted = worker.core.try_write(write)
                assert isinstance(submitted, asyncio.Future)
                writing = asyncio.ensure_future(worker.core.settle(submitted, write, bounds))
            else:
                writing = asyncio.ensure_future(worker.core.write(write, bounds))
            for number, error in enumerate((OutcomeUnknown("the disk became full"), second), 1):
                await until(lambda shard=shard: shard.submitted)
                shard.submitted.popleft()[1].set_exception(error)
                if number == 1:
                    await worker.host.waits.wait()
                    worker.host.tell()
            with pytest.raises(expected) as caught:
                await writing
            assert not caught.value.DEFINITE or expected is VersionConflict
            assert expected is not OutcomeUnknown or "became full; then: " in str(caught.value)


async def test_a_request_for_elsewhere_is_passed_on_once() -> None:
    """A worker passes a request on to the primary that it knows; one that was passed on is answered with the place."""
    held, far = PlayedShard(Rows(), node_id="w2"), PlayedHost()
    async with played_workers(far, PlayedHost(held)) as [one, two]:
        far.elsewhere = Elsewhere(1, 3, two.place)
        assert (await one.core.write(put("a"), scope())).version == 1
        assert two.calls == [("Write", "OK")]
        held.is_primary = held.is_serving = False
        held.primary, held.epoch = Place("w3", "127.0.0.1:9"), 4
        with pytest.raises(NotPrimary) as caught:
            await one.core.write(put("a"), scope())
        assert (caught.value.primary_id, caught.value.primary_address) == ("w3", "127.0.0.1:9")
        assert caught.value.shard_id == 1
        far.elsewhere = Elsewhere()
        with pytest.raises(NotPrimary, match="ask a master where it is"):
            await one.core.read(get("a"), scope())


async def test_news_are_waited_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is behind what the sender knows waits for its assignment, and for no longer than that takes."""
    monkeypatch.setattr(state_route, "NEWS_WAIT_S", SOON_S)
    shard = PlayedShard(Rows())
    host = PlayedHost(shard)
    async with played_workers(host) as [worker]:
        shard.is_primary = shard.is_serving = False
        shard.primary = Place("w9", "127.0.0.1:9")
        ahead = scope(known=Known(1, 2), forwarded=True)
        with pytest.raises(NotPrimary, match="ask w9"):
            await worker.core.read(get("a"), ahead)
        host.waits.clear()
        reading = asyncio.create_task(worker.core.read(get("a"), ahead))
        await host.waits.wait()
        shard.epoch, shard.is_primary, shard.is_serving = 2, True, True
        host.tell()
        await reading


async def test_a_primary_that_is_gone_is_not_a_reason_to_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the primary cannot be reached the request waits a moment for its successor, then names who was asked."""
    monkeypatch.setattr(state_route, "NEWS_WAIT_S", SOON_S)
    shard = PlayedShard(Rows())
    host = PlayedHost(shard)
    async with played_workers(host) as [worker]:
        shard.is_primary = shard.is_serving = False
        shard.primary = Place("w9", "127.0.0.1:9")
        with pytest.raises(NotPrimary, match="accepts no connection; it is w9, primary of shard 1"):
            await worker.core.read(get("a"), scope())
        monkeypatch.setattr(state_route, "NEWS_WAIT_S", 5.0)
        host.waits.clear()
        reading = asyncio.create_task(worker.core.read(get("a"), scope()))
        await host.waits.wait()
        shard.is_primary = shard.is_serving = True
        host.tell()
        await reading


async def test_only_so_many_requests_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded in number and in bytes; the rest is refused, definitely, and may come again."""
    monkeypatch.setattr(state_route, "HELD_MAX", 2)
    shard = PlayedShard(Rows())
    host = PlayedHost(shard)
    async with played_workers(host) as [worker]:
        shard.is_serving = False
        waiting = [asyncio.create_task(worker.core.read(get("a"), scope())) for _ in range(2)]
        await until(lambda: worker.service.router.held == 2)
        with pytest.raises(Overloaded, match="2 requests wait for their shards at w1"):
            await worker.core.read(get("a"), scope())
        monkeypatch.setattr(state_route, "HELD_MAX", 10)
        monkeypatch.setattr(state_route, "HELD_BYTES_MAX", 250)
        with pytest.raises(Overloaded):
            await worker.core.read(get("a"), scope())
        shard.is_serving = True
        host.tell()
        await asyncio.gather(*waiting)
        assert (worker.service.router.held, worker.service.router.held_bytes) == (0, 0)


# Over gRPC


@asynccontextmanager
async def stub_of(worker: PlayedWorker) -> AsyncIterator[state_pb2_grpc.StateServiceAsyncStub]:
    async with aio.insecure_channel(worker.address, options=channel_options()) as channel:
        yield state_pb2_grpc.StateServiceStub(channel)


async def test_execute_gives_every_operation_an_outcome_of_its_own() -> None:
    """Operations run side by side, their writes are submitted together, and one that fails takes none with it."""
    async with one_worker() as (shard, worker), stub_of(worker) as stub:
        await worker.core.write(put("a"), scope())
        shard.is_held = True
        shard.has_submitted.clear()
        request = state_pb2.ExecuteRequest(
            operations=[
                state_pb2.Operation(write=put("b", b"1")),
                state_pb2.Operation(read=get("a", "b")),
                state_pb2.Operation(write=put("a", expected=7)),
                state_pb2.Operation(scan=state_pb2.ScanRequest(user=ANN)),
                state_pb2.Operation(write=put("c", b"1")),
                state_pb2.Operation(),
                state_pb2.Operation(read=state_pb2.ReadRequest(user="")),
            ]
        )
        calling = asyncio.ensure_future(_execute(stub, request))
        await shard.has_submitted.wait()
        assert len(shard.submitted) == 2
        shard.apply_next()
        shard.apply_next()
        outcomes = (await calling).outcomes
        kinds = [outcome.WhichOneof("outcome") for outcome in outcomes]
        assert kinds == ["write", "read", "error", "scan", "write", "error", "error"]
        assert (outcomes[0].write.version, outcomes[4].write.version) == (2, 3)
        errors = [error_of_outcome(outcome) for outcome in outcomes if outcome.WhichOneof("outcome") == "error"]
        assert [type(error) for error in errors] == [VersionConflict, InvalidRequest, InvalidRequest]


async def _execute(
    stub: state_pb2_grpc.StateServiceAsyncStub, request: state_pb2.ExecuteRequest
) -> state_pb2.ExecuteResponse:
    return await stub.Execute(request, timeout=5)


def error_of_outcome(outcome: state_pb2.OperationOutcome) -> CoordinatorError:
    return error_of_detail(cluster_pb2.ErrorDetail.FromString(outcome.error))


async def test_execute_goes_on_when_the_shard_stops_in_the_middle() -> None:
    """Writes of a batch that were in flight when the shard stopped are done together once it serves again."""
    async with one_worker() as (shard, worker), stub_of(worker) as stub:
        shard.is_held = True
        operations = [state_pb2.Operation(write=put(f"k{number}", request_id=f"r{number}")) for number in range(3)]
        operations.append(state_pb2.Operation(write=put("unnamed")))
        calling = asyncio.ensure_future(_execute(stub, state_pb2.ExecuteRequest(operations=operations)))
        await shard.has_submitted.wait()
        shard.stop_serving(OutcomeUnknown("stopped in the middle"))
        await worker.host.waits.wait()
        await until(lambda: worker.service.router.held == 3)
        shard.is_held, shard.is_serving, shard.is_primary = False, True, True
        worker.host.tell()
        outcomes = (await calling).outcomes
        assert sorted(outcome.write.version for outcome in outcomes[:3]) == [1, 2, 3]
        assert isinstance(error_of_outcome(outcomes[3]), OutcomeUnknown)


async def test_execute_answers_no_more_than_a_message_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads that do not fit any more are refused, to be asked again; writes always have their answer."""
    monkeypatch.setattr("worker_agent.state_service.EXECUTE_BYTES_MAX", 1_000)
    async with one_worker() as (_, worker), stub_of(worker) as stub:
        await worker.core.write(put("a", b"x" * 600), scope())
        operations = [state_pb2.Operation(read=get("a"))] * 2 + [state_pb2.Operation(write=put("b"))]
        outcomes = (await _execute(stub, state_pb2.ExecuteRequest(operations=operations))).outcomes
        assert [outcome.WhichOneof("outcome") for outcome in outcomes] == ["read", "error", "write"]
        assert isinstance(error_of_outcome(outcomes[1]), Overloaded)


async def test_a_caller_hears_of_its_deadline_before_it_gives_up() -> None:
    """The answer to a call that could not be begun comes before its deadline, so that the caller knows it was not."""
    async with one_worker() as (shard, worker), stub_of(worker) as stub:
        shard.is_serving = False
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Write(put("a"), timeout=1.0)
        error = error_of(caught.value, worker.address)
        assert isinstance(error, NotPrimary)
        assert error.DEFINITE


async def test_a_user_is_described_with_its_limits_and_its_shard() -> None:
    """DescribeUser has the user's keys and bytes, what it may keep, its shard and its hash."""
    async with one_worker() as (_, worker), stub_of(worker) as stub:
        await stub.Write(put("name", b"Ann"))
        response = await stub.DescribeUser(state_pb2.DescribeUserRequest(user=ANN))
        assert (response.keys, response.bytes) == (1, 7)
        assert (response.keys_max, response.bytes_max) == (10_000, 67_108_864)
        assert (response.shard_id, response.key_hash) == (1, key_hash(ANN))


def test_metadata_reads_back() -> None:
    """What is known of a shard travels as metadata; what cannot be read is nothing known."""
    assert known_of(dict(metadata_of(Known(7, 3)))["coordinator-shard"]) == Known(7, 3)
    assert metadata_of(Known()) == ()
    assert known_of("seven") == known_of("7:") == Known()
