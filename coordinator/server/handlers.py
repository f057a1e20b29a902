"""How an interceptor puts itself around a handler, whichever of gRPC's four kinds of call it is."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

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
) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler with its behaviour wrapped: by `streaming` when it is an async generator, else by `single`."""
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
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped
