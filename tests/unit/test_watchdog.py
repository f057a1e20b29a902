"""What is left of an agent that was killed: its runs until the lease ends, and then nothing. Real processes."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from coordinator.model.clock import monotonic_s
from tests.unit.test_launcher import Desk, find_with_token, script
from worker_agent import run_watchdog, watchdog
from worker_agent.launch_command import token_of
from worker_agent.process import RunProcess
from worker_agent.run_finder import lives, until_ended
from worker_agent.run_watchdog import Told
from worker_agent.session_lease import NO_LEASE
from worker_agent.watchdog import Watchdog

WAIT_S = 20.0
LEASE_S = 3.0
GRACE_S = 0.3
SLEEPER = [sys.executable, "-S", "-c", "import os, time; os.write(1, b'up'); time.sleep(600)"]


@dataclass(frozen=True, slots=True)
class Host:
    """A process with a launcher in it, and what belongs to it."""

    process: asyncio.subprocess.Process
    run: psutil.Process
    child: psutil.Process
    watchdog: psutil.Process
    lease_end_s: float

    async def until_all_ended(self) -> float:
        """When the run with its child and the watchdog were gone."""
        async with asyncio.timeout(LEASE_S + WAIT_S):
            await asyncio.gather(*(until_ended(it) for it in (self.run, self.child)))
            ended_s = monotonic_s()
            await until_ended(self.watchdog)
        return ended_s


@asynccontextmanager
async def host(directory: Path, lease_s: float = LEASE_S, grace_s: float = GRACE_S) -> AsyncIterator[Host]:
    """One that runs, in a process group of its own; what it leaves in spite of all is killed."""
    command = [sys.executable, "-m", "tests.launcher_host", str(directory), str(lease_s), str(grace_s)]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True)
    assert process.stdout is not None
    said = (await asyncio.wait_for(process.stdout.readline(), WAIT_S)).split()
    numbers = [psutil.Process(int(number)) for number in said[:3]]
    try:
        yield Host(process, numbers[0], numbers[1], numbers[2], float(said[3]))
    finally:
        for left in numbers:
            if left.is_running():
                left.kill()
        if process.returncode is None:
            process.kill()
        await process.wait()


posix_only = pytest.mark.skipif(os.name != "posix", reason="process groups")


@posix_only
@pytest.mark.parametrize("is_group_killed", [False, True])
async def test_runs_of_a_killed_agent_end_with_its_lease(tmp_path: Path, is_group_killed: bool) -> None:
    """After kill -9, of the agent or of its group, the run with its child goes on to the lease's end, not beyond."""
    async with host(tmp_path) as it:
        if is_group_killed:
            os.killpg(it.process.pid, signal.SIGKILL)
        else:
            it.process.kill()
        ended_s = await it.until_all_ended()
    assert it.lease_end_s < ended_s < it.lease_end_s + GRACE_S + WAIT_S


async def test_without_a_lease_the_runs_of_a_killed_agent_end_at_once(tmp_path: Path) -> None:
    """An agent whose lease is over, or was given back, leaves nothing to wait for."""
    async with host(tmp_path, lease_s=-math.inf, grace_s=0.0) as it:
        it.process.kill()
        await it.until_all_ended()


async def test_an_agent_that_stops_leaves_no_watchdog(tmp_path: Path) -> None:
    """After the goodbye the watchdog ends at once, whatever is left of the lease."""
    async with host(tmp_path, lease_s=60.0) as it:
        assert it.process.stdin is not None
        it.process.stdin.write(b"\n")
        await asyncio.wait_for(it.process.wait(), WAIT_S)
        assert not await asyncio.to_thread(_any_lives, it)


def _any_lives(it: Host) -> bool:
    return any(lives(left) for left in (it.run, it.child, it.watchdog))


