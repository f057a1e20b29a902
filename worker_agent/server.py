"""The worker's own gRPC server: users' state, replication, output of launches, `grpc.health.v1` and reflection.

It refuses a port that another process listens at, asks every caller for a certificate and holds it to the table of
roles, and counts the calls and streams that are open.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.api.v1 import (
    launch_pb2,
    launch_pb2_grpc,
    replication_pb2,
    replication_pb2_grpc,
    state_pb2,
    state_pb2_grpc,
)
from coordinator.client.channels import server_options
from coordinator.model.errors import CoordinatorError
from coordinator.security.credentials import Credentials, add_port
from coordinator.server.authorize import AuthorizationInterceptor
from coordinator.server.errors import ErrorInterceptor
from coordinator.server.handlers import Continuation, around, registering_once
from coordinator.server.http import join_address, split_address

STOP_S = 1.0
"""How long calls in flight may take when the worker stops."""


class WorkerServer:
    """Serves at `address` ("host:port"; port 0 picks a free one); without credentials in plain text, to everybody."""

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        state: state_pb2_grpc.StateServiceServicer,
        replication: replication_pb2_grpc.ReplicationServiceServicer,
        launches: launch_pb2_grpc.LaunchServiceServicer,
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._calls = OpenCalls()
        self._health = health.aio.HealthServicer()
        guards = () if credentials is None else (AuthorizationInterceptor(credentials.identity.cluster),)
        interceptors = (ErrorInterceptor(), *guards, self._calls)
        self._server = aio.server(interceptors=interceptors, options=server_options())
        once = registering_once(self._server)
        state_pb2_grpc.add_StateServiceServicer_to_server(state, once)
        replication_pb2_grpc.add_ReplicationServiceServicer_to_server(replication, once)
        launch_pb2_grpc.add_LaunchServiceServicer_to_server(launches, once)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        files = (state_pb2.DESCRIPTOR, replication_pb2.DESCRIPTOR, launch_pb2.DESCRIPTOR)
        services = [file.services_by_name.values() for file in files]
        names = [service.full_name for found in services for service in found]
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    @property
    def open_calls(self) -> int:
        """Calls and streams that are open."""
        return self._calls.count

    async def start(self) -> str:
        """Listens; returns the address with the port that is really bound.

        Raises InvalidRequest when the address is none, CoordinatorError when it cannot be bound.
        """
        host, port = split_address(self._address)
        bound_port = add_port(self._server, join_address(host, port), self._credentials)
        if bound_port == 0:
            await self.stop()
            raise CoordinatorError(
                f"gRPC address {self._address} cannot be used; "
                f"stop what listens there or configure another grpc_address"
            )
        await self._server.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        return join_address(host, bound_port)

    async def say_stopping(self) -> None:
        """From now on health checks hear that the worker does not serve."""
        await self._health.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Ends what is open and stops listening."""
        await self._server.stop(STOP_S)


class OpenCalls(aio.ServerInterceptor):
    """An interceptor; `count` is the number of calls and streams that are open now."""

    def __init__(self) -> None:
        self.count = 0

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        return None if handler is None else around(handler, self._coroutine, self._generator)

    def _coroutine(self, behaviour: Any) -> Any:
        async def call(request: Any, context: Any) -> Any:
            self.count += 1
            try:
                return await behaviour(request, context)
            finally:
                self.count -= 1

        return call

    def _generator(self, behaviour: Any) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            self.count += 1
            try:
                async with aclosing(behaviour(request, context)) as responses:
                    async for response in responses:
                        yield response
            finally:
                self.count -= 1

        return call
