"""An asyncio event loop in virtual time: one per life of a simulated process, so that its real coroutines run.

A loop has turns, as asyncio's have: a turn calls what was ready when it began, in order; what becomes ready meanwhile
waits for the next one. When a turn comes is the host's business, who may be paused or busy with its disk; between two
calls of a turn the host may end the process, so a crash can come at any `await`.

Of asyncio's interface there is what the code under test uses, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast

from coordinator.model.errors import CoordinatorError

if TYPE_CHECKING:
    from tests.sim.raft_net import Endpoint, Listener, Network


class Host(Protocol):
    """The process that a loop is of."""

    id: str

    def monotonic_s(self) -> float:
        """Its clock."""
        ...

    def turn_later(self) -> None:
        """Has `run_turn` called, once, as soon as its process does anything."""
        ...

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Has something done after so many seconds of its clock, whether or not its process does anything."""
        ...

    def wait_for_thread(self, call: Callable[[], None]) -> None:
        """Has something done at some later time."""
        ...

    def called(self) -> bool:
        """Looks at what a call did; False when the rest of the turn has to wait. Raises to end the process."""
        ...

    def failed(self, context: dict[str, Any]) -> None:
        """Something went wrong that nobody waits for; as asyncio tells its exception handler."""
        ...


class Handle:
    """A call that is to be made, unless it is cancelled before."""

    __slots__ = ("arguments", "callback", "context", "is_cancelled", "when_s")

    def __init__(
        self, callback: Callable[..., object], arguments: tuple[Any, ...], context: Any, when_s: float = 0.0
    ) -> None:
        self.callback = callback
        self.arguments = arguments
        self.context = context or contextvars.copy_context()
        self.when_s = when_s
        self.is_cancelled = False

    def cancel(self) -> None:
        """Never makes the call."""
        self.is_cancelled = True


class SimLoop:
    """Invariant: while something is ready and the loop is alive, a turn has been asked of the host.

    No subclass of asyncio's loop, of which 34 methods would be left that nobody calls here.
    """

    def __init__(self, host: Host, network: Network) -> None:
        self.is_dead = False
        self._loop = cast("asyncio.AbstractEventLoop", self)
        self._host = host
        self._network = network
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._ready: deque[Handle] = deque()
        self._is_turn_due = False

    # Turns

    def run_turn(self) -> None:
        """Makes the calls that are ready now."""
        self._is_turn_due = False
        ready = self._ready
        asyncio._set_running_loop(self._loop)
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle.is_cancelled:
                    handle.context.run(handle.callback, *handle.arguments)
                    if not self._host.called():
                        break
        finally:
            asyncio._set_running_loop(None)
        self._want_turn()

    def _want_turn(self) -> None:
        if self._ready and not self._is_turn_due and not self.is_dead:
            self._is_turn_due = True
            self._host.turn_later()

    def die(self) -> None:
        """The process is gone: nothing is called any more, whatever is still asked for."""
        self.is_dead = True
        self._ready.clear()
        for task in list(self._tasks):
            # Now, as nobody knows when the garbage collector would do it.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            cast("Coroutine[Any, Any, Any]", task.get_coro()).close()
        self._tasks.clear()

    # What asyncio and the code under test ask for

    def time(self) -> float:
        return self._host.monotonic_s()

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = Handle(callback, args, context)
        if not self.is_dead:
            self._ready.append(handle)
            self._want_turn()
        return handle

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> Any:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = Handle(callback, args, context, when)
        self._wait(handle)
        return handle

    def _wait(self, handle: Handle) -> None:
        if not self.is_dead:
            self._host.after(max(0.0, handle.when_s - self.time()), lambda: self._due(handle))

    def _due(self, handle: Handle) -> None:
        if handle.is_cancelled or self.is_dead:
            return
        if self.time() < handle.when_s - 1e-9:
            # Its clock stood still meanwhile.
            self._wait(handle)
            return
        self._ready.append(handle)
        self._want_turn()

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._loop)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self._loop, name=name or "task", context=context)
        task.add_done_callback(self._task_done)
        self._tasks[task] = None
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, CoordinatorError):
            self.call_exception_handler({"message": f"{task.get_name()} failed", "exception": error})

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> asyncio.Future[Any]:
        future = self.create_future()

        def work() -> None:
            result = func(*args)
            if not future.cancelled():
                future.set_result(result)

        self._host.wait_for_thread(work)
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.is_dead

    def is_closed(self) -> bool:
        return self.is_dead

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.is_dead:
            self._host.failed(context)

    # Sockets

    async def sock_accept(self, sock: Any) -> tuple[Any, Any]:
        listener: Listener = sock
        endpoint = await listener.accept(self)
        return endpoint, (endpoint.peer_id, 0)

    async def connect_accepted_socket(self, protocol_factory: Any, sock: Any, **options: Any) -> tuple[Any, Any]:
        return await self._attach(protocol_factory, sock)

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        endpoint = self._network.dial(self, self._host.id, host)
        try:
            await endpoint.connected
        except BaseException:
            endpoint.abort()
            raise
        return await self._attach(protocol_factory, endpoint)

    async def _attach(self, protocol_factory: Callable[[], asyncio.Protocol], endpoint: Endpoint) -> tuple[Any, Any]:
        """Gives an open connection its protocol, as asyncio does: in one turn made, in the same told."""
        protocol = protocol_factory()
        made = self.create_future()
        self.call_soon(endpoint.attach, protocol)
        self.call_soon(lambda: None if made.done() else made.set_result(None))
        try:
            await made
        except BaseException:
            endpoint.close()
            raise
        return endpoint, protocol

