"""The client finds who can answer, retries only what is safe, and says in one line when nobody answers."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from coordinator.api.v1 import cluster_pb2, types_pb2
from coordinator.client import STALE, AsyncClusterClient, ClusterClient
from coordinator.client.retry import BUDGET_TOKENS, WAIT_S_FIRST, WAIT_S_MAX, Backoff, RetryBudget, may_retry
from coordinator.model import errors
from coordinator.model.errors import (
    InvalidRequest,
    NoLeader,
    NotLeader,
    OutcomeUnknown,
    Overloaded,
    RefusalReason,
    Refused,
    TimedOut,
    Unreachable,
)
from tests.unit.scripted_masters import always, in_turn, masters
from tools.lib.ports import free_ports

STATUS = cluster_pb2.GetStatusResponse(cluster_name="test", leader_id="m1")
REMOVED = cluster_pb2.RemoveNodeResponse()


def dead_address() -> str:
    """An address where nobody listens."""
    return f"127.0.0.1:{free_ports(1)[0]}"


async def test_asks_the_next_master_when_one_is_away() -> None:
    """A master that accepts no connection is passed over without waiting."""
    async with masters(always(STATUS)) as (alive,):
        async with AsyncClusterClient([dead_address(), alive.address]) as client:
            assert (await client.get_status()).leader_id == "m1"
            assert (await client.get_status()).leader_id == "m1"
    assert len(alive.requests) == 2


async def test_follows_the_hint_to_the_leader() -> None:
    """NotLeader with an address leads to that address next, even one that the client was not given."""
    async with masters(always(STATUS)) as (leader,):
        hint = NotLeader("m2 does not lead", "m1", leader.address)
        async with masters(always(hint)) as (follower,):
            async with AsyncClusterClient([follower.address]) as client:
                assert (await client.get_status()).cluster_name == "test"
    assert (len(follower.requests), len(leader.requests)) == (1, 1)


async def test_waits_for_an_election_to_end() -> None:
    """NoLeader is asked again until somebody leads."""
    async with masters(in_turn(NoLeader("none"), NoLeader("none"), NoLeader("none"), STATUS)) as (master,):
        async with AsyncClusterClient([master.address], rng=random.Random(1)) as client:
            assert (await client.get_status()).leader_id == "m1"
    assert len(master.requests) == 4


async def test_a_change_is_retried_under_the_same_request_id() -> None:
    """After an unknown outcome the same request goes out again, so that the machine applies it once."""
    async with masters(in_turn(OutcomeUnknown("the leader changed"), REMOVED)) as (master,):
        async with AsyncClusterClient([master.address]) as client:
            await client.remove_node("w1")
    first, second = master.requests
    assert first.request_id == second.request_id != ""


async def test_each_change_has_a_request_id_of_its_own() -> None:
    """Two changes are two requests; the caller's own id is kept where there is one."""
    async with masters(always(REMOVED)) as (master,):
        async with AsyncClusterClient([master.address]) as client:
            await client.remove_node("w1")
            await client.remove_node("w1")
            await client.remove_node("w1", request_id="mine")
    ids = [request.request_id for request in master.requests]
    assert len(set(ids)) == 3
    assert ids[2] == "mine"


@pytest.mark.parametrize(
    "error",
    [Refused(RefusalReason.PRECONDITION, "w1 is active"), InvalidRequest("weight is 0"), errors.Damaged("raft.log")],
    ids=lambda error: type(error).__name__,
)
async def test_a_refusal_stays_a_refusal(error: errors.CoordinatorError) -> None:
    """What can never succeed is raised at once, as the class that the master raised."""
    async with masters(always(error)) as (master,):
        async with AsyncClusterClient([master.address]) as client:
            with pytest.raises(type(error), match=str(error)):
                await client.remove_node("w1")
    assert len(master.requests) == 1


async def test_no_master_at_all_is_one_line_with_all_addresses() -> None:
    """When nobody accepts a connection the client gives up long before its timeout and names whom it tried."""
    addresses = [dead_address(), dead_address(), dead_address()]
    began_s = time.monotonic()
    async with AsyncClusterClient(addresses, timeout_s=30.0) as client:
        with pytest.raises(Unreachable) as caught:
            await client.get_status()
    assert str(caught.value) == f"no master answers; tried {', '.join(addresses)}"
    assert time.monotonic() - began_s < 10.0


async def test_a_master_that_hangs_does_not_use_up_the_deadline() -> None:
    """Half of the time is kept for the other masters."""
    async with masters(always(None), always(STATUS)) as (hanging, alive):
        async with AsyncClusterClient([hanging.address, alive.address], timeout_s=3.0) as client:
            assert (await client.get_status()).leader_id == "m1"
    assert len(hanging.requests) == 1


async def test_the_deadline_holds_and_says_who_was_asked() -> None:
    """With nobody but hanging masters the call ends at its timeout as TimedOut."""
    async with masters(always(None)) as (hanging,):
        async with AsyncClusterClient([hanging.address], timeout_s=0.5) as client:
            began_s = time.monotonic()
            with pytest.raises(TimedOut, match=hanging.address):
                await client.get_status()
    assert 0.3 < time.monotonic() - began_s < 3.0


async def test_no_leader_for_long_is_told_as_that() -> None:
    """The last word of the masters is what the caller hears, not a timeout."""
    async with masters(always(NoLeader("no master leads"))) as (master,):
        async with AsyncClusterClient([master.address], timeout_s=0.5) as client:
            with pytest.raises(NoLeader, match="no master leads"):
                await client.get_status()


async def test_what_a_master_says_counts_more_than_that_others_are_away() -> None:
    """With one master left, which knows no leader, the answer is that there is no leader, not that nobody answers."""
    async with masters(always(NoLeader("no master leads"))) as (alive,):
        async with AsyncClusterClient([alive.address, dead_address()], timeout_s=1.0) as client:
            with pytest.raises(NoLeader, match="no master leads"):
                await client.get_status()


