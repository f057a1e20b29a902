"""A real master that was away for longer than the log reaches back: it gets a snapshot, and is there all the time."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

from coordinator.client import STALE
from coordinator.config import ClusterConfig
from tests.chaos import job
from tools.lib.local_cluster import LocalCluster, wait_until

JOBS = 200
JOB_BYTES = 100_000
"""Together 20 MB of state, some 80 chunks."""
CHUNKS_MIN = 50
ANSWER_S_MAX = 1.0
"""A health check that takes longer counts as failed where masters are watched."""


def with_snapshots(config: ClusterConfig) -> ClusterConfig:
    """Snapshots come soon, and often enough to be needed."""
    return replace(config, raft=replace(config.raft, snapshot_entries=100))


def get(url: str) -> str:
    """What is answered, whatever the status."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return str(response.read(), "utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return str(error.read(), "utf-8")


def chunks_received(address: str) -> float:
    """Snapshot chunks that a master got."""
    lines = get(f"http://{address}/metrics").splitlines()
    wanted = 'coordinator_peer_messages_total{direction="received",type="install_snapshot"}'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(wanted))


class HealthWatch(threading.Thread):
    """Asks for /health again and again."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.took_s: list[float] = []
        self.unanswered = 0
        self.is_over = threading.Event()
        self._url = f"http://{address}/health"

    def run(self) -> None:
        while not self.is_over.wait(0.01):
            began_s = time.monotonic()
            try:
                get(self._url)
            except OSError:
                # Before its first answer the port is not open yet.
                self.unanswered += bool(self.took_s)
                continue
            self.took_s.append(time.monotonic() - began_s)


def test_health_is_answered_while_a_snapshot_is_installed(tmp_path: Path) -> None:
    """20 MB of state come in many chunks, are checked and put in place; meanwhile /health never takes long."""
    with LocalCluster(tmp_path, masters=3, workers=0, change=with_snapshots) as cluster:
        cluster.start()
        leader = cluster.wait_leader()
        away = next(one for one in cluster.master_ids if one != leader)
        cluster.kill(away)
        client = cluster.client()
        made = [f"job-{number}" for number in range(JOBS)]
        for job_id in made:
            client.apply_jobs([job(job_id, "x" * JOB_BYTES)])
        kept = tmp_path / "data" / leader / "snapshot.previous"
        wait_until(kept.exists, 20.0, "the log is cut behind two snapshots")

        address = next(one.http_address for one in cluster.config.masters if one.id == away)
        watch = HealthWatch(address)
        watch.start()
        cluster.start([away])
        alone = cluster.client([away])

        def has_last() -> bool:
            return len(alone.list_jobs(job_id=made[-1], consistency=STALE).jobs) == 1

        wait_until(lambda: watch.took_s, 30.0, "it answers")
        wait_until(lambda: chunks_received(address) >= CHUNKS_MIN, 30.0, "chunks come in")
        wait_until(has_last, 30.0, "it has the last job")
        watch.is_over.set()
        watch.join(30.0)
        assert not watch.is_alive()
        assert watch.unanswered == 0
        assert len(watch.took_s) > 10
        assert max(watch.took_s) < ANSWER_S_MAX, f"{max(watch.took_s):.2f} s"
