"""Exceptions become gRPC statuses, in one place.

Every call passes `ErrorInterceptor`. A CoordinatorError ends the call with the status of its class and an ErrorDetail
in the trailing metadata `coordinator-error-bin`, from which coordinator/client/errors.py rebuilds the exception.
Anything else is a bug: the caller sees INTERNAL and a number to quote, and the log has the traceback under that number;
what the exception says stays inside (it may hold a secret).
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Any

import grpc
from grpc import aio

from coordinator.api.v1 import cluster_pb2
from coordinator.model.errors import CoordinatorError, NotLeader, Refused
from coordinator.server.handlers import Context, Continuation, Wrapped, method_name
from coordinator.server.requests import readable

ERROR_METADATA = "coordinator-error-bin"
"""Name of the trailing metadata that carries an ErrorDetail."""

_log = logging.getLogger(__name__)

Observer = Callable[[str, str, float], None]
"""Called when a call ends: method ("/package.Service/Method"), name of the status, duration in seconds."""


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
        self._wrapped = Wrapped()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        async def tolerant(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
            handler = await continuation(details)
            return readable(handler, method_name(details)) if handler is not None else None

        return await self._wrapped.get(tolerant, handler_call_details, self._single, self._streaming)

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
