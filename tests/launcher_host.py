"""A process with a launcher in it, to be killed: `python -m tests.launcher_host DIRECTORY LEASE_S GRACE_S`.

It takes one order, whose run leaves a child, then says on one line `RUN CHILD WATCHDOG LEASE_END`: three process
numbers, and when its lease ends. A line on standard input has it stop cleanly.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from coordinator.api.v1 import session_pb2, types_pb2
from coordinator.config import WorkerSettings
from coordinator.model import Monotonic, SystemClock
from worker_agent.launch_output import LaunchKey
from worker_agent.launcher import Launcher

KEY = LaunchKey("tick", 1_767_268_800_000, 1)
TREE = r"""
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'], start_new_session=True)
os.write(1, b'%d %d\n' % (os.getpid(), child.pid))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True: time.sleep(1)
"""
"""The child is in a session of its own, and the first process does not end when it is asked."""


def order() -> session_pb2.LaunchOrder:
    """The order for it."""
    return session_pb2.LaunchOrder(
        launch=types_pb2.Launch(job_id=KEY.job_id, scheduled_at_unix_ms=KEY.scheduled_at_ms, attempt=KEY.attempt),
        spec=types_pb2.CronJobSpec(id=KEY.job_id, command=[sys.executable, "-S", "-c", TREE], timeout_s=600.0),
    )


async def main(directory: Path, lease_s: float, grace_s: float) -> None:
    """Runs until a line comes."""
    clock = SystemClock()
    launcher = Launcher(directory, WorkerSettings(id="w1"), "w1", clock, lambda report: None, lease_grace_s=grace_s)
    await launcher.start()
    lease_end = Monotonic(clock.monotonic() + lease_s)
    # As the agent does it: again and again, and the latest counts.
    launcher.set_lease_end(clock.monotonic())
    launcher.set_lease_end(lease_end)
    await launcher.launch(order())
    async for piece in launcher.outputs.read(KEY, 0, follow=True):
        process_id = launcher.watchdog.process_id
        sys.stdout.write(f"{piece.data.decode().strip()} {process_id} {lease_end!r}\n")
        sys.stdout.flush()
        break
    await asyncio.to_thread(sys.stdin.readline)
    await launcher.stop(0.0)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
