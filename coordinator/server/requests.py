"""Bytes that are no message of the contract, answered as what they are: a caller's mistake, in one line.

gRPC would write a traceback to the log for each of them, and in the middle of a stream they would pass for a bug of
ours.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from coordinator.model.errors import InvalidRequest
from coordinator.server.handlers import Behaviour, Context, around


def readable(handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler, given only requests that could be read; the others end the call with InvalidRequest."""

    async def requests_of(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, _Unreadable):
                request.refuse(method)
            yield request

    def given(request: Any) -> Any:
        if handler.request_streaming:
            return requests_of(request)
        if isinstance(request, _Unreadable):
            request.refuse(method)
        return request

    def single(behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Context) -> Any:
            return await behaviour(given(request), context)

        return call

    def streaming(behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            async with aclosing(behaviour(given(request), context)) as responses:
                async for response in responses:
                    yield response

        return call

    return around(handler, single, streaming, _reader(handler.request_deserializer))


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands in the place of a request whose bytes are no message."""

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
