"""APScheduler as a peer: its asyncio scheduler with its memory, in one process of its own, jobs of coroutines.

With the cron trigger every job is due at second zero; to spread them its own `jitter` is used, which is another amount
each time, and which counts as the due time. With the interval trigger each job has a start of its own.
"""

from __future__ import annotations

import asyncio
import datetime
import subprocess
import sys
import time
from pathlib import Path

from apscheduler.events import EVENT_JOB_EXECUTED, JobExecutionEvent
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from tools.bench_lib.cron_runs import NS_PER_S, Run, parse_timed

ROOT = Path(__file__).resolve().parents[2]
SETTLE_S = 2.0
ENDING_S = 2.0


def measure(trigger: str, start: str, jobs: int, seconds: float) -> list[Run]:
    """The runs of that many jobs of every second; starting takes some seconds more."""
    module = [sys.executable, "-m", "tools.bench_lib.cron_apscheduler"]
    done = subprocess.run(
        [*module, trigger, start, str(jobs), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=seconds * 3 + 60.0,
    )
    return parse_timed(done.stdout)


class Scheduled:
    """The scheduler and what its jobs did."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._started_ns: dict[str, int] = {}
        self._scheduler = AsyncIOScheduler(timezone=datetime.UTC)
        self._scheduler.add_listener(self._on_executed, EVENT_JOB_EXECUTED)

    async def _run(self, job: str) -> None:
        self._started_ns[job] = time.time_ns()

    def _on_executed(self, event: JobExecutionEvent) -> None:
        # The job itself is not told which of its times this is.
        due_ns = round(event.scheduled_run_time.timestamp() * 1_000_000) * 1_000
        self.lines.append(f"{event.job_id} {due_ns} {self._started_ns[event.job_id]}")

    async def run(self, trigger: str, start: str, jobs: int, seconds: float) -> None:
        """Until the time is over."""
        begin_s = float(int(time.time()) + 1)
        for number in range(jobs):
            job = f"job-{number}"
            offset_s = number / jobs if start == "spread" else 0.0
            made: CronTrigger | IntervalTrigger
            if trigger == "cron":
                jitter_s = 0.999 if start == "spread" else None
                made = CronTrigger(second="*", jitter=jitter_s, timezone=datetime.UTC)
            else:
                first = datetime.datetime.fromtimestamp(begin_s + offset_s, datetime.UTC)
                made = IntervalTrigger(seconds=1, start_date=first, timezone=datetime.UTC)
            self._scheduler.add_job(self._run, made, args=[job], id=job)
        self._scheduler.start()
        await asyncio.sleep(SETTLE_S + seconds + ENDING_S)
        self._scheduler.pause()
        await asyncio.sleep(ENDING_S / 10)  # A shutdown would complain of what runs.
        self._scheduler.shutdown(wait=False)


def window_of(runs: list[Run], seconds: int) -> tuple[int, int]:
    """The seconds that are looked at: whole ones, once all have started."""
    from_s = min((run.start_ns for run in runs), default=0) // NS_PER_S + 2
    return from_s, from_s + seconds


def main(arguments: list[str]) -> int:
    """`cron|interval spread|burst JOBS SECONDS`."""
    trigger, start, jobs, seconds = arguments
    scheduled = Scheduled()
    asyncio.run(scheduled.run(trigger, start, int(jobs), float(seconds)))
    sys.stdout.write("\n".join(scheduled.lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
