"""The leader's side of the workers' session streams. DESIGN.md section 5.

    worker  -- OpenRequest -->  SessionServicer  -- events -->  LeaderDriver
    worker  <-- OpenResponse --  SessionHub      <-- actions --  LeaderDriver

Only a master whose controllers run keeps streams open; every other one answers with one Redirect. A session has a
number that is never used again, so a message meant for a stream that has ended cannot reach the worker's next one. The
order of events per session is SessionOpened, then what the worker says, then SessionClosed, exactly once.

What goes down to a worker waits in a bounded queue. A worker that does not read is cut: it comes back and gets its
whole assignment again, which is cheaper than memory without a bound at the leader. An assignment is built when its turn
to be sent comes, so ten changes in a row to a slow worker cost one message.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from grpc import aio

from coordinator.api.v1 import session_pb2, session_pb2_grpc
from coordinator.control import interface
from coordinator.model.errors import Forbidden, InvalidRequest, Overloaded
from coordinator.server.authorize import caller_of

PROTOCOL_VERSION = 1
OUTGOING_MAX = 4_096
"""Messages that may wait for one worker: at 1 KiB each, 4 MiB."""
HELLO_TIMEOUT_S = 5.0

_log = logging.getLogger(__name__)

EventSink = Callable[[interface.Event], None]
AssignmentOf = Callable[[str], session_pb2.Assignment]


class Session:
    """One worker's stream: what waits to be sent on it, and whether it has been ended from here."""

    def __init__(self, number: int, node_id: str) -> None:
        self.number = number
        self.node_id = node_id
        self.cut = asyncio.Event()
        """Set when the worker does not read; whoever runs the stream then ends it at once."""
        self._outgoing: deque[session_pb2.OpenResponse | None] = deque()
        """None stands for the worker's assignment, built when it is sent. Invariant: at most one None."""
        self._has_ended = False
        self._wake = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """True once it was ended from here; what waits is still being sent."""
        return self._has_ended

    def put(self, message: session_pb2.OpenResponse) -> None:
        """Queues a message; ends the session when the worker has let too many pile up."""
        if self._has_ended:
            return
        if len(self._outgoing) >= OUTGOING_MAX:
            _log.warning("worker %s does not read its session: %d messages wait; cut", self.node_id, OUTGOING_MAX)
            self.end(None)
            self.cut.set()
            return
        self._outgoing.append(message)
        self._wake.set()

    def put_assignment(self) -> None:
        """Queues the worker's assignment, unless it is queued already."""
        if not self._has_ended and None not in self._outgoing:
            self._outgoing.append(None)
            self._wake.set()

    def end(self, last: session_pb2.OpenResponse | None, *, drop_queued: bool = True) -> None:
        """Ends the stream after `last`; what is queued is dropped unless told otherwise."""
        if self._has_ended:
            return
        self._has_ended = True
        if drop_queued:
            self._outgoing.clear()
        if last is not None:
            self._outgoing.append(last)
        self._wake.set()

    async def pump(self, write: Callable[[session_pb2.OpenResponse], Awaitable[None]], build: AssignmentOf) -> None:
        """Sends what is queued until the session is ended."""
        while True:
            self._wake.clear()
            while self._outgoing:
                message = self._outgoing.popleft()
                if message is None:
                    message = session_pb2.OpenResponse(assignment=build(self.node_id))
                await write(message)
            if self._has_ended:
                return
            await self._wake.wait()


