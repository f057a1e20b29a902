"""Real gRPC servers that answer as a test's script says, to see what the client makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc import aio

from coordinator.api.v1 import cluster_pb2
from coordinator.client.channels import server_options
from coordinator.server.errors import ErrorInterceptor

Answer = Any
Script = Callable[[Any], Answer]
"""From a request to a message, to a list of messages for a stream, to an exception to raise, or None to hang."""


class ScriptedMaster(grpc.GenericRpcHandler):
    """One master that notes the requests and answers by script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Any] = []
        self.address = ""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = str(handler_call_details.method).rpartition("/")[2]
        request_type = getattr(cluster_pb2, f"{method}Request", None)
        if request_type is None:
            return None
        if method == "StreamEvents":
            return grpc.unary_stream_rpc_method_handler(
                self._stream,
                request_deserializer=request_type.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
        return grpc.unary_unary_rpc_method_handler(
            self._single,
            request_deserializer=request_type.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    async def _single(self, request: Any, context: Any) -> Any:
        if isinstance(request, cluster_pb2.GetMasterRequest):
            return cluster_pb2.GetMasterResponse()
        self.requests.append(request)
        answer = self.script(request)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _stream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        for answer in self.script(request):
            if isinstance(answer, Exception):
                raise answer
            yield answer


@asynccontextmanager
async def masters(*scripts: Script) -> AsyncIterator[list[ScriptedMaster]]:
    """Servers, one for each script."""
    running: list[tuple[ScriptedMaster, aio.Server]] = []
    try:
        for script in scripts:
            master = ScriptedMaster(script)
            server = aio.server(interceptors=(ErrorInterceptor(),), options=server_options())
            server.add_generic_rpc_handlers((master,))
            master.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            running.append((master, server))
        yield [master for master, _ in running]
    finally:
        for _, server in running:
            await server.stop(None)


def always(answer: Answer) -> Script:
    """A script with one answer for everything."""
    return lambda request: answer


def in_turn(*answers: Answer) -> Script:
    """A script that gives its answers one after the other, the last one for ever."""
    left = list(answers)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]
