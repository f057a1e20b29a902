"""The application of a worker: agents that live where their users' state is.

`[worker] application = "package.module:Class"` names a class of the worker's Python environment. The worker makes one
object of it, `Class(state)`, with a LocalState (local_state.py), and tells it which shards are its to work on:

    async def on_acquired(self, shard: OwnedShard) -> None     this worker begins to serve the shard as primary
    async def on_released(self, shard: OwnedShard) -> None     it has stopped: ceded, taken away, lost, or about to stop

What is promised, per shard: handlers never overlap; each on_acquired is followed by exactly one on_released of the same
OwnedShard, also when it failed, before the next on_acquired. A tenure that ended before its on_acquired could begin is
not told at all. A shard that stops being served while on_acquired runs has that cancelled. Between shards there is no
order.

What is not promised: that on_released comes before another worker serves. It cannot, for a worker that was cut off
hears of it late. Nothing can be damaged meanwhile: LocalState refuses what is not served here. Only when the worker is
told to stop does on_released come while reads and writes still work.

Handlers run on the worker's event loop, so they must not block it (`asyncio.to_thread` is for what does). One that
takes longer than allowed is cancelled, and told in the log; where it does not heed that, the handlers of its shard wait
for it, and everything else goes on. What they raise is logged with the shard and changes nothing else.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from coordinator.model.errors import ConfigError
from worker_agent.local_state import LocalState
from worker_agent.local_state import OwnedShard as OwnedShard
from worker_agent.run_python import load

ACQUIRE_S_MAX = 30.0
"""How long on_acquired may take."""
HEED_S_MAX = 1.0
"""How long a handler that was cancelled may take to end, before the log says that it does not."""

_log = logging.getLogger(__name__)


class Application(Protocol):
    """What an application has to have."""

    async def on_acquired(self, shard: OwnedShard) -> None:
        """The worker serves the shard from now on."""
        ...

    async def on_released(self, shard: OwnedShard) -> None:
        """It does not any more."""
        ...


def load_application(target: str, state: LocalState) -> Application:
    """Makes the application. Raises ConfigError with one line when it cannot be had."""
    option = f'worker.application = "{target}"'
    try:
        made: Any = load(target)(state)
    except ValueError as error:
        raise ConfigError([f"{option} cannot be loaded: {error}"]) from None
    except Exception as error:
        raise ConfigError([f"{option} cannot be made: {type(error).__name__}: {error}"]) from error
    for name in ("on_acquired", "on_released"):
        if not inspect.iscoroutinefunction(getattr(made, name, None)):
            raise ConfigError([f"{option} has no `async def {name}(self, shard)`; write it, even if it does nothing"])
    application: Application = made
    return application


@dataclass(slots=True)
class _Line:
    """What one shard's handlers were told and have to be told."""

    wanted: OwnedShard | None = None
    """The tenure that goes on; each has an object of its own."""
    told: OwnedShard | None = None
    """The one whose on_acquired has begun, and whose on_released has not."""
    acquiring: asyncio.Task[None] | None = None
    task: asyncio.Task[None] | None = None


class Handlers:
    """Calls the handlers of one application. Belongs to the worker's event loop."""

    def __init__(
        self, application: Application, *, release_s_max: float, acquire_s_max: float = ACQUIRE_S_MAX
    ) -> None:
        self._application = application
        self._acquire_s_max = acquire_s_max
        self._release_s_max = release_s_max
        self._lines: dict[int, _Line] = {}
        self._is_closed = False

    def on_serving(self, shard: OwnedShard, is_serving: bool) -> None:
        """A shard begins to be served here, or stops; each time it begins with an object that is equal to none yet."""
        if self._is_closed:
            return
        line = self._lines.setdefault(shard.shard_id, _Line())
        line.wanted = shard if is_serving else None
        self._go_on(shard.shard_id, line)

    def _go_on(self, shard_id: int, line: _Line) -> None:
        if line.acquiring is not None and line.told is not line.wanted:
            line.acquiring.cancel()
        if line.task is None:
            line.task = asyncio.create_task(self._run(shard_id, line), name=f"handlers of shard {shard_id}")

    async def _run(self, shard_id: int, line: _Line) -> None:
        """Brings the application to what is wanted, and ends."""
        while line.told is not line.wanted:
            if line.told is not None:
                released, line.told = line.told, None
                await self._call("on_released", self._application.on_released, released, self._release_s_max)
            else:
                assert line.wanted is not None, "otherwise there is nothing to do"
                acquired = line.told = line.wanted
                call = self._call("on_acquired", self._application.on_acquired, acquired, self._acquire_s_max, line)
                await call
        line.task = None
        if line.told is None:
            del self._lines[shard_id]

    async def _call(
        self,
        name: str,
        handler: Callable[[OwnedShard], Awaitable[None]],
        shard: OwnedShard,
        s_max: float,
        line: _Line | None = None,
    ) -> None:
        """Runs one handler to its end, whatever that is. Told of its task is `line`, which may cancel it."""
        task = asyncio.create_task(_shielded(handler, shard), name=f"{name} of shard {shard.shard_id}")
        if line is not None:
            line.acquiring = task
        try:
            if not (await asyncio.wait([task], timeout=s_max))[0]:
                _log.error("shard %d: %s of the application took over %g s; cancelled", shard.shard_id, name, s_max)
                task.cancel()
                if not (await asyncio.wait([task], timeout=HEED_S_MAX))[0]:
                    _log.error("shard %d: %s of the application cannot be cancelled; waiting", shard.shard_id, name)
                    await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            if line is not None:
                line.acquiring = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("shard %d: %s of the application failed", shard.shard_id, name, exc_info=error)

    async def close(self) -> None:
        """Releases what is acquired, and ends; later changes are not told. A second call does nothing.

        A handler that does not end holds it up for no longer than a release may take.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for shard_id, line in list(self._lines.items()):
            line.wanted = None
            self._go_on(shard_id, line)
        tasks = [line.task for line in self._lines.values() if line.task is not None]
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=self._release_s_max + 2 * HEED_S_MAX)
        for task in left:
            _log.error("%s of the application did not end; given up", task.get_name())
            task.cancel()
        await asyncio.wait(tasks)


async def _shielded(handler: Callable[[OwnedShard], Awaitable[None]], shard: OwnedShard) -> None:
    """The handler; what would end the whole worker is an error like any other."""
    try:
        await handler(shard)
    except SystemExit as error:
        raise RuntimeError(f"it wanted to end the process with status {error.code}") from error
