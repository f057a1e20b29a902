"""Exceptions survive the way over gRPC: every class of the tree arrives as itself, for calls and for streams."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio

from coordinator.client.channels import MESSAGE_BYTES_MAX, channel_options, server_options
from coordinator.client.errors import detail_of, error_of, error_of_detail
from coordinator.model import errors
from coordinator.model.errors import CoordinatorError, NotLeader, RefusalReason, Refused
from coordinator.server.errors import ErrorInterceptor
from coordinator.server.errors import detail_of as server_detail_of

SECRET = "password=hunter2"
Ended = list[tuple[str, str]]


class Faulty(grpc.GenericRpcHandler):
    """Serves /t/single, /t/stream (a generator that answers once), and /t/writer (a coroutine that writes)."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        match handler_call_details.method:
            case "/t/single":
                return grpc.unary_unary_rpc_method_handler(self._single)
            case "/t/stream":
                return grpc.unary_stream_rpc_method_handler(self._stream)
            case "/t/writer":
                return grpc.stream_stream_rpc_method_handler(self._writer)
            case _:
                return None

    async def _single(self, request: bytes, context: Any) -> bytes:
        raise self._error

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        raise self._error

    async def _writer(self, requests: Any, context: Any) -> None:
        await context.write(b"first")
        raise self._error


@asynccontextmanager
async def faulty_server(error: BaseException) -> AsyncIterator[tuple[aio.Channel, Ended]]:
    """A channel to a server whose calls all fail with `error`, and how they ended by the interceptor's count."""
    ended: Ended = []
    interceptor = ErrorInterceptor(lambda method, status, seconds: ended.append((method, status)))
    server = aio.server(interceptors=(interceptor,), options=server_options())
    server.add_generic_rpc_handlers((Faulty(error),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
            yield channel, ended
    finally:
        await server.stop(None)


def _call(method: Any) -> Any:
    """Calls with an empty message; the types of raw bytes are lost on mypy."""
    return method(b"")


def _open(method: Any) -> Any:
    return method()


async def failure_of_single(channel: aio.Channel) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await _call(channel.unary_unary("/t/single"))
    return caught.value


TREE = [
    (errors.InvalidRequest("weight is -1; use a number above 0"), "INVALID_ARGUMENT"),
    (errors.NoLeader("no master leads"), "UNAVAILABLE"),
    (NotLeader("m2 does not lead", "m1", "127.0.0.1:7101"), "UNAVAILABLE"),
    (errors.NotPrimary("w2 is not primary of shard 7", "w1", "127.0.0.1:7301", 7), "UNAVAILABLE"),
    (errors.TooFewReplicas("shard 7 has one in-sync replica"), "UNAVAILABLE"),
    (errors.VersionConflict("name has version 9", "name", 9), "ABORTED"),
    (errors.Expired("the deadline came first"), "DEADLINE_EXCEEDED"),
    (errors.Overloaded("10,000 proposals wait"), "RESOURCE_EXHAUSTED"),
    (errors.Unreachable("no connection"), "UNAVAILABLE"),
    (errors.OutcomeUnknown("the leader changed"), "UNKNOWN"),
    (errors.TimedOut("no answer"), "DEADLINE_EXCEEDED"),
    (errors.Damaged("raft.log: bad checksum at 17"), "DATA_LOSS"),
    (errors.ConfigError(["a", "b"]), "INVALID_ARGUMENT"),
    *((Refused(reason, f"refused: {reason.name}"), Refused.STATUS_BY_REASON[reason]) for reason in RefusalReason),
]


@pytest.mark.parametrize(("error", "status"), TREE, ids=lambda value: str(value).splitlines()[0])
async def test_every_class_of_the_tree_arrives_as_itself(error: CoordinatorError, status: str) -> None:
    """The status is the one of the class, and the client gets the same class, words and outcome back."""
    async with faulty_server(error) as (channel, ended):
        failure = await failure_of_single(channel)
    rebuilt = error_of(failure, "there")
    assert failure.code().name == status
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert rebuilt.DEFINITE == error.DEFINITE
    assert ended == [("/t/single", status)]


async def test_a_refusal_keeps_its_reason() -> None:
    """The reason of a Refused is rebuilt from the status."""
    async with faulty_server(Refused(RefusalReason.STALE, "epoch 3 is over")) as (channel, _):
        rebuilt = error_of(await failure_of_single(channel), "there")
    assert isinstance(rebuilt, Refused)
    assert rebuilt.reason is RefusalReason.STALE


async def test_a_leader_hint_travels_along() -> None:
    """NotLeader names the leader and its address on the other side too."""
    async with faulty_server(NotLeader("m2 does not lead", "m1", "127.0.0.1:7101")) as (channel, _):
        rebuilt = error_of(await failure_of_single(channel), "there")
    assert isinstance(rebuilt, NotLeader)
    assert (rebuilt.leader_id, rebuilt.leader_address) == ("m1", "127.0.0.1:7101")


async def test_the_way_to_the_primary_and_the_version_found_travel_along() -> None:
    """NotPrimary names the worker to ask, VersionConflict the key and its version; inside an answer as well."""
    for error in (
        errors.NotPrimary("w2 is not primary", "w1", "127.0.0.1:7301", 7),
        errors.VersionConflict("name has version 9", "name", 9),
        Refused(RefusalReason.PRECONDITION, "the user keeps 10 keys"),
    ):
        async with faulty_server(error) as (channel, _):
            rebuilt = error_of(await failure_of_single(channel), "there")
        assert vars(rebuilt) == vars(error)
        assert vars(error_of_detail(server_detail_of(error))) == vars(error)


@pytest.mark.parametrize("kind", ["generator", "writer"])
async def test_streams_fail_like_calls_after_what_they_sent(kind: str) -> None:
    """A stream delivers what came before the error, then ends with status and detail; both styles of handler do."""
    async with faulty_server(errors.NoLeader("no master leads")) as (channel, ended):
        if kind == "generator":
            stream = _call(channel.unary_stream("/t/stream"))
        else:
            stream = _open(channel.stream_stream("/t/writer"))
        assert await stream.read() == b"first"
        with pytest.raises(aio.AioRpcError) as caught:
            await stream.read()
    assert type(error_of(caught.value, "there")) is errors.NoLeader
    assert [status for _, status in ended] == ["UNAVAILABLE"]


async def test_a_bug_shows_a_number_outside_and_its_traceback_inside(caplog: pytest.LogCaptureFixture) -> None:
    """An unexpected exception is INTERNAL without its text; the log has the text under the number that was told."""
    with caplog.at_level(logging.ERROR):
        async with faulty_server(RuntimeError(SECRET)) as (channel, ended):
            failure = await failure_of_single(channel)
    detail = detail_of(failure)
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert SECRET not in str(failure.details())
    assert detail is not None
    assert not detail.definite
    number = str(failure.details()).split()[2].rstrip(";")
    records = [record for record in caplog.records if number in record.getMessage()]
    assert len(records) == 1
    assert records[0].exc_info is not None
    assert ended == [("/t/single", "INTERNAL")]


async def test_without_a_detail_only_the_status_speaks() -> None:
    """A method that nobody serves is an InvalidRequest: the other side is no master of this version."""
    async with faulty_server(RuntimeError("unused")) as (channel, _):
        with pytest.raises(aio.AioRpcError) as caught:
            await _call(channel.unary_unary("/t/unknown"))
    assert detail_of(caught.value) is None
    assert isinstance(error_of(caught.value, "there"), errors.InvalidRequest)


async def test_a_lost_connection_is_never_called_definite() -> None:
    """UNAVAILABLE from the connection itself may hide a command that was applied."""
    lost = aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata(), "Socket closed")
    rebuilt = error_of(lost, "127.0.0.1:7101")
    assert isinstance(rebuilt, errors.OutcomeUnknown)
    assert "127.0.0.1:7101" in str(rebuilt)


@pytest.mark.parametrize("direction", ["request", "answer"])
async def test_a_message_above_the_limit_is_not_asked_for_again(direction: str) -> None:
    """A real channel refuses what is larger than it takes, in either direction: one clear line, and no retry."""
    sizes = {"request": MESSAGE_BYTES_MAX + 1, "answer": 1}

    async def answer(request: bytes, context: object) -> bytes:
        return bytes(MESSAGE_BYTES_MAX + 1)

    server = aio.server(options=[("grpc.max_send_message_length", -1)])
    method: Any = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"large": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
            call: Any = channel.unary_unary("/t/large")
            with pytest.raises(aio.AioRpcError) as caught:
                await call(bytes(sizes[direction]))
    finally:
        await server.stop(None)
    rebuilt = error_of(caught.value, "there")
    assert isinstance(rebuilt, errors.InvalidRequest)
    assert "ask or send less at once" in str(rebuilt)
