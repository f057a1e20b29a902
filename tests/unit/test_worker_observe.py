"""How a worker shows itself: figures from readings, the health document, the metrics, and the files it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from coordinator.api.v1 import session_pb2
from coordinator.model import Monotonic, WallMs
from worker_agent.files import read_if_there, write_durably
from worker_agent.metrics import Counters, figures, read_counters
from worker_agent.observe import View, health_document, make_registry
from worker_agent.session_interface import Phase
from worker_agent.shard_interface import ReplicaRole as Role

VIEW = View(
    worker_id="w1",
    zone="z1",
    version="0.1.0",
    phase=Phase.OPEN,
    leader_id="m1",
    lease_left_s=8.5,
    sessions_opened=2,
    generation=77,
    metrics=session_pb2.NodeMetrics(cpu_percent=45.24, memory_percent=62.1, disk_percent=34.5, open_streams=12),
    queue_depth=3,
    output_bytes=4_096,
    reports_pending=1,
    jobs_owned=("loop_01", "loop_02"),
    jobs_backed=("loop_03",),
    jobs_failing=frozenset({"loop_02", "loop_99"}),
    replicas_by_role={Role.PRIMARY: 4},
    launches_by_end={"failed": 1, "succeeded": 9},
)


def test_the_health_document_has_the_form_of_the_specification() -> None:
    """Every field of SPECIFICATION.md 4.3 is there, with the worker's own services."""
    assert health_document(VIEW, WallMs(1_705_314_600_999)) == (
        200,
        {
            "status": "healthy",
            "instance_id": "w1",
            "timestamp": "2024-01-15T10:30:00Z",
            "metrics": {
                "cpu_percent": 45.2,
                "memory_percent": 62.1,
                "disk_percent": 34.5,
                "active_connections": 12,
                "queue_depth": 3,
            },
            "services": {"masters": "connected", "lease": "held", "storage": "ready"},
            "loops": {"running": 2, "healthy": 1},
        },
    )


@pytest.mark.parametrize(
    ("view", "status", "word"),
    [
        (VIEW, 200, "healthy"),
        (replace(VIEW, phase=Phase.DIALING), 200, "degraded"),
        (replace(VIEW, lease_left_s=-1.0), 200, "degraded"),
        (replace(VIEW, phase=Phase.WAITING, lease_left_s=float("-inf")), 200, "degraded"),
        (replace(VIEW, storage_problem="the disk is full"), 503, "unhealthy"),
        (replace(VIEW, is_stopping=True), 503, "unhealthy"),
    ],
)
def test_the_status_follows_the_table(view: View, status: int, word: str) -> None:
    """Each row of the table in observe.py."""
    got, document = health_document(view, WallMs(0))
    assert (got, document["status"]) == (status, word)


def test_metrics_are_made_of_the_view() -> None:
    """What the view says is what Prometheus reads; a lease that does not hold is 0 and not negative."""
    text = generate_latest(make_registry(lambda: replace(VIEW, lease_left_s=float("-inf")))).decode()
    for line in (
        'coordinator_worker_build_info{id="w1",version="0.1.0",zone="z1"} 1.0',
        "coordinator_worker_session_open 1.0",
        "coordinator_worker_sessions_opened_total 2.0",
        "coordinator_worker_lease_left_seconds 0.0",
        "coordinator_worker_assignment_generation 77.0",
        'coordinator_worker_replicas{role="primary"} 4.0',
        'coordinator_worker_replicas{role="joining"} 0.0',
        'coordinator_worker_jobs{rank="owner"} 2.0',
        'coordinator_worker_launches_total{state="failed"} 1.0',
        "coordinator_worker_launches_waiting 3.0",
        "coordinator_worker_launch_output_bytes 4096.0",
    ):
        assert line in text.splitlines()


def test_rates_come_from_two_readings() -> None:
    """Bytes per second are the difference over the monotonic time between; processor use is busy over all."""
    before = Counters(Monotonic(10.0), cpu_busy_s=5.0, cpu_total_s=100.0, network_received_bytes=1_000)
    after = Counters(
        Monotonic(12.0),
        cpu_busy_s=6.0,
        cpu_total_s=104.0,
        memory_percent=50.0,
        network_received_bytes=5_000,
        disk_written_bytes=2_000,
        resident_memory_bytes=123,
    )
    made = figures(before, after)
    assert (made.cpu_percent, made.memory_percent, made.resident_memory_bytes) == (25.0, 50.0, 123)
    assert (made.network_received_bytes_per_s, made.disk_write_bytes_per_s) == (2_000.0, 1_000.0)


def test_rates_are_never_negative_nor_divided_by_nothing() -> None:
    """A counter that started over, or two readings at one time, give 0."""
    high = Counters(Monotonic(10.0), cpu_busy_s=9.0, cpu_total_s=9.0, network_sent_bytes=10_000)
    assert figures(high, Counters(Monotonic(11.0))).network_sent_bytes_per_s == 0.0
    assert figures(high, high).network_sent_bytes_per_s == 0.0
    assert figures(high, Counters(Monotonic(11.0))).cpu_percent == 0.0


def test_this_machine_can_be_read(tmp_path: Path) -> None:
    """A real reading has plausible values, and a directory that is not there gives 0 for its disk."""
    counters = read_counters(Monotonic(1.0), tmp_path)
    assert 0 < counters.memory_percent <= 100
    assert 0 < counters.cpu_busy_s < counters.cpu_total_s
    assert counters.resident_memory_bytes > 1 << 20
    assert read_counters(Monotonic(1.0), tmp_path / "missing").disk_percent == 0.0


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """A write leaves the new content and nothing else; a file that is not there reads as None."""
    path = tmp_path / "assignment.bin"
    assert read_if_there(path) is None
    write_durably(path, b"one")
    write_durably(path, b"two")
    assert read_if_there(path) == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["assignment.bin"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    """When the new content cannot be written the old one is still there."""
    path = tmp_path / "assignment.bin"
    write_durably(path, b"one")
    (tmp_path / "assignment.bin.new").mkdir()
    with pytest.raises(OSError, match=r"assignment\.bin\.new"):
        write_durably(path, b"two")
    assert read_if_there(path) == b"one"
