"""One session stream to one master, on a connection of its own. Thin I/O: it decides nothing.

Each stream has a channel of its own, with its own connection: gRPC would otherwise share the connections of
a process and with them the pause that it makes before it connects again, and pausing is the session
machine's decision. There is no HTTP/2 keepalive: heartbeats and their grants already tell in time when the
other side is gone, and pings on top of them only make a server complain of too many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from grpc import aio

from coordinator.api.v1 import session_pb2, session_pb2_grpc
from coordinator.security.credentials import Credentials, open_channel
from coordinator.security.diagnosis import tls_problem

MESSAGE_BYTES_MAX = 64 << 20
"""An assignment of 65,536 shards on one worker has about 8 MiB; gRPC's own limit is 4."""
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class MasterStream:
    """A stream that is being opened or is open; ends by `close`, or calls `on_ended` once when it ends by itself."""

    def __init__(
        self,
        address: str,
        credentials: Credentials | None,
        *,
        on_opened: Callable[[], None],
        on_response: Callable[[session_pb2.OpenResponse], None],
        on_ended: Callable[[str, str], None],
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._on_opened = on_opened
        self._on_response = on_response
        self._on_ended = on_ended
        self._outgoing: asyncio.Queue[session_pb2.OpenRequest] = asyncio.Queue()
        self._task = asyncio.create_task(self._run(), name=f"session stream to {address}")

    def send(self, request: session_pb2.OpenRequest) -> None:
        """Queues a message. The queue needs no bound: unanswered heartbeats end a stream that does not move."""
        self._outgoing.put_nowait(request)

    async def close(self) -> None:
        """Ends the stream and its connection; `on_ended` is not called any more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        channel = open_channel(self._address, CHANNEL_OPTIONS, self._credentials)
        try:
            code, reason = await self._talk(channel)
        except aio.AioRpcError as error:
            code, reason = error.code().name, error.details() or ""
        finally:
            await channel.close()
        self._on_ended(code, reason)

    async def _talk(self, channel: aio.Channel) -> tuple[str, str]:
        """Connects, and moves messages until the master ends the stream; returns the status and its text."""
        if not await _connect(channel):
            problem = await asyncio.to_thread(tls_problem, self._address, self._credentials)
            return "UNAVAILABLE", f"no connection to {self._address}{f': {problem}' if problem else ''}"
        self._on_opened()
        call = session_pb2_grpc.SessionServiceStub(channel).Open()
        writer = asyncio.create_task(self._write(call))
        try:
            async for response in call:
                self._on_response(response)
            code = await call.code()
            return code.name, await call.details() or ""
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()

    async def _write(self, call: aio.StreamStreamCall[session_pb2.OpenRequest, session_pb2.OpenResponse]) -> None:
        # An error of a write is the end of the call, which the reading side sees and reports.
        while True:
            await call.write(await self._outgoing.get())


async def _connect(channel: aio.Channel) -> bool:
    """True once connected; False when the first attempt failed, without gRPC's own retries."""
    state = channel.get_state(try_to_connect=True)
    while state is not grpc.ChannelConnectivity.READY:
        if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
            return False
        await channel.wait_for_state_change(state)
        state = channel.get_state(try_to_connect=True)
    return True
