"""Our side of the cron benchmark: three masters, three workers, default settings, and a sink that the runs write to.

A run is `/bin/sh -c 'exec date "+$LAUNCH_TOKEN %s%N" >> SINK'`: the cheapest process that tells by itself when it began
and with which token. So the figures are not the history's own, but those of the runs.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import psutil

from coordinator.api.v1 import types_pb2
from coordinator.client import ClusterClient
from coordinator.config import ClusterConfig
from tools.bench_lib.cron_runs import NS_PER_MS, Run, parse_ours
from tools.lib.local_cluster import LocalCluster, NotSoInTime, wait_until

MASTERS, WORKERS = 3, 3
BATCH = 500
READY_TIMEOUT_S = 60.0
DECISION_LAG_S = 2.0
"""Jobs that were applied launch everything from the next second on; this is for the first owners to be known."""


def job_id(number: int) -> str:
    """Ids of the jobs."""
    return f"job-{number}"


def spec(number: int, command: list[str], jitter_s: float) -> types_pb2.CronJobSpec:
    """A job of every second, whose runs may overlap: one that starts late after a kill does not skip the next."""
    return types_pb2.CronJobSpec(
        id=job_id(number),
        schedule="* * * * * *",
        time_zone="UTC",
        priority_class=4,
        command=command,
        timeout_s=30.0,
        overlap=types_pb2.OVERLAP_POLICY_ALLOW,
        overlap_limit=50,
        catch_up=types_pb2.CATCH_UP_POLICY_NONE,
        start_deadline_s=60.0,
        retry=types_pb2.RETRY_POLICY_ON_LOST,
        attempts_max=3,
        retry_backoff_s=1.0,
        retry_backoff_s_max=60.0,
        jitter_s=jitter_s,
    )


class OurCron:
    """A cluster with jobs."""

    def __init__(self, directory: Path, change: Callable[[ClusterConfig], ClusterConfig] | None = None) -> None:
        self.sink = directory / "sink"
        self.cluster = LocalCluster(directory / "cluster", masters=MASTERS, workers=WORKERS, change=change)
        self._client: ClusterClient | None = None

    def __enter__(self) -> OurCron:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Runs end with their workers when these are asked to stop; else they would write on.
        self.cluster.stop(self.cluster.worker_ids)
        self.cluster.close()

    @property
    def client(self) -> ClusterClient:
        """Of all masters."""
        if self._client is None:
            self._client = self.cluster.client(timeout_s=30.0)
        return self._client

    def start(self) -> None:
        """Everything runs, and all shards are whole: what a new cluster does at first is not measured."""
        self.cluster.start()
        self.cluster.wait_ready(READY_TIMEOUT_S)

    def telling_command(self) -> list[str]:
        """A run that tells the sink."""
        date = shutil.which("date") or "/bin/date"
        return ["/bin/sh", "-c", f'exec {date} "+$LAUNCH_TOKEN %s%N" >> {self.sink}']

    def apply(self, specs: list[types_pb2.CronJobSpec]) -> None:
        """Makes the jobs."""
        for first in range(0, len(specs), BATCH):
            self.client.apply_jobs(specs[first : first + BATCH])

    def wait_running(self) -> None:
        """Waits until runs have told the sink."""
        wait_until(lambda: self.sink.exists() and self.sink.stat().st_size > 0, READY_TIMEOUT_S, "jobs run")
        time.sleep(DECISION_LAG_S)

    def forget(self, jobs: int) -> None:
        """Deletes the jobs, and empties the sink."""
        for number in range(jobs):
            self.client.delete_job(job_id(number))
        self.sink.unlink(missing_ok=True)

    def launches(self, job: str) -> list[types_pb2.Launch]:
        """What the history keeps of a job."""
        return list(self.client.list_launches(job_id=job, latest=10_000).launches)

    def runs(self, jobs: int) -> list[Run]:
        """What the runs told; due times are those of the history."""
        offsets = {}
        for number in range(jobs):
            launches = self.client.list_launches(job_id=job_id(number), latest=1).launches
            if launches:
                first = launches[0]
                offsets[first.job_id] = (first.due_unix_ms - first.scheduled_at_unix_ms) * NS_PER_MS
        return parse_ours(self.sink.read_text(), offsets)

    def wait_started(self, until_s: int, timeout_s: float) -> None:
        """Waits until what was due before `until_s` has ended, or was given up; no longer than `timeout_s`."""

        def is_over() -> bool:
            jobs = self.client.list_jobs().jobs
            status = self.client.list_launches(latest=10_000).launches
            is_decided = all(view.job.decided_until_unix_ms >= (until_s - 1) * 1_000 for view in jobs)
            return is_decided and all(
                launch.finished_unix_ms for launch in status if launch.scheduled_at_unix_ms < until_s * 1_000
            )

        with contextlib.suppress(NotSoInTime):
            wait_until(is_over, timeout_s, "every launch of the window has ended")

    def processor_s(self) -> dict[str, float]:
        """Processor time of each daemon that runs, without its children, since it started."""
        used = {}
        for daemon_id in (*self.cluster.master_ids, *self.cluster.worker_ids):
            process_id = self.cluster.process(daemon_id).process_id
            if process_id is not None:
                times = psutil.Process(process_id).cpu_times()
                used[daemon_id] = times.user + times.system
        return used

    def kill_leader(self) -> tuple[str, int, int]:
        """kill -9; the leader's id, and the times in ns right before the kill and once the process was gone."""
        leader = self.cluster.wait_leader()
        before_ns = time.time_ns()
        self.cluster.kill(leader)
        return leader, before_ns, time.time_ns()

    def bring_back(self, master_id: str) -> None:
        """Starts a master that was killed, and waits until it takes part."""
        self.cluster.start([master_id])
        self.cluster.wait_back(master_id)


def small(config: ClusterConfig) -> ClusterConfig:
    """As few shards as there can be, for workers that are played and hold none."""
    return replace(config, placement=replace(config.placement, shards=1, replicas=1))
