"""The sessions of workers at one real master in this process: the handshake, leases, and what ends a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from coordinator.api.v1 import session_pb2, session_pb2_grpc, types_pb2
from coordinator.client import AsyncClusterClient
from coordinator.client.channels import channel_options
from coordinator.config import ClusterConfig, SecuritySettings
from coordinator.server.daemon import Master
from coordinator.server.sessions import OUTGOING_MAX, Session
from tools.lib.local_cluster import make_config

Stream = Any
DEADLINE_S = 15.0
PLAIN_TEXT = SecuritySettings(mode="plaintext")


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    """A cluster of one master."""
    made = make_config(masters=1, workers=0)
    # Sessions are the subject here, not TLS.
    return ClusterConfig(name=made.name, data_directory=str(tmp_path), masters=made.masters, security=PLAIN_TEXT)


@pytest.fixture
async def master(config: ClusterConfig) -> AsyncIterator[Master]:
    """That master, leading."""
    running = Master(config, "m1")
    await running.start()
    try:
        async with AsyncClusterClient([config.masters[0].grpc_address]) as client:
            async with asyncio.timeout(DEADLINE_S):
                # The first event of every cluster is that it was made.
                await anext(client.stream_events(from_sequence=1, follow=True))
        yield running
    finally:
        await running.stop()


@pytest.fixture
async def stub(config: ClusterConfig, master: Master) -> AsyncIterator[Any]:
    """Opens sessions with the master."""
    async with aio.insecure_channel(config.masters[0].grpc_address, options=channel_options()) as channel:
        yield session_pb2_grpc.SessionServiceStub(channel)


def hello(**changes: Any) -> session_pb2.OpenRequest:
    """A good Hello of worker w1, with changes."""
    node = types_pb2.Node(id="w1", weight=1.0, incarnation="i1", grpc_address="127.0.0.1:7301")
    fields: dict[str, Any] = {"node": node, "cluster_name": "local", "protocol_version": 1, **changes}
    return session_pb2.OpenRequest(hello=session_pb2.Hello(**fields))


async def read_until(stream: Stream, wanted: Callable[[session_pb2.OpenResponse], bool]) -> session_pb2.OpenResponse:
    """The first response that is wanted; fails when the stream ends before it."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            response = await stream.read()
            assert response is not aio.EOF, "the session ended"
            if wanted(response):
                assert isinstance(response, session_pb2.OpenResponse)
                return response


async def test_a_worker_is_welcomed_and_earns_leases(stub: Any) -> None:
    """Hello is answered by Welcome first, each heartbeat by its own grant, and the assignment comes along."""
    stream = stub.Open()
    await stream.write(hello())
    first = await stream.read()
    assert first.WhichOneof("message") == "welcome"
    assert first.welcome.leader_id == "m1"
    await read_until(stream, lambda response: response.HasField("assignment"))
    for sequence in (1, 2):
        await stream.write(session_pb2.OpenRequest(heartbeat=session_pb2.Heartbeat(sequence=sequence)))
        grant = await read_until(stream, lambda response: response.HasField("lease_grant"))
        assert grant.lease_grant.heartbeat_sequence == sequence
    stream.cancel()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cluster_name": "other"}, "belongs to cluster 'other'"),
        ({"protocol_version": 99}, "session protocol 99"),
        ({"node": types_pb2.Node(incarnation="i1")}, "has no id"),
        ({"node": types_pb2.Node(id="w1")}, "no incarnation"),
    ],
)
async def test_a_worker_that_can_never_belong_is_sent_away(stub: Any, changes: dict[str, Any], words: str) -> None:
    """A wrong cluster, protocol or name ends in a final Farewell with the reason, and the stream ends cleanly."""
    stream = stub.Open()
    await stream.write(hello(**changes))
    answer = await stream.read()
    assert answer.farewell.final
    assert words in answer.farewell.reason
    assert await stream.read() is aio.EOF
    assert await stream.code() is grpc.StatusCode.OK


async def test_a_session_begins_with_a_hello(stub: Any) -> None:
    """Anything else first is refused as an invalid request."""
    stream = stub.Open()
    await stream.write(session_pb2.OpenRequest(heartbeat=session_pb2.Heartbeat(sequence=1)))
    with pytest.raises(aio.AioRpcError) as caught:
        await stream.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "begins with a Hello, not with heartbeat" in str(caught.value.details())


async def test_the_newest_session_of_a_worker_wins(stub: Any) -> None:
    """A second stream of the same worker ends the first one with a reason, and is itself welcomed."""
    first = stub.Open()
    await first.write(hello())
    await read_until(first, lambda response: response.HasField("welcome"))
    second = stub.Open()
    await second.write(hello())
    await read_until(second, lambda response: response.HasField("welcome"))
    farewell = await read_until(first, lambda response: response.HasField("farewell"))
    assert not farewell.farewell.final
    second.cancel()


async def test_a_master_that_stops_sends_its_workers_away(master: Master, stub: Any) -> None:
    """A clean stop ends sessions with a Redirect and the stream with OK, so that workers look for the next leader."""
    stream = stub.Open()
    await stream.write(hello())
    await read_until(stream, lambda response: response.HasField("welcome"))
    await master.stop()
    await read_until(stream, lambda response: response.HasField("redirect"))
    assert await stream.read() is aio.EOF


async def test_a_controller_that_fails_ends_the_master(master: Master, stub: Any, caplog: Any) -> None:
    """An exception of a controller is never swallowed: the daemon is told to end, with that exception."""
    control = master._driver.control
    assert control is not None

    def broken(*arguments: object) -> object:
        raise ZeroDivisionError("a bug")

    control.on_event = broken  # type: ignore[method-assign,assignment]
    stream = stub.Open()
    await stream.write(hello())
    with pytest.raises(ZeroDivisionError, match="a bug"):
        await asyncio.wait_for(master.wait_failed(), DEADLINE_S)
    assert "the leader's controllers failed" in caplog.text
    await read_until(stream, lambda response: response.HasField("redirect"))


async def test_a_worker_that_does_not_read_is_cut() -> None:
    """Messages pile up to a bound; then the session ends instead of growing."""
    session = Session(1, "w1")
    message = session_pb2.OpenResponse(lease_grant=session_pb2.LeaseGrant(heartbeat_sequence=1))
    for _ in range(OUTGOING_MAX):
        session.put(message)
    assert not session.has_ended
    session.put(message)
    assert session.has_ended
    assert session.cut.is_set()


async def test_assignments_that_wait_become_one() -> None:
    """Ten changes while the worker is slow are one message, built when its turn comes."""
    session = Session(1, "w1")
    sent: list[session_pb2.OpenResponse] = []
    built: list[str] = []

    async def write(message: session_pb2.OpenResponse) -> None:
        sent.append(message)

    def build(node_id: str) -> session_pb2.Assignment:
        built.append(node_id)
        return session_pb2.Assignment(generation=len(built))

    for _ in range(10):
        session.put_assignment()
    session.end(None, drop_queued=False)
    await session.pump(write, build)
    assert built == ["w1"]
    assert [message.assignment.generation for message in sent] == [1]
