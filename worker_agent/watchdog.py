"""The agent's side of `run_watchdog.py`: starts that process, tells it what runs and for how long, and replaces it.

Nobody waits for it: what is said goes into a pipe, where it stays when this process is killed. All of it is said again
to a watchdog that takes the place of another, so losing one costs nothing unless the agent is lost in the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from coordinator.model import Monotonic
from worker_agent import run_watchdog
from worker_agent.session_lease import NO_LEASE

RESTART_S = 0.5
"""Pause before a watchdog that has ended is replaced, so that one that cannot live costs little."""
UNREAD_BYTES_MAX = 1 << 20
"""A watchdog that is so far behind stands still: some 20,000 runs."""
GOODBYE_S = 5.0
"""How long it has to end after the goodbye."""

_log = logging.getLogger(__name__)


class Watchdog:
    """Belongs to one event loop. Between `start` and `stop` there is such a process, but for moments."""

    def __init__(self, grace_s: float) -> None:
        """`grace_s` is what runs have to end by themselves once the lease of an agent that cannot see to it is over."""
        self._grace_s = grace_s
        self._runs: set[str] = set()
        self._lease_until = NO_LEASE
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def process_id(self) -> int | None:
        """Its process; None while there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Has one started, and another one whenever it ends."""
        self._task = asyncio.create_task(self._keep(), name="watchdog of the runs")

    def begin(self, run_id: str) -> None:
        """To be said before the run has a process: one that nobody was told of is nobody's to end."""
        self._runs.add(run_id)
        self._say(f"begin {run_id}\n")

    def end(self, run_id: str) -> None:
        """Nothing of the run is left."""
        if run_id in self._runs:
            self._runs.remove(run_id)
            self._say(f"end {run_id}\n")

    def set_lease_end(self, until: Monotonic) -> None:
        """The session lease ends then."""
        self._lease_until = until
        self._say(f"lease {until!r}\n")

    async def stop(self) -> None:
        """Says goodbye, and returns when its process has ended."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        # With runs left, which takes a fault of the launcher, it does what it is for.
        if not self._runs:
            process.stdin.write(b"bye\n")
        process.stdin.close()
        try:
            async with asyncio.timeout(GOODBYE_S):
                await process.wait()
        except TimeoutError:
            if not self._runs:
                process.kill()
                await process.wait()

    async def _keep(self) -> None:
        while True:
            try:
                self._process = await asyncio.create_subprocess_exec(*_command(self._grace_s), **_options())
            except OSError as error:
                _log.error("no watchdog can be started, so runs would outlive this agent if it were killed: %s", error)
            else:
                said = [f"lease {self._lease_until!r}\n", *(f"begin {run_id}\n" for run_id in self._runs)]
                self._say("".join(said))
                status = await self._process.wait()
                self._process = None
                _log.warning("the watchdog of the runs ended with status %d; another one is started", status)
            await asyncio.sleep(RESTART_S)

    def _say(self, text: str) -> None:
        if self._process is None or self._process.stdin is None or self._process.stdin.is_closing():
            return
        self._process.stdin.write(text.encode("ascii"))
        if self._process.stdin.transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _command(grace_s: float) -> list[str]:
    # -S, where it does without psutil: see there.
    flags = ["-I", "-S"] if run_watchdog.HAS_PROC else ["-I"]
    return [sys.executable, *flags, str(Path(run_watchdog.__file__)), repr(grace_s)]


def _options() -> dict[str, Any]:
    return {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.DEVNULL,
        # In a session of its own nothing that is meant for the agent's group, or its terminal, reaches it.
        "start_new_session": os.name == "posix",
        "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    }
