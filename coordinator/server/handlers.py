"""How an interceptor puts itself around a handler, whichever of gRPC's four kinds of call it is."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, cast

import grpc
from grpc import aio

# In quotes: only the type stubs of grpc know that a handler is generic.
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]]"
Context = aio.ServicerContext[Any, Any]
Behaviour = Any
"""What answers a call: an async generator, or a coroutine that returns the answer or writes it to its context."""


def method_name(details: grpc.HandlerCallDetails) -> str:
    """The call's full name: "/package.Service/Method"."""
    method: str | bytes = details.method
    return method.decode("ascii", "replace") if isinstance(method, bytes) else method


def around(
    handler: grpc.RpcMethodHandler[Any, Any],
    single: Callable[[Behaviour], Behaviour],
    streaming: Callable[[Behaviour], Behaviour],
    deserializer: Any = None,
) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler with its behaviour wrapped: by `streaming` when it is an async generator, else by `single`.

    With a `deserializer` that takes the place of the handler's own.
    """
    behaviour: Any
    make: Any
    match handler.request_streaming, handler.response_streaming:
        case False, False:
            behaviour, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        case False, True:
            behaviour, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        case True, False:
            behaviour, make = handler.stream_unary, grpc.stream_unary_rpc_method_handler
        case _:
            behaviour, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
    wrap = streaming if inspect.isasyncgenfunction(behaviour) else single
    wrapped: grpc.RpcMethodHandler[Any, Any] = make(
        wrap(behaviour),
        request_deserializer=deserializer or handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


class Wrapped:
    """The wrapped handlers of one interceptor, one for each method: a method's handler is the same for every call.

    So an interceptor may not look at the call when it wraps, only when the wrapped behaviour runs.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    async def get(
        self,
        continuation: Continuation,
        details: grpc.HandlerCallDetails,
        single: Callable[[str, Behaviour], Behaviour],
        streaming: Callable[[str, Behaviour], Behaviour],
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler of the call's method, wrapped by `single` or `streaming`; None for an unknown method."""
        method = method_name(details)
        wrapped = self._handlers.get(method)
        if wrapped is None:
            handler = await continuation(details)
            if handler is None:  # grpc answers UNIMPLEMENTED.
                return None
            wrapped = around(handler, lambda one: single(method, one), lambda one: streaming(method, one))
            self._handlers[method] = wrapped
        return wrapped


def registering_once(server: aio.Server) -> aio.Server:
    """The server for the generated `add_..._to_server`: each method is registered once.

    They register every method twice, and grpc's server waits for each of the second kind by a future of its own: it
    hangs a callback on all of them, and takes it off again, for every single call (grpcio 1.85,
    `AioServer._server_main_loop`). With our 30 methods that was 6 % of a commit.
    """
    return cast("aio.Server", _RegisteringOnce(server))


class _RegisteringOnce:
    def __init__(self, server: aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Leaves it at the generic ones, which answer every method."""
