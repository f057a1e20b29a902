"""The streams between workers: one from each worker to each that replicates a shard with it. Thin I/O.

    here, as a primary                                        there, as a replica
    send(is_answer=False)      --> _Outgoing -- stream up -->   Open --> on_message(is_answer=False)
    on_message(is_answer=True) <-- _Outgoing <-- stream down -- Open <-- send(is_answer=True)

Order rules: messages of one stream keep their order; what was queued when a stream ended is gone, and `on_lost` says so
before anything goes over the next one. Of two streams from one peer the newer counts, because its process has begun
anew or has given the older one up; answers go down that one. What waits to be sent leaves in one frame: so the messages
of many shards share the cost of a write.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from typing import Any

from grpc import aio

from coordinator.api.v1 import replication_pb2, replication_pb2_grpc
from coordinator.client.channels import channel_options
from coordinator.model.errors import Forbidden, InvalidRequest
from coordinator.security.certificates import Role
from coordinator.security.credentials import Credentials, open_channel
from coordinator.server.authorize import caller_of

PROTOCOL_VERSION = 1
FRAME_BYTES = 4 << 20
"""A frame takes messages until it is so large; the largest record is below gRPC's limit beside it."""
QUEUE_BYTES_MAX = 64 << 20
"""A peer that lets so much wait is cut off; its replicas catch up from the log."""
REDIAL_S_MIN = 0.05
REDIAL_S_MAX = 1.0
CONNECT_S = 3.0

_log = logging.getLogger(__name__)

ShardMessage = replication_pb2.ShardMessage
Frame = replication_pb2.ReplicationFrame


class _Queue:
    """What waits to go over one stream."""

    def __init__(self) -> None:
        self._messages: list[ShardMessage] = []
        self._bytes = 0
        self._filled = asyncio.Event()
        self.is_over = False
        """True once it was ended: nothing more is taken in or given out."""

    def put(self, message: ShardMessage) -> bool:
        """False when there is no room any more."""
        if self.is_over:
            return True
        self._messages.append(message)
        self._bytes += message.ByteSize()
        self._filled.set()
        return self._bytes <= QUEUE_BYTES_MAX

    def end(self) -> None:
        """Lets `frame` return None."""
        self.is_over = True
        self._filled.set()

    async def frame(self) -> Frame | None:
        """The next frame, as soon as there is something to say; None at the end."""
        await self._filled.wait()
        if self.is_over:
            return None
        size = count = 0
        for message in self._messages:
            if count and size + message.ByteSize() > FRAME_BYTES:
                break
            size += message.ByteSize()
            count += 1
        frame = Frame(messages=self._messages[:count])
        del self._messages[:count]
        self._bytes -= size
        if not self._messages:
            self._filled.clear()
        return frame


