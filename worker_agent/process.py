"""One process of a launch with everything that it starts: its output, its end, its stop.

Whatever belongs to the run is found by the run's id, which is in its environment (`run_finder.py`).

Where the system has pidfds (Linux), a process is started by `subprocess.Popen` and watched by the event loop; elsewhere
the loop's own `subprocess_exec` does both. Popen starts with vfork, whose cost does not depend on how much memory this
process has; uvloop's own start forks, which cost three times the processor time per launch.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import psutil

from worker_agent.run_finder import RunFinder, each, until_ended
from worker_agent.run_watchdog import RUN_ID_VARIABLE

READ_BYTES_MAX = 65_536
"""A pipe of Linux has no more."""
_DRAIN_S = 1.0
"""How long the output may trickle on after the process ended: a child that it left may hold the pipe for ever."""


class Sink(Protocol):
    """Takes what a run prints."""

    def feed(self, data: bytes) -> None:
        """A piece of it, never empty."""
        ...


class _Watcher(asyncio.SubprocessProtocol):
    """What the event loop tells of a process.

    asyncio's own `Process.wait` also waits for the pipes, in some versions, and a child may hold those for ever.
    """

    def __init__(self, sink: Sink) -> None:
        self.ended = asyncio.Event()
        self.silent = asyncio.Event()
        self._sink = sink

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._sink.feed(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.silent.set()

    def process_exited(self) -> None:
        self.ended.set()


class _Handle(Protocol):
    """What is done with a started process; a SubprocessTransport of asyncio has it too."""

    def get_pid(self) -> int: ...
    def get_returncode(self) -> int | None: ...
    def get_pipe_transport(self, fd: int, /) -> Any: ...
    def close(self) -> None: ...


class _PidfdHandle:
    """A Popen that the event loop watches: its end by a pidfd, its output by its pipe."""

    def __init__(self, popen: subprocess.Popen[bytes], watcher: _Watcher) -> None:
        assert popen.stdout is not None
        self._popen = popen
        self._watcher = watcher
        self._pipe = popen.stdout
        self._loop = asyncio.get_running_loop()
        self._is_reading = False
        self._is_reaped = False
        """Somebody else in this process, as psutil's `wait`, has taken its exit status; its number may be another's."""
        self._pidfd = os.pidfd_open(popen.pid)
        os.set_blocking(self._pipe.fileno(), False)
        self._loop.add_reader(self._pidfd, self._on_end)
        self.resume_reading()

    def get_pid(self) -> int:
        return self._popen.pid

    def get_returncode(self) -> int | None:
        return self._popen.returncode

    def get_pipe_transport(self, fd: int, /) -> _PidfdHandle:
        return self

    def pause_reading(self) -> None:
        """Leaves the output in the pipe; the process waits once that is full."""
        if self._is_reading:
            self._loop.remove_reader(self._pipe.fileno())
            self._is_reading = False

    def resume_reading(self) -> None:
        """Takes the output again."""
        if not self._is_reading and not self._pipe.closed and not self._watcher.silent.is_set():
            self._loop.add_reader(self._pipe.fileno(), self._on_output)
            self._is_reading = True

    def close(self) -> None:
        """Lets go of the pipe."""
        self.pause_reading()
        self._pipe.close()

    def reap(self) -> None:
        """Kills what is left of the group of the process, which has ended, and takes its exit status.

        Until then its number, which is that of the group too, is nobody else's. Where nothing is left this is one
        system call: nobody has to look.
        """
        if self._popen.returncode is None:
            if not self._is_reaped:
                with contextlib.suppress(OSError):
                    os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
            os.close(self._pidfd)

    def _on_end(self) -> None:
        try:
            if os.waitid(os.P_PID, self._popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
        except ChildProcessError:
            self._is_reaped = True
        self._loop.remove_reader(self._pidfd)
        self._watcher.process_exited()

    def _on_output(self) -> None:
        try:
            data = os.read(self._pipe.fileno(), READ_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._watcher.pipe_data_received(1, data)
        else:
            self.pause_reading()
            self._watcher.pipe_connection_lost(1, None)


class RunProcess:
    """A started process. Its output is read all the time, so that it never blocks on a full pipe, unless the sink asks.

    The sink may pause the reading while the disk is slower than the run.
    """

    def __init__(self, handle: _Handle, watcher: _Watcher, run_id: str, finder: RunFinder) -> None:
        self._handle = handle
        self._watcher = watcher
        self._run_id = run_id
        self._finder = finder
        self._kill_at_s = math.inf
        """On the loop's clock."""
        self._grace: asyncio.Timeout | None = None
        """While a stop waits."""
        self._is_stopping = False
        self._stopped = asyncio.Event()

    @classmethod
    async def start(
        cls,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        run_id: str,
        sink: Sink,
        finder: RunFinder | None = None,
    ) -> RunProcess:
        """Starts a process in a session of its own. Raises OSError or ValueError when it cannot be started."""
        watcher, finder = _Watcher(sink), finder or RunFinder()
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "env": {**environment, RUN_ID_VARIABLE: run_id},
            "start_new_session": os.name == "posix",
            "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        }
        if not has_pidfds():
            loop = asyncio.get_running_loop()
            handle, _ = await loop.subprocess_exec(lambda: watcher, *arguments, **options)
            return cls(handle, watcher, run_id, finder)
        return cls(_start_watched(arguments, options, watcher), watcher, run_id, finder)

    def set_reading(self, is_reading: bool) -> None:
        """Whether the output is taken; after the end of the process it always is, for no more comes than a pipe has."""
        pipe = self._handle.get_pipe_transport(1)
        if pipe is None or self._watcher.silent.is_set():
            return
        if is_reading or self._watcher.ended.is_set():
            pipe.resume_reading()
        else:
            pipe.pause_reading()

    async def wait(self) -> int:
        """The exit status, negative for a signal, once the process has ended, its output is read, and its rest killed.

        What it left behind in its group has until the output ends, or _DRAIN_S, to say the last words: a `tee` that the
        process did not wait for. What has left the group is not looked for: see `Leftovers`.
        """
        await self._drained()
        if self._is_stopping:
            await self._stopped.wait()
        return await self._finish()

    async def stop(self, grace_s: float) -> int:
        """Asks the whole tree to end, kills after `grace_s` what did not, and gives the exit status."""
        self._is_stopping = True
        self.hasten(grace_s)
        members = await self._members()
        each(members, "terminate")
        others = [member for member in members if member.pid != self._handle.get_pid()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._kill_at_s) as self._grace:
                await self._watcher.ended.wait()
                for other in others:
                    await until_ended(other)
        self._grace = None
        await self._kill_members()
        await self._drained()
        status = await self._finish()
        self._stopped.set()
        return status

    async def _kill_members(self) -> None:
        for _ in range(3):  # A process that forks while it is killed leaves one more.
            members = await self._members()
            if not members:
                break
            each(members, "kill")
            await self._watcher.ended.wait()

    async def _drained(self) -> None:
        await self._watcher.ended.wait()
        self.set_reading(True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await self._watcher.silent.wait()

    async def _finish(self) -> int:
        if isinstance(self._handle, _PidfdHandle):
            self._handle.reap()
        elif not self._is_stopping and _has_group(self._handle.get_pid()):
            await self._kill_members()
        self._handle.close()
        status = self._handle.get_returncode()
        assert status is not None
        return status

    def hasten(self, grace_s: float) -> None:
        """No stop leaves it more time than this from now on, the one that waits already neither."""
        kill_at_s = asyncio.get_running_loop().time() + grace_s
        if kill_at_s < self._kill_at_s:
            self._kill_at_s = kill_at_s
            if self._grace is not None and not self._grace.expired():
                self._grace.reschedule(kill_at_s)

    async def _members(self) -> list[psutil.Process]:
        root_pid = None if self._watcher.ended.is_set() else self._handle.get_pid()
        return await self._finder.members(self._run_id, root_pid)


def _start_watched(arguments: Sequence[str], options: Mapping[str, Any], watcher: _Watcher) -> _PidfdHandle:
    """Starts a process and has the event loop watch it. Stands still until the program is executed: about 1 ms."""
    popen = subprocess.Popen(arguments, bufsize=0, **options)
    try:
        return _PidfdHandle(popen, watcher)
    except OSError:  # No descriptor is left to watch it with.
        popen.kill()
        popen.communicate()
        raise


def _has_group(process_id: int) -> bool:
    """True when there may be something left of the group that a process had; its number may be another's by now."""
    if sys.platform == "win32":
        return False
    try:
        os.killpg(process_id, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


@functools.cache
def has_pidfds() -> bool:
    """True where the end of a process can be watched by a descriptor."""
    opened: Callable[[int], int] | None = getattr(os, "pidfd_open", None)
    if opened is None:
        return False
    try:
        os.close(opened(os.getpid()))
    except OSError:  # An old kernel, or a sandbox that does not know the call.
        return False
    return True
