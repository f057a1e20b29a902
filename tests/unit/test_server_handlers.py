"""Interceptors around handlers: wrapped once for each method, however often it is called."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc import aio

from coordinator.server.handlers import Behaviour, Context, Continuation, Wrapped, registering_once


class Counting(aio.ServerInterceptor):
    """Counts how often it wraps, and how often what it wrapped runs."""

    def __init__(self) -> None:
        self.wraps: list[str] = []
        self.runs = 0
        self._wrapped = Wrapped()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        return await self._wrapped.get(continuation, handler_call_details, self._single, self._streaming)

    def _single(self, method: str, behaviour: Behaviour) -> Behaviour:
        self.wraps.append(method)

        async def call(request: Any, context: Context) -> Any:
            self.runs += 1
            return await behaviour(request, context)

        return call

    def _streaming(self, method: str, behaviour: Behaviour) -> Behaviour:
        self.wraps.append(method)

        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            self.runs += 1
            async for response in behaviour(request, context):
                yield response

        return call


async def echo(request: bytes, context: Context) -> bytes:
    """Answers what it was asked."""
    return request


async def twice(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """Answers it two times."""
    yield request
    yield request


def add_to_server(server: aio.Server) -> None:
    """As generated code does it: every method both ways."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Twice": grpc.unary_stream_rpc_method_handler(twice),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    server.add_registered_method_handlers("test.Service", handlers)


async def test_a_method_is_wrapped_once_and_every_call_runs_through_the_wrapping() -> None:
    """Shows that calls and streams are answered as before, wrapped once, and that an unknown method stays unknown."""
    counting = Counting()
    server = aio.server(interceptors=(counting,))
    add_to_server(registering_once(server))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        channel: Any
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for number in range(3):
                asked = b"%d" % number
                assert await channel.unary_unary("/test.Service/Echo")(asked) == asked
                assert [one async for one in channel.unary_stream("/test.Service/Twice")(asked)] == [asked, asked]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary("/test.Service/Nothing")(b"")
    finally:
        await server.stop(None)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert counting.wraps == ["/test.Service/Echo", "/test.Service/Twice"]
    assert counting.runs == 6


async def test_each_method_is_registered_with_grpc_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the generated code's second registration, which makes every call dearer, does not reach grpc."""
    server = aio.server()
    registrations: list[str] = []
    monkeypatch.setattr(server, "add_generic_rpc_handlers", lambda handlers: registrations.append("generic"))
    monkeypatch.setattr(server, "add_registered_method_handlers", lambda *_: registrations.append("registered"))
    add_to_server(registering_once(server))
    assert registrations == ["generic"]