async def test_the_next_agent_ends_the_runs_itself(tmp_path: Path) -> None:
    """An agent that is back within the lease kills what the former left; its own runs are not the old watchdog's."""
    async with host(tmp_path) as it:
        it.process.kill()
        await it.process.wait()
        desk = Desk(tmp_path)
        await desk.launcher.start()
        assert not lives(it.run)
        assert monotonic_s() < it.lease_end_s, "the machine is too slow for this test"
        order = script("import time; time.sleep(600)", at=1)
        await desk.launcher.launch(order)
        await desk.running(order)
        async with asyncio.timeout(LEASE_S + WAIT_S):
            await until_ended(it.watchdog)
        assert len(await asyncio.to_thread(find_with_token, token_of(order.launch))) == 1
        await desk.launcher.stop(0.0)


class _Printed:
    """Knows when something was printed."""

    def __init__(self) -> None:
        self.seen = asyncio.Event()

    def feed(self, data: bytes) -> None:
        self.seen.set()


async def test_a_watchdog_that_dies_is_replaced_and_the_next_one_knows_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was told to one that was killed is told to the next, which acts on it when the agent is gone."""
    monkeypatch.setattr(watchdog, "RESTART_S", 0.0)
    guard = Watchdog(0.0)
    guard.start()
    first = await _other_than(guard, None)
    guard.set_lease_end(NO_LEASE)
    guard.begin("of-the-first")
    guard.begin("ended")
    guard.end("ended")
    psutil.Process(first).kill()
    await _other_than(guard, first)
    runs = {}
    for run_id in ("of-the-first", "ended", "of-the-second"):
        printed = _Printed()
        runs[run_id] = await RunProcess.start(SLEEPER, dict(os.environ), run_id, printed)
        await asyncio.wait_for(printed.seen.wait(), WAIT_S)
    guard.begin("of-the-second")
    await guard.stop()
    statuses = [await asyncio.wait_for(runs[name].wait(), WAIT_S) for name in ("of-the-first", "of-the-second")]
    assert statuses == [-signal.SIGTERM, -signal.SIGTERM] or os.name != "posix"
    assert await runs["ended"].stop(0.0) != 0


async def _other_than(guard: Watchdog, process_id: int | None) -> int:
    """Waits until it has a process, and another one than that."""
    async with asyncio.timeout(WAIT_S):
        while guard.process_id in (None, process_id):  # noqa: ASYNC110 - the agent itself never waits for it.
            await asyncio.sleep(0.01)
    assert guard.process_id is not None
    return guard.process_id


def test_what_the_watchdog_is_told() -> None:
    """The latest lease counts; a line that was cut short by the end of the agent says nothing."""
    reader, writer = os.pipe()
    os.write(writer, b"lease -inf\nbegin a\nbegin b\nend a\nlease 12.5\nend c\nbye")
    os.close(writer)
    told = run_watchdog.listen(reader, 0.0)
    os.close(reader)
    assert (told.runs, told.lease_until_s, told.is_goodbye) == ({"b"}, 12.5, False)
    told.take(b"bye")
    assert told.is_goodbye


def test_when_an_agent_is_taken_to_stand_still() -> None:
    """A little after the end of a lease under which something runs, once for each lease; never without one."""
    told = Told()
    told.take(b"lease 100.0")
    assert told.hung_in_s(99.0, 0.5) == math.inf, "nothing runs"
    told.take(b"begin a")
    assert told.hung_in_s(99.0, 0.5) == 1.5
    told.acted()
    assert told.hung_in_s(200.0, 0.5) == math.inf, "it was acted on"
    told.take(b"lease 300.0")
    assert told.hung_in_s(299.0, 0.5) == 1.5
    told.take(b"lease -inf")
    assert told.hung_in_s(400.0, 0.5) == math.inf, "it was given back"


@posix_only
async def test_runs_of_an_agent_that_stands_still_end_with_its_lease(tmp_path: Path) -> None:
    """SIGSTOP, not kill -9: the run with its child ends all the same, before the leader gives it to others."""
    async with host(tmp_path) as it:
        os.kill(it.process.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(LEASE_S + WAIT_S):
                await asyncio.gather(*(until_ended(each) for each in (it.run, it.child)))
            assert monotonic_s() > it.lease_end_s
            assert lives(it.watchdog), "the agent may go on"
        finally:
            os.kill(it.process.pid, signal.SIGCONT)
