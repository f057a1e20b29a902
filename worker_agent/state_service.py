"""The gRPC StateService of a worker: requests in, the core's answers out, deadlines and forwarding hints between.

`Execute` starts all its operations before it waits for any, so that their writes reach the disks together. What can be
answered at once costs no task of its own.

A request ends ANSWER_RESERVE_S before its caller gives up, so that the caller hears whether it was begun.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from grpc import aio

from coordinator.api.v1 import state_pb2, state_pb2_grpc
from coordinator.client.workers import WorkerLinks
from coordinator.config import StateSettings
from coordinator.model.errors import CoordinatorError, InvalidRequest, Overloaded
from coordinator.security.credentials import Credentials
from coordinator.server.errors import detail_of
from coordinator.server.handlers import registering_once
from worker_agent.state_core import StateCore, Submitted
from worker_agent.state_interface import ShardHost
from worker_agent.state_route import SHARD_METADATA, Known, Router, Scope, known_of

OPERATIONS_MAX = 1_000
CALL_TIMEOUT_S = 30.0
"""Deadline of a call whose caller set none, and the longest that there is."""
ANSWER_RESERVE_S = 0.05
EXECUTE_BYTES_MAX = 12 << 20
"""Answers of one Execute: a message has at most 16 MiB."""

Context = aio.ServicerContext[Any, Any]
Outcome = state_pb2.OperationOutcome


class StateService(state_pb2_grpc.StateServiceServicer):
    """Serves users' state. `core` is for applications on the same worker."""

    def __init__(
        self, host: ShardHost, settings: StateSettings, node_id: str, credentials: Credentials | None
    ) -> None:
        self._links = WorkerLinks(credentials)
        self.router = Router(host, self._links, node_id)
        self.core = StateCore(host, self.router, settings)

    def register(self, server: aio.Server) -> None:
        """Adds the service to a server that has not started."""
        state_pb2_grpc.add_StateServiceServicer_to_server(self, registering_once(server))

    async def close(self) -> None:
        """Ends the connections to other workers."""
        await self._links.close()

    async def Write(
        self, request: state_pb2.WriteRequest, context: Context
    ) -> state_pb2.WriteResponse:
        """Applies mutations of one user."""
        return await self.core.write(request, scope_of(request, context))

    async def Read(self, request: state_pb2.ReadRequest, context: Context) -> state_pb2.ReadResponse:
        """Keys of one user."""
        return await self.core.read(request, scope_of(request, context))

    async def Scan(self, request: state_pb2.ScanRequest, context: Context) -> state_pb2.ScanResponse:
        """A page of one user's keys."""
        return await self.core.scan(request, scope_of(request, context))

    async def DescribeUser(
        self, request: state_pb2.DescribeUserRequest, context: Context
    ) -> state_pb2.DescribeUserResponse:
        """How much one user keeps."""
        return await self.core.describe(request, scope_of(request, context))

    async def Execute(
        self, request: state_pb2.ExecuteRequest, context: Context
    ) -> state_pb2.ExecuteResponse:
        """Many operations, each with an outcome of its own."""
        count = len(request.operations)
        if count > OPERATIONS_MAX:
            raise InvalidRequest(f"one call has at most {OPERATIONS_MAX} operations, this one {count}; make several")
        give_up_at_s = _give_up_at_s(context)
        started = [self._start(operation, give_up_at_s) for operation in request.operations]
        # Those that wait for something else than the disks go on meanwhile, each in a task of its own.
        tasks = {index: asyncio.ensure_future(one) for index, one in enumerate(started) if isinstance(one, Coroutine)}
        try:
            submitted = {index: one for index, one in enumerate(started) if isinstance(one, asyncio.Future)}
            if submitted:
                await asyncio.wait(submitted.values(), timeout=give_up_at_s - asyncio.get_running_loop().time())
            outcomes: dict[int, Outcome] = {}
            for index, one in submitted.items():
                if one.done() and one.exception() is None:
                    outcomes[index] = Outcome(write=state_pb2.WriteResponse(version=one.result()))
                else:
                    finish = self._finish_write(one, request.operations[index].write, give_up_at_s)
                    tasks[index] = asyncio.ensure_future(finish)
            outcomes |= {index: await task for index, task in tasks.items()}
        finally:
            for task in tasks.values():
                task.cancel()
        in_order = [one if isinstance(one, Outcome) else outcomes[index] for index, one in enumerate(started)]
        return state_pb2.ExecuteResponse(outcomes=_fitting(in_order))

    def _start(
        self, operation: state_pb2.Operation, give_up_at_s: float
    ) -> Outcome | Submitted | Coroutine[Any, Any, Outcome]:
        """Answers an operation at once, or submits it, or says how it goes on."""
        kind = operation.WhichOneof("operation")
        try:
            match kind:
                case "write":
                    write = operation.write
                    written = self.core.try_write(write)
                    if isinstance(written, state_pb2.WriteResponse):
                        return Outcome(write=written)
                    return written or self._finish_write(None, write, give_up_at_s)
                case "read":
                    response = self.core.try_read(operation.read)
                    if response is not None:
                        return Outcome(read=response)
                    return self._finish_read(operation.read, give_up_at_s)
                case "scan":
                    return self._finish_scan(operation.scan, give_up_at_s)
                case _:
                    raise InvalidRequest("an operation is neither write nor read nor scan; is the caller newer?")
        except CoordinatorError as error:
            return _failed(error)

    async def _finish_write(
        self, submitted: Submitted | None, request: state_pb2.WriteRequest, give_up_at_s: float
    ) -> Outcome:
        scope = _scope(request, give_up_at_s)
        try:
            if submitted is None:
                return Outcome(write=await self.core.write(request, scope))
            return Outcome(write=await self.core.settle(submitted, request, scope))
        except CoordinatorError as error:
            return _failed(error)

    async def _finish_read(self, request: state_pb2.ReadRequest, give_up_at_s: float) -> Outcome:
        try:
            return Outcome(read=await self.core.read(request, _scope(request, give_up_at_s)))
        except CoordinatorError as error:
            return _failed(error)

    async def _finish_scan(self, request: state_pb2.ScanRequest, give_up_at_s: float) -> Outcome:
        try:
            return Outcome(scan=await self.core.scan(request, _scope(request, give_up_at_s)))
        except CoordinatorError as error:
            return _failed(error)


