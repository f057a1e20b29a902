"""Connections to workers, one for each address, kept between calls; for clients and for workers that pass calls on.

A connection is made before a call is sent on it, so "no connection" is known to be definite: nothing was sent. One
that was not used for long is closed: workers come and go.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
from grpc import aio

from coordinator.api.v1 import launch_pb2_grpc, state_pb2_grpc
from coordinator.client.channels import channel_options
from coordinator.model.errors import Unreachable
from coordinator.security.certificates import Role
from coordinator.security.credentials import Credentials, open_channel

CONNECT_TIMEOUT_S = 1.5
IDLE_S = 600.0
"""Longer than any call may take."""


@dataclass(slots=True)
class WorkerLink:
    """The connection to one worker."""

    address: str
    channel: aio.Channel
    state: state_pb2_grpc.StateServiceAsyncStub
    launches: launch_pb2_grpc.LaunchServiceAsyncStub
    used_at_s: float


class WorkerLinks:
    """The connections of one client or worker. Belongs to one event loop."""

    def __init__(self, credentials: Credentials | None) -> None:
        self._credentials = credentials
        self._links: dict[str, WorkerLink] = {}

    async def close(self) -> None:
        """Ends all connections."""
        links = list(self._links.values())
        self._links.clear()
        await asyncio.gather(*(link.channel.close() for link in links))

    async def connect(self, address: str, timeout_s: float) -> WorkerLink:
        """An open connection. Raises Unreachable when there is none within CONNECT_TIMEOUT_S."""
        now_s = asyncio.get_running_loop().time()
        link = self._links.get(address)
        if link is None:
            channel = open_channel(address, channel_options(), self._credentials, Role.WORKER)
            link = self._links[address] = WorkerLink(
                address,
                channel,
                state_pb2_grpc.StateServiceStub(channel),
                launch_pb2_grpc.LaunchServiceStub(channel),
                now_s,
            )
            await self._close_idle(now_s)
        link.used_at_s = now_s
        if link.channel.get_state() is grpc.ChannelConnectivity.READY:
            return link
        try:
            async with asyncio.timeout(min(CONNECT_TIMEOUT_S, max(timeout_s, 0.001))):
                while (state := link.channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        raise Unreachable(f"worker at {address} accepts no connection")
                    await link.channel.wait_for_state_change(state)
        except TimeoutError:
            raise Unreachable(f"worker at {address} accepted no connection in time") from None
        return link

    async def _close_idle(self, now_s: float) -> None:
        idle = [link for link in self._links.values() if now_s - link.used_at_s > IDLE_S]
        for link in idle:
            del self._links[link.address]
        await asyncio.gather(*(link.channel.close() for link in idle))
