"""Exceptions become gRPC statuses, in one place.

Every call passes `ErrorInterceptor`. A CoordinatorError ends the call with the status of its class and an ErrorDetail
in the trailing metadata `coordinator-error-bin`, from which coordinator/client/errors.py rebuilds the exception.
Anything else is a bug: the caller sees INTERNAL and a number to quote, and the log has the traceback under that number;
what the exception says stays inside (it may hold a secret).
"""

from __future__ import annotations

import inspect
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from coordinator.api.v1 import cluster_pb2
from coordinator.model.errors import CoordinatorError, InvalidRequest, NotLeader, Refused

ERROR_METADATA = "coordinator-error-bin"
"""Name of the trailing metadata that carries an ErrorDetail."""

_log = logging.getLogger(__name__)

Observer = Callable[[str, str, float], None]
"""Called when a call ends: method ("/package.Service/Method"), name of the status, duration in seconds."""

Context = aio.ServicerContext[Any, Any]


def status_of(error: CoordinatorError) -> grpc.StatusCode:
    """The one gRPC status of an exception."""
    name = error.grpc_status if isinstance(error, Refused) else error.GRPC_STATUS
    return grpc.StatusCode[name]


def detail_of(error: CoordinatorError) -> cluster_pb2.ErrorDetail:
    """What the trailing metadata says of an exception."""
    detail = cluster_pb2.ErrorDetail(code=type(error).__name__, message=str(error), definite=error.DEFINITE)
    if isinstance(error, NotLeader):
        detail.leader_id = error.leader_id
        detail.leader_address = error.leader_address
    return detail


async def abort(context: Context, error: CoordinatorError) -> None:
    """Ends the call with the status and the detail of `error`; raises grpc's AbortError."""
    trailing = ((ERROR_METADATA, detail_of(error).SerializeToString()),)
    await context.abort(status_of(error), str(error), trailing)


class ErrorInterceptor(aio.ServerInterceptor):
    """Turns what handlers raise into statuses, for calls and streams alike, and counts how calls end."""

    def __init__(self, observe: Observer | None = None) -> None:
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None:  # An unknown method: grpc answers UNIMPLEMENTED.
            return handler
        method = _text(handler_call_details.method)
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
        # A streaming handler is an async generator, or a coroutine that calls `context.write`.
        wrap = self._streaming if inspect.isasyncgenfunction(behaviour) else self._single
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(
            wrap(method, _readable(behaviour, method, is_stream=handler.request_streaming)),
            request_deserializer=_reader(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return wrapped

    def _single(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            async with _Outcome(method, context, self._observe):
                return await behaviour(request, context)

        return call

    def _streaming(self, method: str, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            # Closed here and now when the caller goes away, so that a session's end is seen at once.
            async with _Outcome(method, context, self._observe), aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        return call


class _Outcome:
    """Around one call: turns the exception that ends it into a status, and counts it."""

    def __init__(self, method: str, context: Context, observe: Observer | None) -> None:
        self._method = method
        self._context = context
        self._observe = observe
        self._started_s = time.perf_counter()

    async def __aenter__(self) -> None:
        self._started_s = time.perf_counter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._count("OK")
        elif isinstance(error, CoordinatorError):
            self._count(status_of(error).name)
            await abort(self._context, error)
        elif isinstance(error, aio.AbortError):
            code = self._context.code()
            self._count(code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN")
        elif isinstance(error, Exception):
            self._count("INTERNAL")
            await self._abort_bug(error)
        else:  # The caller went away, or the server stops.
            self._count("CANCELLED")

    async def _abort_bug(self, error: Exception) -> None:
        number = secrets.token_hex(4)
        _log.error("bug %s in %s", number, self._method, exc_info=error)
        message = f"internal error {number}; the log of the master that answered has the details"
        await abort(self._context, CoordinatorError(message))

    def _count(self, status: str) -> None:
        if self._observe is not None:
            self._observe(self._method, status, time.perf_counter() - self._started_s)


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands in the place of a request whose bytes are no message; gRPC would write a traceback to the log for each."""

    size: int

    def refuse(self, method: str) -> NoReturn:
        raise InvalidRequest(f"{self.size} bytes that are no request of {method}; is the caller of this version?")


def _reader(deserialize: Any) -> Any:
    if deserialize is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable(len(data))

    return read


def _readable(behaviour: Any, method: str, *, is_stream: bool) -> Any:
    """The handler, given only what could be read. Raises InvalidRequest in its place otherwise."""

    async def readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, _Unreadable):
                request.refuse(method)
            yield request

    def given(request: Any) -> Any:
        if is_stream:
            return readable(request)
        if isinstance(request, _Unreadable):
            request.refuse(method)
        return request

    if inspect.isasyncgenfunction(behaviour):

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with aclosing(behaviour(given(request), context)) as responses:
                async for response in responses:
                    yield response

        return stream

    async def single(request: Any, context: Context) -> Any:
        return await behaviour(given(request), context)

    return single


def _text(method: str | bytes) -> str:
    return method.decode("ascii", "replace") if isinstance(method, bytes) else method
