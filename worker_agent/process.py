"""One process of a launch with everything that it starts: its output, its end, its stop.

The run's id is in its environment (RUN_ID_VARIABLE), which children inherit; so whatever belongs to the run is found
again, also after its parent has died or this agent was restarted, and nothing else is ever mistaken for it, as a
process number that was given out again might be.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Mapping

import psutil

RUN_ID_VARIABLE = "LAUNCH_RUN_ID"
_DRAIN_S = 1.0
"""How long the output may trickle on after the process ended: a child that it left may hold the pipe for ever."""


class _Watcher(asyncio.SubprocessProtocol):
    """What the event loop tells of a process.

    asyncio's own `Process.wait` also waits for the pipes, in some versions, and a child may hold those for ever.
    """

    def __init__(self, output_bytes_max: int) -> None:
        self.tail = bytearray()
        self.ended = asyncio.Event()
        self.silent = asyncio.Event()
        self._output_bytes_max = output_bytes_max

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self.tail += data
        del self.tail[: max(0, len(self.tail) - self._output_bytes_max)]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self.silent.set()

    def process_exited(self) -> None:
        self.ended.set()


class RunProcess:
    """A started process. Its output is read all the time, so that it never blocks on a full pipe; the tail is kept."""

    def __init__(self, transport: asyncio.SubprocessTransport, watcher: _Watcher, run_id: str) -> None:
        self._transport = transport
        self._watcher = watcher
        self._run_id = run_id

    @classmethod
    async def start(
        cls, arguments: Iterable[str], environment: Mapping[str, str], run_id: str, output_bytes_max: int
    ) -> RunProcess:
        """Starts a process in a session of its own. Raises OSError or ValueError when it cannot be started."""
        transport, watcher = await asyncio.get_running_loop().subprocess_exec(
            lambda: _Watcher(output_bytes_max),
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**environment, RUN_ID_VARIABLE: run_id},
            start_new_session=os.name == "posix",
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        return cls(transport, watcher, run_id)

    @property
    def output(self) -> bytes:
        """The last bytes of standard output and standard error together."""
        return bytes(self._watcher.tail)

    async def wait(self) -> int:
        """The exit status, negative for a signal, once the process has ended and its output is read."""
        await self._watcher.ended.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await self._watcher.silent.wait()
        status = self._transport.get_returncode()
        self._transport.close()
        assert status is not None
        return status

    async def stop(self, grace_s: float) -> int:
        """Asks the whole tree to end, kills after `grace_s` what did not, and gives the exit status."""
        members = await asyncio.to_thread(self._members)
        _each(members, "terminate")
        others = [member for member in members if member.pid != self._transport.get_pid()]
        waiting = asyncio.create_task(asyncio.to_thread(_await_end, others, grace_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._watcher.ended.wait()
        await waiting
        for _ in range(3):  # A process that forks while it is killed leaves one more.
            members = await asyncio.to_thread(self._members)
            if not members:
                break
            _each(members, "kill")
            await self._watcher.ended.wait()
        return await self.wait()

    def _members(self) -> list[psutil.Process]:
        members = {process.pid: process for process in find_runs({self._run_id})}
        if not self._watcher.ended.is_set():
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._transport.get_pid())
                members.update({process.pid: process for process in (root, *root.children(recursive=True))})
        return list(members.values())


def find_runs(run_ids: set[str]) -> list[psutil.Process]:
    """The living processes of these runs. Reads every process's environment, so it belongs into a thread."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RUN_ID_VARIABLE) in run_ids and _lives(process):
                found.append(process)
    return found


def kill_runs(run_ids: set[str]) -> int:
    """Kills what is left of runs whose agent died; the number of processes. Blocks."""
    killed = 0
    while members := find_runs(run_ids):
        killed += len(members)
        _each(members, "kill")
        _await_end(members, 2.0)
        if killed > 10_000:  # Something respawns faster than it can be killed.
            break
    return killed


def _await_end(processes: list[psutil.Process], timeout_s: float) -> None:
    """Blocks until all have ended. A zombie has ended: where nobody reaps orphans, as in many containers, it stays."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and any(_lives(process) for process in processes):
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _each(processes: Iterable[psutil.Process], action: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            getattr(process, action)()
