"""How the worker shows itself: `/health` (SPECIFICATION.md 4.3) and `/metrics`, both made of one `View`.

    status      when                                                                          HTTP
    healthy     a session is open and its lease holds                                          200
    degraded    the worker works on by itself: no session, or no lease (DESIGN.md section 5)   200
    unhealthy   the worker stops, or it cannot write what it must remember                     503

Consul asks `/health`. A worker without a leader stays "passing" there: that no master can be reached is not
the worker's fault, and a worker that has just started must be seen before the masters admit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from coordinator.api.v1 import session_pb2
from coordinator.model import WallMs
from worker_agent.session_interface import Phase
from worker_agent.shard_interface import ReplicaRole
from worker_agent.store_care import ScrubTally

PREFIX = "coordinator_worker_"


@dataclass(frozen=True, slots=True)
class View:
    """What the worker knows of itself at one moment."""

    worker_id: str
    zone: str
    version: str
    phase: Phase
    leader_id: str
    lease_left_s: float
    """Seconds until the session lease ends; 0 or less when it does not hold."""
    sessions_opened: int
    generation: int
    metrics: session_pb2.NodeMetrics
    queue_depth: int
    """Launch orders that were taken and have no process yet."""
    output_bytes: int
    """Bytes of what runs printed that are kept."""
    reports_pending: int
    """Launch reports without a receipt."""
    jobs_owned: tuple[str, ...]
    jobs_backed: tuple[str, ...]
    jobs_failing: frozenset[str]
    """Jobs whose latest launch on this worker did not succeed."""
    replicas_by_role: Mapping[ReplicaRole, int] = field(default_factory=dict)
    shards_by_state: Mapping[str, int] = field(default_factory=dict)
    """Shards held, by what their replica is doing (replica.py)."""
    launches_by_end: Mapping[str, int] = field(default_factory=dict)
    """Launches that ended here, by the lower-case name of how."""
    scrub: ScrubTally = field(default_factory=ScrubTally)
    scrub_age_s: float = 0.0
    """Seconds since the last round of the scrub ended, or since the start."""
    damaged_shards: int = 0
    """Last copies that are damaged, and served but for that."""
    storage_problem: str = ""
    is_stopping: bool = False

    @property
    def is_connected(self) -> bool:
        """True while a session is open."""
        return self.phase is Phase.OPEN

    @property
    def status(self) -> str:
        """The first column of the table above."""
        if self.is_stopping or self.storage_problem:
            return "unhealthy"
        is_whole = self.is_connected and self.lease_left_s > 0 and not self.metrics.unwritable_shards
        return "healthy" if is_whole else "degraded"

    @property
    def storage(self) -> str:
        """What the storage is like, for people."""
        count = self.metrics.unwritable_shards
        return self.storage_problem or (f"{count} shards take no writes; is the disk full?" if count else "ready")


def health_document(view: View, now: WallMs) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the document of `/health`."""
    status = view.status
    owned = view.jobs_owned
    document = {
        "status": status,
        "instance_id": view.worker_id,
        "timestamp": datetime.fromtimestamp(now / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "metrics": {
            "cpu_percent": round(view.metrics.cpu_percent, 1),
            "memory_percent": round(view.metrics.memory_percent, 1),
            "disk_percent": round(view.metrics.disk_percent, 1),
            "active_connections": view.metrics.open_streams,
            "queue_depth": view.queue_depth,
        },
        "services": {
            "masters": "connected" if view.is_connected else "connecting",
            "lease": "held" if view.lease_left_s > 0 else "none",
            "storage": view.storage,
        },
        "loops": {"running": len(owned), "healthy": sum(job not in view.jobs_failing for job in owned)},
    }
    return 503 if status == "unhealthy" else 200, document


class WorkerCollector(Collector):
    """Makes the metrics of `/metrics` from a View when they are asked for. worker_agent/README.md lists them."""

    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        view = self._view()
        yield _info("build", "Which worker this is.", id=view.worker_id, zone=view.zone, version=view.version)
        yield _gauge("session_open", "1 while a session with the leader is open.", view.is_connected)
        yield _gauge("lease_left_seconds", "Seconds until the session lease ends, 0 without one.", view.lease_left_s)
        yield _counter("sessions_opened", "Sessions opened since the start.", view.sessions_opened)
        yield _gauge("assignment_generation", "Raft index of the assignment in force.", view.generation)
        replicas = GaugeMetricFamily(PREFIX + "replicas", "Shards held, by role.", labels=("role",))
        for role in ReplicaRole:
            replicas.add_metric((role.name.lower(),), view.replicas_by_role.get(role, 0))
        yield replicas
        shards = GaugeMetricFamily(PREFIX + "shards", "Shards held, by what their replica does.", labels=("state",))
        for state, count in sorted(view.shards_by_state.items()):
            shards.add_metric((state,), count)
        yield shards
        jobs = GaugeMetricFamily(PREFIX + "jobs", "Cron jobs, by rank.", labels=("rank",))
        jobs.add_metric(("owner",), len(view.jobs_owned))
        jobs.add_metric(("backup",), len(view.jobs_backed))
        yield jobs
        launches = CounterMetricFamily(PREFIX + "launches", "Launches, by their end.", labels=("state",))
        for state, count in sorted(view.launches_by_end.items()):
            launches.add_metric((state,), count)
        yield launches
        yield _gauge("unwritable_shards", "Shards whose stores take no writes.", view.metrics.unwritable_shards)
        yield _counter("scrub_rounds", "Times that all on disk was checked, since the start.", view.scrub.rounds)
        yield _gauge("scrub_age_seconds", "Seconds since the last round ended, or the start.", view.scrub_age_s)
        yield _counter("scrub_bytes", "Bytes of rows and records that were checked.", view.scrub.bytes)
        yield _counter("damaged_copies_found", "Copies of shards that were found damaged.", view.scrub.found)
        yield _counter("damaged_copies_mended", "Copies that were damaged and are whole again.", view.scrub.mended)
        yield _gauge("damaged_shards", "Last copies that are damaged, and served but for that.", view.damaged_shards)
        yield _gauge("launches_running", "Launches that run now.", view.metrics.running_launches)
        yield _gauge("launches_waiting", "Launch orders that were taken and have no process yet.", view.queue_depth)
        yield _gauge("launch_output_bytes", "Bytes of what runs printed that are kept.", view.output_bytes)
        yield _gauge("launch_reports_pending", "Launch reports without a receipt.", view.reports_pending)
        yield _gauge("open_streams", "gRPC calls and streams that are open.", view.metrics.open_streams)
        yield _gauge("storage_ready", "1 while the worker can write what it must remember.", not view.storage_problem)
        yield from _machine_metrics(view.metrics)


def _machine_metrics(metrics: session_pb2.NodeMetrics) -> Iterator[Metric]:
    yield _gauge("cpu_percent", "Processor use of the machine.", metrics.cpu_percent)
    yield _gauge("memory_percent", "Memory use of the machine.", metrics.memory_percent)
    yield _gauge("disk_percent", "Use of the data directory's file system.", metrics.disk_percent)
    yield _gauge("resident_memory_bytes", "Resident memory of this process.", metrics.resident_memory_bytes)
    yield _gauge("network_received_bytes_per_second", "All interfaces.", metrics.network_received_bytes_per_s)
    yield _gauge("network_sent_bytes_per_second", "All interfaces.", metrics.network_sent_bytes_per_s)
    yield _gauge("disk_read_bytes_per_second", "All disks.", metrics.disk_read_bytes_per_s)
    yield _gauge("disk_written_bytes_per_second", "All disks.", metrics.disk_write_bytes_per_s)


def make_registry(view: Callable[[], View]) -> CollectorRegistry:
    """A registry of this worker's metrics alone, so that two workers of one process do not mix."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(WorkerCollector(view))
    return registry


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, meaning, value=max(0.0, float(value)))


def _counter(name: str, meaning: str, value: int) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, meaning, value=value)


def _info(name: str, meaning: str, **labels: str) -> InfoMetricFamily:
    return InfoMetricFamily(PREFIX + name, meaning, value=labels)