class SessionHub:
    """The open sessions of this master. Open for workers only while a LeaderDriver has `attach`ed itself."""

    def __init__(self) -> None:
        self._sessions: dict[int, Session] = {}
        self._numbers_by_node: dict[str, list[int]] = {}
        """Sessions by worker, the latest last: two processes may claim one id until the controllers have decided."""
        self._last_number = 0
        self._sink: EventSink | None = None
        self._build: AssignmentOf | None = None

    @property
    def is_attached(self) -> bool:
        """True while this master's controllers take sessions."""
        return self._sink is not None

    @property
    def count(self) -> int:
        """Sessions that are open."""
        return len(self._sessions)

    def is_connected(self, node_id: str) -> bool:
        """True while the worker has a session here."""
        return node_id in self._numbers_by_node

    def attach(self, sink: EventSink, build: AssignmentOf) -> None:
        """Takes sessions from now on; their events go to `sink`, assignments come from `build`."""
        self._sink = sink
        self._build = build

    def detach(self, redirect: session_pb2.Redirect) -> None:
        """Ends all sessions with `redirect` and takes no more; their ends are not reported to the old sink."""
        self._sink = None
        self._build = None
        for session in self._sessions.values():
            session.end(session_pb2.OpenResponse(redirect=redirect))
        self._sessions.clear()
        self._numbers_by_node.clear()

    def begin(self, hello: session_pb2.Hello) -> Session | None:
        """A session for a worker whose Hello is well formed; None when no sessions are taken any more."""
        if self._sink is None:
            return None
        self._last_number += 1
        session = Session(self._last_number, hello.node.id)
        self._sessions[session.number] = session
        self._numbers_by_node.setdefault(session.node_id, []).append(session.number)
        self._sink(interface.SessionOpened(session.number, hello))
        return session

    def report(self, session: Session, event: interface.Event) -> None:
        """Hands an event of a session on; dropped when the session is no longer this leader's."""
        if self._sink is not None and session.number in self._sessions:
            self._sink(event)

    def finish(self, session: Session) -> None:
        """The stream has ended, for whatever reason."""
        if self._sessions.pop(session.number, None) is None:
            return
        numbers = self._numbers_by_node[session.node_id]
        numbers.remove(session.number)
        if not numbers:
            del self._numbers_by_node[session.node_id]
        if self._sink is not None:
            self._sink(interface.SessionClosed(session.number, session.node_id))

    def assignment(self, node_id: str) -> session_pb2.Assignment:
        """The worker's assignment as of now; only called while sessions are taken."""
        if self._build is None:
            raise asyncio.CancelledError  # Detached between the wake-up and the turn of this message.
        return self._build(node_id)

    # What the driver's actions become. All are harmless for sessions that have ended.

    def send(self, number: int, message: session_pb2.OpenResponse) -> None:
        """Queues a message on a session."""
        session = self._sessions.get(number)
        if session is not None:
            session.put(message)

    def send_assignment(self, number: int) -> None:
        """Queues the session's worker's assignment."""
        session = self._sessions.get(number)
        if session is not None:
            session.put_assignment()

    def send_to_node(self, node_id: str, message: session_pb2.OpenResponse) -> None:
        """Queues a message on the worker's latest session that has not been ended from here."""
        for number in reversed(self._numbers_by_node.get(node_id, ())):
            if not self._sessions[number].has_ended:
                self._sessions[number].put(message)
                return

    def close(self, number: int, reason: str, final: bool) -> None:
        """Ends a session with a Farewell, after what is queued."""
        session = self._sessions.get(number)
        if session is not None:
            farewell = session_pb2.Farewell(reason=reason, final=final)
            session.end(session_pb2.OpenResponse(farewell=farewell), drop_queued=False)


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """Serves `SessionService`."""

    def __init__(
        self,
        hub: SessionHub,
        cluster_name: str,
        redirect_unless_leading: Callable[[], Awaitable[session_pb2.Redirect | None]],
    ) -> None:
        self._hub = hub
        self._cluster_name = cluster_name
        self._redirect_unless_leading = redirect_unless_leading

    async def Open(  # type: ignore[override]  # A coroutine that writes, which the generated types do not know.
        self,
        request_iterator: AsyncIterator[session_pb2.OpenRequest],
        context: aio.ServicerContext[session_pb2.OpenRequest, session_pb2.OpenResponse],
    ) -> None:
        redirect = await self._redirect_unless_leading()
        if redirect is not None:
            await context.write(session_pb2.OpenResponse(redirect=redirect))
            return
        hello = await _first_message(request_iterator)
        caller = caller_of(context)
        if caller is not None and caller.id != hello.node.id:
            _log.warning("session of worker %r refused: its certificate is of %s", hello.node.id, caller.uri)
            raise Forbidden(f"{caller.uri} may not open a session as worker {hello.node.id!r}, only as {caller.id!r}")
        problem = self._problem_of(hello)
        if problem:
            _log.warning("session of worker %r refused: %s", hello.node.id, problem)
            farewell = session_pb2.Farewell(reason=problem, final=True)
            await context.write(session_pb2.OpenResponse(farewell=farewell))
            return
        session = self._hub.begin(hello)
        if session is None:
            lost = session_pb2.Redirect(reason="this master has just stopped leading")
            await context.write(session_pb2.OpenResponse(redirect=lost))
            return
        await self._run(session, request_iterator, context)

    def _problem_of(self, hello: session_pb2.Hello) -> str:
        """Why a Hello can never be accepted; empty when it can."""
        if hello.protocol_version != PROTOCOL_VERSION:
            return (
                f"the worker speaks session protocol {hello.protocol_version}, this master {PROTOCOL_VERSION}; "
                "run the same version on both"
            )
        if hello.cluster_name != self._cluster_name:
            return (
                f"the worker belongs to cluster {hello.cluster_name!r}, this is cluster {self._cluster_name!r}; "
                "check `name` and the masters in the worker's cluster.toml"
            )
        if not hello.node.id:
            return "the worker has no id; start it with --id"
        if not hello.node.incarnation:
            return f"worker {hello.node.id} names no incarnation; run a version that does"
        return ""

    async def _run(
        self,
        session: Session,
        request_iterator: AsyncIterator[session_pb2.OpenRequest],
        context: aio.ServicerContext[session_pb2.OpenRequest, session_pb2.OpenResponse],
    ) -> None:
        """Pumps both ways until either side ends the stream."""
        writer = asyncio.create_task(session.pump(context.write, self._hub.assignment))
        reader = asyncio.create_task(self._read(session, request_iterator))
        cut = asyncio.create_task(session.cut.wait())
        tasks: tuple[asyncio.Task[Any], ...] = (writer, reader, cut)
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and (error := task.exception()) is not None:
                    raise error
        finally:
            self._hub.finish(session)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if session.cut.is_set():
            raise Overloaded(f"worker {session.node_id} did not read its session; open a new one")

    async def _read(self, session: Session, request_iterator: AsyncIterator[session_pb2.OpenRequest]) -> None:
        async for request in request_iterator:
            event = _event_of(session, request)
            if event is not None:
                self._hub.report(session, event)


