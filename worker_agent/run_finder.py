"""Finds what belongs to runs, wherever it is by now, and kills what is left of them.

A run's id is in its environment (RUN_ID_VARIABLE), which children inherit; so whatever belongs to the run is found
again, also after its parent has died or this agent was restarted, and nothing else is ever mistaken for it, as a
process number that was given out again might be.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence

import psutil

from worker_agent.run_watchdog import RUN_ID_VARIABLE

_LOOK_S = 0.05
"""How often a stop looks whether what the process started has ended."""
SWEEP_S = 5.0
"""How long something may outlive its run that has left the run's process group."""

_log = logging.getLogger(__name__)


class RunFinder:
    """Finds what belongs to runs: by the run's id, and below its first process while that lives.

    A look reads every process of the machine, so those who ask while one goes on share the next: when a lease ends, all
    runs ask at once.
    """

    def __init__(self) -> None:
        self._wanted: list[tuple[str, int | None, asyncio.Future[list[psutil.Process]]]] = []
        self._task: asyncio.Task[None] | None = None

    async def members(self, run_id: str, root_pid: int | None) -> list[psutil.Process]:
        """The living processes of a run."""
        future: asyncio.Future[list[psutil.Process]] = asyncio.get_running_loop().create_future()
        self._wanted.append((run_id, root_pid, future))
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="look for runs")
        return await future

    async def _work(self) -> None:
        while self._wanted:
            wanted, self._wanted = self._wanted, []
            error: Exception | None = None
            found: list[list[psutil.Process]] = []
            try:
                found = await asyncio.to_thread(_look, [(run_id, root_pid) for run_id, root_pid, _ in wanted])
            except Exception as caught:
                error = caught
            for number, (_, _, future) in enumerate(wanted):
                if future.done():
                    continue
                if error is None:
                    future.set_result(found[number])
                else:
                    future.set_exception(error)
        self._task = None


class Leftovers:
    """Kills what runs that have ended left behind outside their process group (`setsid`): a little later, all at once.

    A look reads every process of the machine, some 10 ms of a processor, so there is one in SWEEP_S and not one for
    each run. Belongs to one event loop.
    """

    def __init__(self, on_swept: Callable[[str], None]) -> None:
        """`on_swept` is told of each run that nothing is left of."""
        self._on_swept = on_swept
        self._run_ids: set[str] = set()
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, run_id: str) -> None:
        """A run has ended."""
        self._run_ids.add(run_id)
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="sweep behind runs")

    def hasten(self) -> None:
        """Looks now."""
        if self._task is not None:
            self._hurry.set()

    async def stop(self) -> None:
        """Returns when nothing is left."""
        while self._task is not None:
            self._hurry.set()
            await self._task

    async def _work(self) -> None:
        while self._run_ids:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_S):
                    await self._hurry.wait()
            self._hurry.clear()
            run_ids, self._run_ids = self._run_ids, set()
            try:
                if killed := await asyncio.to_thread(kill_runs, run_ids):
                    _log.info("killed %d processes that runs had left behind", killed)
            except Exception:
                _log.exception("what runs have left behind cannot be looked for")
            for run_id in run_ids:
                self._on_swept(run_id)
        self._task = None


def _look(wanted: Sequence[tuple[str, int | None]]) -> list[list[psutil.Process]]:
    """What lives of several runs, in their order."""
    of_run: dict[str, list[psutil.Process]] = {run_id: [] for run_id, _ in wanted}
    children: dict[int, list[psutil.Process]] = {}
    everything: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            everything[process.pid] = process
            children.setdefault(process.ppid(), []).append(process)
            run_id = process.environ().get(RUN_ID_VARIABLE, "")
            if run_id in of_run:
                of_run[run_id].append(process)
    found = []
    for run_id, root_pid in wanted:
        members = {process.pid: process for process in of_run[run_id]}
        below = [everything[root_pid]] if root_pid is not None and root_pid in everything else []
        while below:
            process = below.pop()
            members[process.pid] = process
            below += children.get(process.pid, [])
        found.append([process for process in members.values() if lives(process)])
    return found


async def until_ended(process: psutil.Process) -> None:
    """Returns once it has ended."""
    while True:
        if not lives(process):
            return
        await asyncio.sleep(_LOOK_S)


def find_runs(run_ids: set[str]) -> list[psutil.Process]:
    """The living processes of these runs, by their id. Reads every environment, so it belongs into a thread."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(RUN_ID_VARIABLE) in run_ids and lives(process):
                found.append(process)
    return found


def kill_runs(run_ids: set[str]) -> int:
    """Kills what is left of runs that have ended, or whose agent died; the number of processes. Blocks."""
    killed = 0
    while members := find_runs(run_ids):
        killed += len(members)
        each(members, "kill")
        _await_end(members, 2.0)
        if killed > 10_000:  # Something respawns faster than it can be killed.
            break
    return killed


def _await_end(processes: list[psutil.Process], timeout_s: float) -> None:
    """Blocks until all have ended. A zombie has ended: where nobody reaps orphans, as in many containers, it stays."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s and any(lives(process) for process in processes):
        time.sleep(0.02)


def lives(process: psutil.Process) -> bool:
    """False for what has ended, and nobody has reaped, too."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def each(processes: Iterable[psutil.Process], action: str) -> None:
    """Does something to each that is still there."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            getattr(process, action)()
