"""A follower passes calls that only the leader can answer on to it.

What the leader alone knows (sessions, figures, its planner's round) is soft state, so `GetStatus`, `ListNodes`,
`PlanRebalance` and a drain's check go to it, whichever master was asked. A forwarded call carries the metadata
`coordinator-forwarded: <id>`; a master that receives one and does not lead refuses with NotLeader instead of passing it
on again, so no call can go in circles. The caller's deadline goes along.

Masters hold one channel to each other master; the list of masters is fixed, so the channels live as long as the daemon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from grpc import aio

from coordinator.api.v1 import cluster_pb2, cluster_pb2_grpc
from coordinator.client.channels import channel_options
from coordinator.client.errors import error_of
from coordinator.config import ClusterConfig
from coordinator.model.errors import CoordinatorError, NoLeader, NotLeader, OutcomeUnknown, Unreachable
from coordinator.security.credentials import Credentials, open_channel
from coordinator.server.context import LEADER_POLL_S, LEADER_WAIT_S, Call, MasterContext, time_left_s

FORWARDED_METADATA = "coordinator-forwarded"
MASTER_TIMEOUT_S = 1.0
"""How long another master may take to tell its own figures."""

Response = TypeVar("Response")


class MasterChannels:
    """Channels to the other masters, opened when first used."""

    def __init__(self, config: ClusterConfig, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._addresses = {master.id: master.grpc_address for master in config.masters}
        self._channels: dict[str, aio.Channel] = {}

    def address(self, master_id: str) -> str:
        """host:port of a master's gRPC server; empty for one that the configuration does not name."""
        return self._addresses.get(master_id, "")

    def cluster(self, master_id: str) -> cluster_pb2_grpc.ClusterServiceAsyncStub:
        """A stub of the master's ClusterService."""
        channel = self._channels.get(master_id)
        if channel is None:
            channel = open_channel(self._addresses[master_id], channel_options(), self._credentials)
            self._channels[master_id] = channel
        return cluster_pb2_grpc.ClusterServiceStub(channel)

    async def close(self) -> None:
        """Closes all channels."""
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    async def figures(self, master_id: str) -> cluster_pb2.Master:
        """A master's own figures. Raises a CoordinatorError when it does not answer within MASTER_TIMEOUT_S."""
        try:
            response = await self.cluster(master_id).GetMaster(
                cluster_pb2.GetMasterRequest(), timeout=MASTER_TIMEOUT_S, wait_for_ready=False
            )
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, self.address(master_id)) from None
        return response.master


class Forwarder:
    """Decides who answers a call: this master, or the leader."""

    def __init__(self, master: MasterContext, channels: MasterChannels) -> None:
        self._master = master
        self._channels = channels
        self.forwarded = 0
        """Calls that were passed on."""

    async def answer(
        self,
        call: Call,
        here: Callable[[], Awaitable[Response]],
        method: str,
        request: Any,
    ) -> Response:
        """Runs `here` when this master leads, else asks the leader's ClusterService for `method`.

        Raises NoLeader when nobody leads within the deadline (LEADER_WAIT_S at most), NotLeader when the call was
        forwarded here by mistake, and what the leader raised; OutcomeUnknown in their place when an earlier leader may
        have applied the change.
        """
        unknown: list[str] = []
        try:
            return await self._search(call, here, method, request, unknown)
        except (NotLeader, NoLeader, Unreachable) as error:
            if unknown and "request_id" in request.DESCRIPTOR.fields_by_name:
                raise OutcomeUnknown(f"leader {unknown[-1]} may have applied it; then: {error}") from None
            raise

    async def _search(
        self, call: Call, here: Callable[[], Awaitable[Response]], method: str, request: Any, unknown: list[str]
    ) -> Response:
        """Asks until a leader answers; those that left the outcome open are put into `unknown`."""
        raft = self._master.raft
        sender = _sender(call)
        if sender and not raft.is_leader:
            leader_id = self._master.leader_id
            raise NotLeader(
                f"{self._master.self_id} does not lead, although {sender} passed this call on to it; try again",
                leader_id,
                self._channels.address(leader_id),
            )
        loop = asyncio.get_running_loop()
        give_up_at_s = loop.time() + min(LEADER_WAIT_S, time_left_s(call))
        while True:
            leader_id = await self._master.wait_for_leader(max(0.0, give_up_at_s - loop.time()))
            if leader_id == self._master.self_id:
                return await here()
            try:
                response: Response = await self._ask(leader_id, method, request, call)
            except (NotLeader, NoLeader, Unreachable, OutcomeUnknown) as error:
                # The leader is gone or no longer leads. What is forwarded reads only or has a request id, so asking
                # again does no harm.
                if not error.DEFINITE:
                    unknown.append(leader_id)
                if loop.time() >= give_up_at_s:
                    raise NoLeader(f"leader {leader_id} does not answer {self._master.self_id}: {error}") from None
                await asyncio.sleep(LEADER_POLL_S)
            else:
                return response

    async def _ask(self, leader_id: str, method: str, request: Any, call: Call) -> Any:
        """Asks the leader; gives up when Raft names another one meanwhile (the old one may hang for ever)."""
        self.forwarded += 1
        stub = self._channels.cluster(leader_id)
        asked = getattr(stub, method)(
            request,
            timeout=time_left_s(call),
            metadata=((FORWARDED_METADATA, self._master.self_id),),
        )
        answer = asyncio.ensure_future(_result(asked, self._channels.address(leader_id)))
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=LEADER_POLL_S * 5)
                if not answer.done() and self._master.leader_id != leader_id:
                    raise OutcomeUnknown(f"{leader_id} no longer leads")
            return answer.result()
        finally:
            answer.cancel()


async def _result(asked: Any, address: str) -> Any:
    try:
        return await asked
    except grpc.aio.AioRpcError as failure:
        error: CoordinatorError = error_of(failure, address)
        raise error from None


def _sender(call: Call) -> str:
    """Id of the master that passed this call on; empty when a client sent it."""
    for name, value in call.invocation_metadata() or ():
        if name == FORWARDED_METADATA:
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return ""