class _Outgoing:
    """The stream that this worker opens to one peer, again and again until it is closed."""

    def __init__(self, owner: Replication, node_id: str, address: str) -> None:
        self.address = address
        self._owner = owner
        self._node_id = node_id
        self._queue: _Queue | None = None
        self._task = asyncio.create_task(self._run(), name=f"replication to {node_id}")

    @property
    def is_open(self) -> bool:
        """True while messages reach the peer."""
        return self._queue is not None

    def send(self, message: ShardMessage) -> None:
        """Queues a message; without a stream it is lost, as the replicas were told."""
        if self._queue is not None and not self._queue.put(message):
            _log.warning("worker %s lets too much wait; the stream to it is cut", self._node_id)
            self._queue.end()

    async def close(self) -> None:
        """Ends it for good."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        pause_s, told = REDIAL_S_MIN, ""
        while True:
            channel = open_channel(
                self.address,
                [*channel_options(), ("grpc.use_local_subchannel_pool", 1)],
                self._owner.credentials,
                Role.WORKER,
            )
            try:
                problem = await self._talk(channel)
            except aio.AioRpcError as error:
                problem = error.details() or error.code().name
            except TimeoutError:
                problem = f"no connection within {CONNECT_S:g} s"
            finally:
                await channel.close()
            if problem and problem != told:
                _log.info("no replication to worker %s at %s: %s", self._node_id, self.address, problem)
            pause_s = REDIAL_S_MIN if not problem else min(pause_s * 2, REDIAL_S_MAX)
            told = problem
            await asyncio.sleep(pause_s)

    async def _talk(self, channel: aio.Channel) -> str:
        """Opens a stream and moves messages until it ends; why it never began, empty when it did."""
        async with asyncio.timeout(CONNECT_S):
            await channel.channel_ready()
            call = replication_pb2_grpc.ReplicationServiceStub(channel).Open()
            await call.write(Frame(hello=self._owner.hello()))
            first = await call.read()
        if not isinstance(first, Frame):
            return f"{await call.details() or 'it ended the stream'}"
        if first.hello.node_id != self._node_id:
            return f"it calls itself {first.hello.node_id!r}"
        queue = self._queue = _Queue()
        writer = asyncio.create_task(_write(call, queue))
        self._owner.on_connected(self._node_id)
        try:
            while isinstance(frame := await call.read(), Frame):
                for message in frame.messages:
                    self._owner.on_message(self._node_id, message, True)
        except aio.AioRpcError as error:
            _log.info("replication to worker %s ended: %s", self._node_id, error.details() or error.code().name)
        finally:
            self._queue = None
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            call.cancel()
            self._owner.on_lost(self._node_id)
        return ""


async def _write(call: aio.StreamStreamCall[Frame, Frame], queue: _Queue) -> None:
    # An error of a write is the end of the call, which the reading side sees.
    with suppress(aio.AioRpcError, asyncio.InvalidStateError):
        while (frame := await queue.frame()) is not None:
            await call.write(frame)
    call.cancel()


class Replication(replication_pb2_grpc.ReplicationServiceServicer):
    """All streams of one worker. The callbacks are called on the event loop and must not block.

    `on_connected(node)` and `on_lost(node)` speak of the streams that this worker opens; `on_message(node, message,
    is_answer)` of both kinds.
    """

    def __init__(
        self,
        self_id: str,
        incarnation: str,
        cluster_name: str,
        credentials: Credentials | None,
        *,
        on_connected: Callable[[str], None],
        on_lost: Callable[[str], None],
        on_message: Callable[[str, ShardMessage, bool], None],
    ) -> None:
        self.credentials = credentials
        self.on_connected = on_connected
        self.on_lost = on_lost
        self.on_message = on_message
        self._self_id = self_id
        self._incarnation = incarnation
        self._cluster_name = cluster_name
        self._outgoing: dict[str, _Outgoing] = {}
        self._incoming: dict[str, _Queue] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def hello(self) -> replication_pb2.ReplicationHello:
        """What this worker says first."""
        return replication_pb2.ReplicationHello(
            protocol_version=PROTOCOL_VERSION,
            node_id=self._self_id,
            incarnation=self._incarnation,
            cluster_name=self._cluster_name,
        )

    def follow(self, peers: Mapping[str, str]) -> None:
        """Keeps a stream to each of these workers (address by id), and to no other."""
        for node_id, outgoing in list(self._outgoing.items()):
            if peers.get(node_id) != outgoing.address:
                del self._outgoing[node_id]
                closing = asyncio.create_task(outgoing.close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        for node_id, address in peers.items():
            if node_id not in self._outgoing:
                self._outgoing[node_id] = _Outgoing(self, node_id, address)

    def open_peers(self) -> tuple[str, ...]:
        """The peers to whom a stream of this worker is open."""
        return tuple(node_id for node_id, outgoing in self._outgoing.items() if outgoing.is_open)

    def send(self, node_id: str, message: ShardMessage, *, is_answer: bool) -> None:
        """Sends a message, as an answer down the stream that the peer opened; nowhere when there is no stream."""
        if not is_answer:
            if (outgoing := self._outgoing.get(node_id)) is not None:
                outgoing.send(message)
        elif (queue := self._incoming.get(node_id)) is not None and not queue.put(message):
            _log.warning("worker %s lets too many answers wait; its stream is cut", node_id)
            queue.end()

    async def close(self) -> None:
        """Ends all streams."""
        for queue in self._incoming.values():
            queue.end()
        outgoing, self._outgoing = list(self._outgoing.values()), {}
        await asyncio.gather(*(one.close() for one in outgoing), *self._closing, return_exceptions=True)

    # The other side

    async def Open(self, request_iterator: AsyncIterator[Frame], context: Any) -> AsyncIterator[Frame]:
        """A peer's stream: its messages are taken in, our answers go down."""
        first = await anext(aiter(request_iterator), None)
        node_id = self._check(first, context)
        queue = _Queue()
        if (older := self._incoming.get(node_id)) is not None:
            older.end()
        self._incoming[node_id] = queue
        reader = asyncio.create_task(self._read(node_id, request_iterator, queue))
        try:
            yield Frame(hello=self.hello())
            while (frame := await queue.frame()) is not None:
                yield frame
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            queue.is_over = True
            if self._incoming.get(node_id) is queue:
                del self._incoming[node_id]

    async def _read(self, node_id: str, requests: AsyncIterator[Frame], queue: _Queue) -> None:
        try:
            async for frame in requests:
                for message in frame.messages:
                    # Behind the end of the queue a newer stream speaks for this peer.
                    if queue.is_over:
                        return
                    self.on_message(node_id, message, False)
        except InvalidRequest as error:
            _log.warning("the stream of worker %s is cut: %s", node_id, error)
        finally:
            queue.end()

    def _check(self, first: Frame | None, context: Any) -> str:
        """The id of the worker that opens a stream. Raises InvalidRequest or Forbidden."""
        if first is None or not first.HasField("hello"):
            raise InvalidRequest("a replication stream begins with a hello")
        hello = first.hello
        if hello.protocol_version != PROTOCOL_VERSION:
            raise InvalidRequest(f"it speaks protocol {hello.protocol_version}, this worker {PROTOCOL_VERSION}")
        if hello.cluster_name != self._cluster_name:
            raise InvalidRequest(f"it is of cluster {hello.cluster_name!r}, this worker of {self._cluster_name!r}")
        caller = caller_of(context)
        if self.credentials is not None and (caller is None or caller.id != hello.node_id):
            shown = caller.uri if caller is not None else "nobody"
            raise Forbidden(f"it calls itself worker {hello.node_id!r}, but its certificate is of {shown}")
        return hello.node_id
