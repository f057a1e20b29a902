"""Holds every call of a gRPC port to the table of roles (coordinator/security/authorization.py).

The port asks for a certificate of our authority already, so who comes as far as this has one. What is checked here is
what the authority cannot know: the cluster, and whether the role may make this very call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import lru_cache
from typing import Any

import grpc
from grpc import aio

from coordinator.security.authorization import check
from coordinator.security.certificates import Identity
from coordinator.security.tls import SUBJECT_NAMES, caller_identity
from coordinator.server.handlers import Behaviour, Context, Continuation, Wrapped

CALLERS_REMEMBERED = 1_024


class AuthorizationInterceptor(aio.ServerInterceptor):
    """Refuses what the caller may not call; stands inside ErrorInterceptor, which tells the caller so."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._wrapped = Wrapped()

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        return await self._wrapped.get(continuation, handler_call_details, self._single, self._streaming)

    def _single(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Context) -> Any:
            check(caller_of(context), self._cluster, method)
            return await behaviour(request, context)

        return call

    def _streaming(self, method: str, behaviour: Behaviour) -> Behaviour:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            check(caller_of(context), self._cluster, method)
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        return call


def caller_of(context: Context) -> Identity | None:
    """Who makes this call; None on a plain-text port."""
    return _identity(tuple(context.auth_context().get(SUBJECT_NAMES, ())))


@lru_cache(CALLERS_REMEMBERED)
def _identity(names: tuple[bytes, ...]) -> Identity | None:
    return caller_identity({SUBJECT_NAMES: names})