async def test_a_change_in_doubt_stays_in_doubt() -> None:
    """A change whose answer was lost may be applied, even when the master that is asked next says that it did nothing.

    A question has no such doubt: there the latest answer says most.
    """
    said = (OutcomeUnknown("the answer was lost"), *[NoLeader("no master leads")] * 100)
    for wanted, change in ((OutcomeUnknown, True), (NoLeader, False)):
        async with masters(in_turn(*said)) as (master,):
            async with AsyncClusterClient([master.address], timeout_s=0.5) as client:
                with pytest.raises(wanted):
                    await (client.remove_node("w1") if change else client.list_nodes())


async def test_a_consistency_travels_with_the_request() -> None:
    """A stale read is asked for as such; the default is linearizable."""
    async with masters(always(STATUS)) as (master,):
        async with AsyncClusterClient([master.address]) as client:
            await client.get_status(consistency=STALE)
            await client.get_status()
    stale, default = (request.consistency for request in master.requests)
    assert stale == cluster_pb2.CONSISTENCY_STALE
    assert default == cluster_pb2.CONSISTENCY_LINEARIZABLE


def _events(*sequences: int) -> cluster_pb2.StreamEventsResponse:
    return cluster_pb2.StreamEventsResponse(events=[types_pb2.Event(sequence=sequence) for sequence in sequences])


async def test_a_story_that_is_followed_goes_on_where_it_was_cut() -> None:
    """When a stream fails the next one begins behind the last event that was delivered: none is missed or doubled."""
    script = in_turn([_events(5, 6), NoLeader("stopping")], [_events(7), NoLeader("stopping")], [_events(8)])
    async with masters(script) as (master,):
        async with AsyncClusterClient([master.address]) as client:
            stream = client.stream_events(follow=True)
            seen = [(await anext(stream)).sequence for _ in range(4)]
            await stream.aclose()
    assert seen == [5, 6, 7, 8]
    assert [request.from_sequence for request in master.requests] == [0, 7, 8]


async def test_a_story_that_is_not_followed_ends() -> None:
    """Without follow the stream ends with the present."""
    async with masters(always([_events(1, 2), _events(3)])) as (master,):
        async with AsyncClusterClient([master.address]) as client:
            assert [event.sequence async for event in client.stream_events(latest=3)] == [1, 2, 3]


async def test_the_client_without_a_loop_has_the_same_answers() -> None:
    """The synchronous client works from any thread and passes answers, errors and streams through."""
    async with masters(always(STATUS), always([_events(1, 2)])) as (status, story):

        def use() -> tuple[str, list[int]]:
            with ClusterClient([status.address]) as client, ClusterClient([story.address]) as reader:
                return client.get_status().leader_id, [event.sequence for event in reader.stream_events()]

        assert await asyncio.to_thread(use) == ("m1", [1, 2])


def test_the_client_without_a_loop_can_be_closed_unused_and_twice() -> None:
    """Closing what was never used starts nothing."""
    client = ClusterClient(["127.0.0.1:1"])
    client.close()
    client.close()


def test_a_client_needs_an_address() -> None:
    """No address is an InvalidRequest that says what is missing."""
    with pytest.raises(InvalidRequest, match="at least one master"):
        ClusterClient([])


def test_waits_grow_and_stay_below_their_bounds() -> None:
    """Full jitter: each wait is between 0 and a bound that doubles up to WAIT_S_MAX."""
    backoff = Backoff(random.Random(7))
    bound_s = WAIT_S_FIRST
    for _ in range(20):
        assert 0.0 <= backoff.next_s() <= bound_s
        bound_s = min(WAIT_S_MAX, 2 * bound_s)


def test_the_budget_bounds_the_retries_and_refills_with_time() -> None:
    """A burst is allowed, then only what time earns."""
    budget = RetryBudget()
    assert sum(budget.take(100.0) for _ in range(100)) == BUDGET_TOKENS
    assert not budget.take(100.1)
    assert budget.take(101.0)
    assert sum(budget.take(10_000.0) for _ in range(100)) == BUDGET_TOKENS


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NotLeader(""), True),
        (NoLeader(""), True),
        (Overloaded(""), True),
        (Unreachable(""), True),
        (OutcomeUnknown(""), True),
        (TimedOut(""), True),
        (Refused(RefusalReason.STALE, ""), False),
        (InvalidRequest(""), False),
        (errors.Damaged(""), False),
        (errors.CoordinatorError(""), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_may_be_retried(error: errors.CoordinatorError, expected: bool) -> None:
    """Only failures that time or another master can mend are asked about again."""
    assert may_retry(error) is expected


@pytest.mark.parametrize("first", [OutcomeUnknown("the leader changed"), TimedOut("no answer")])
async def test_an_unknown_outcome_is_kept_when_the_last_attempt_is_definite(first: errors.IndefiniteError) -> None:
    """A change whose first attempt may have been applied never ends as "definitely not", whatever the last one says."""
    async with masters(in_turn(first, *[NoLeader("none")] * 100)) as (master,):
        async with AsyncClusterClient([master.address], timeout_s=0.4) as client:
            with pytest.raises(errors.IndefiniteError):
                await client.remove_node("w1")


async def test_a_read_ends_with_the_reason_of_its_last_attempt() -> None:
    """A read changes nothing, so what came before does not matter."""
    async with masters(in_turn(OutcomeUnknown("the leader changed"), *[NoLeader("none")] * 100)) as (master,):
        async with AsyncClusterClient([master.address], timeout_s=0.4) as client:
            with pytest.raises(NoLeader):
                await client.get_status()