async def _first_message(request_iterator: AsyncIterator[session_pb2.OpenRequest]) -> session_pb2.Hello:
    """The worker's Hello. Raises InvalidRequest when something else comes first, or nothing in time."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            request = await anext(request_iterator, None)
    except TimeoutError:
        raise InvalidRequest(f"a session begins with a Hello; none came within {HELLO_TIMEOUT_S:g} s") from None
    kind = None if request is None else request.WhichOneof("message")
    if request is None or kind != "hello":
        raise InvalidRequest(f"a session begins with a Hello, not with {kind or 'nothing'}")
    return request.hello


def _event_of(session: Session, request: session_pb2.OpenRequest) -> interface.Event | None:
    """What a message means to the controllers; None for one that only a newer version knows."""
    number, node_id = session.number, session.node_id
    match request.WhichOneof("message"):
        case "heartbeat":
            return interface.HeartbeatReceived(number, node_id, request.heartbeat)
        case "replica_reports":
            return interface.ReplicasReported(number, node_id, tuple(request.replica_reports.reports))
        case "launch_report":
            return interface.LaunchReported(number, node_id, request.launch_report)
        case "goodbye":
            return interface.GoodbyeReceived(number, node_id, request.goodbye.reason)
        case "hello":
            raise InvalidRequest(f"worker {node_id} sent a second Hello in one session")
        case _:
            return None
