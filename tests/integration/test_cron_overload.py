"""More launches than the workers have slots for: what cannot start is given up or started late, never started twice."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.api.v1 import types_pb2
from coordinator.client import AsyncClusterClient
from coordinator.config import ClusterConfig
from tests.cron_chaos import command, read_sink
from tools.lib.local_cluster import LocalCluster

JOBS = 40
LOAD_S = 12.0

log = logging.getLogger(__name__)
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the jobs are of the shell")


def one_slot(config: ClusterConfig) -> ClusterConfig:
    """Workers that run one launch at a time; attempts go on soon."""
    return replace(
        config,
        worker=replace(config.worker, launches_max=1),
        workers=tuple(replace(worker, launches_max=1) for worker in config.workers),
        placement=replace(config.placement, shards=8),
        cron=replace(config.cron, order_timeout_s=2.0, launches_kept=1_000),
    )


@pytest.mark.campaign  # What it shows holds while no process stands still for half of order_timeout_s.
@pytest.mark.timeout(120)
async def test_an_attempt_that_is_followed_never_started(tmp_path: Path) -> None:
    """Three times more work than slots: no attempt starts of a launch whose earlier attempt had begun to run."""
    sink = tmp_path / "sink"
    specs = [
        types_pb2.CronJobSpec(
            id=f"job-{number}",
            schedule="* * * * * *",
            time_zone="UTC",
            priority_class=4,
            command=command(str(sink), "sleep 0.1"),
            timeout_s=20.0,
            overlap=types_pb2.OVERLAP_POLICY_ALLOW,
            overlap_limit=100,
            catch_up=types_pb2.CATCH_UP_POLICY_NONE,
            start_deadline_s=60.0,
            retry=types_pb2.RETRY_POLICY_ON_LOST,
            attempts_max=5,
            retry_backoff_s=0.2,
            retry_backoff_s_max=1.0,
        )
        for number in range(JOBS)
    ]
    with LocalCluster(tmp_path / "cluster", masters=3, workers=2, change=one_slot) as cluster:
        cluster.start()
        await asyncio.to_thread(cluster.wait_ready)
        addresses = [master.grpc_address for master in cluster.config.masters]
        async with AsyncClusterClient(addresses, credentials=cluster.credentials(), timeout_s=20.0) as client:
            await client.apply_jobs(specs)
            await asyncio.sleep(LOAD_S)
            seen = read_sink(sink.read_text())
        # Asked to stop, workers end their runs; killed ones would leave them to write on.
        await asyncio.to_thread(cluster.stop, cluster.worker_ids)
        cluster.raise_if_dead()
    again = {time: begun for time, begun in seen.begun.items() if len(begun) > 1}
    log.info("%d launches began, %d of them again", len(seen.begun), len(again))
    assert seen.problems == []
    assert again == {}
    assert len(seen.begun) > LOAD_S
