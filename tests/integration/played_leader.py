"""A master for tests of the worker: a real gRPC server whose answers the test decides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from coordinator.api.v1 import session_pb2, session_pb2_grpc

WAIT_S = 10.0
"""How long a test waits for something that should happen within a fraction of it."""


class PlayedSession:
    """One worker's session as the leader sees it."""

    def __init__(self, hello: session_pb2.Hello, context: Any) -> None:
        self.hello = hello
        self.grants = True
        """False for a leader that has gone silent."""
        self.answers_goodbye = True
        self.ended = asyncio.Event()
        self._context = context
        self._messages: asyncio.Queue[session_pb2.OpenRequest] = asyncio.Queue()
        self._finish = asyncio.Event()
        self._writing = asyncio.Lock()

    async def say(self, **message: Any) -> None:
        """Sends one message to the worker."""
        # A stream takes one write at a time; the test and the grants are two writers.
        async with self._writing:
            await self._context.write(session_pb2.OpenResponse(**message))

    async def next(self, kind: str) -> Any:
        """The next message of that kind from the worker; others before it are dropped."""
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await self._messages.get()
                if message.WhichOneof("message") == kind:
                    return getattr(message, kind)

    def finish(self) -> None:
        """Ends the stream from the leader's side."""
        self._finish.set()

    async def run(self, requests: AsyncIterator[session_pb2.OpenRequest]) -> None:
        """Takes messages in until the worker or the test ends the stream."""
        reader = asyncio.create_task(self._read(requests))
        finish = asyncio.create_task(self._finish.wait())
        try:
            await asyncio.wait({reader, finish}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                # A fault of the test's own side must not look like a leader that hung up.
                reader.result()
        finally:
            self.ended.set()
            for task in (reader, finish):
                task.cancel()
            await asyncio.gather(reader, finish, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[session_pb2.OpenRequest]) -> None:
        async for request in requests:
            if request.WhichOneof("message") == "heartbeat" and self.grants:
                await self.say(lease_grant=session_pb2.LeaseGrant(heartbeat_sequence=request.heartbeat.sequence))
            self._messages.put_nowait(request)
            if request.WhichOneof("message") == "goodbye" and self.answers_goodbye:
                await self.say(farewell=session_pb2.Farewell(reason="bye"))
                self.finish()


class PlayedMaster(session_pb2_grpc.SessionServiceServicer):
    """A master at a free port; it leads unless `redirect_to` is set."""

    def __init__(self, master_id: str = "m1") -> None:
        self.master_id = master_id
        self.address = ""
        self.redirect_to: str | None = None
        """host:port of the leader, empty for "nobody leads"; None when this master leads."""
        self.refusal = ""
        """Why every Hello is answered with a final Farewell; empty when none is."""
        self.cluster_id = "c-1"
        self.lease_s = 10.0
        self.heartbeat_s = 0.1
        self._sessions: asyncio.Queue[PlayedSession] = asyncio.Queue()
        self._server: aio.Server | None = None

    async def start(self, address: str = "127.0.0.1:0") -> str:
        """Listens; returns its address."""
        server = aio.server(options=(("grpc.so_reuseport", 0),))
        session_pb2_grpc.add_SessionServiceServicer_to_server(self, server)
        port = server.add_insecure_port(address)
        await server.start()
        self._server = server
        self.address = f"127.0.0.1:{port}"
        return self.address

    async def stop(self) -> None:
        """Ends every stream at once, as a kill does."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def session(self) -> PlayedSession:
        """The next session that a worker opens, after its Welcome."""
        async with asyncio.timeout(WAIT_S):
            return await self._sessions.get()

    async def Open(  # type: ignore[override]  # A coroutine that writes, which the generated types do not know.
        self,
        request_iterator: AsyncIterator[session_pb2.OpenRequest],
        context: aio.ServicerContext[session_pb2.OpenRequest, session_pb2.OpenResponse],
    ) -> None:
        if self.redirect_to is not None:
            redirect = session_pb2.Redirect(leader_address=self.redirect_to, reason=f"{self.master_id} follows")
            await context.write(session_pb2.OpenResponse(redirect=redirect))
            return
        hello = (await anext(request_iterator)).hello
        session = PlayedSession(hello, context)
        if self.refusal:
            await session.say(farewell=session_pb2.Farewell(reason=self.refusal, final=True))
            return
        await session.say(
            welcome=session_pb2.Welcome(
                leader_id=self.master_id,
                term=1,
                heartbeat_s=self.heartbeat_s,
                session_lease_s=self.lease_s,
                cluster_id=self.cluster_id,
            )
        )
        self._sessions.put_nowait(session)
        await session.run(request_iterator)