Single = state_pb2.WriteRequest | state_pb2.ReadRequest | state_pb2.ScanRequest | state_pb2.DescribeUserRequest


def scope_of(request: Single, context: Context) -> Scope:
    """The bounds of a call."""
    known = Known()
    for name, value in context.invocation_metadata() or ():
        if name == SHARD_METADATA and isinstance(value, str):
            known = known_of(value)
    return _scope(request, _give_up_at_s(context), known)


def _scope(request: Single, give_up_at_s: float, known: Known = Known()) -> Scope:  # noqa: B008 - it is frozen
    may_repeat = not isinstance(request, state_pb2.WriteRequest) or bool(request.request_id)
    return Scope(give_up_at_s, request.is_forwarded, known, request.ByteSize(), may_repeat)


def _give_up_at_s(context: Context) -> float:
    left_s = context.time_remaining()
    now_s = asyncio.get_running_loop().time()
    if left_s is None:
        return now_s + CALL_TIMEOUT_S
    reserve_s = min(ANSWER_RESERVE_S, left_s / 10)
    return now_s + min(left_s - reserve_s, CALL_TIMEOUT_S)


def _failed(error: CoordinatorError) -> Outcome:
    return Outcome(error=detail_of(error).SerializeToString())


def _fitting(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes, as far as they fit into one message; reads behind that are to be asked for again."""
    total = 0
    for index, outcome in enumerate(outcomes):
        size = outcome.ByteSize()
        if total + size > EXECUTE_BYTES_MAX and outcome.WhichOneof("outcome") in ("read", "scan"):
            error = Overloaded("the answers of one call are full; ask for this one again")
            outcomes[index] = outcome = _failed(error)
            size = outcome.ByteSize()
        total += size
    return outcomes
