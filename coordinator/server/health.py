"""What a master answers at `/health`: the document of SPECIFICATION.md 4.3, and where the master stands.

Pure but for `read_machine`, which asks psutil.

A master is healthy while it knows a leader, itself or another; so one that is cut off shows as critical in Consul.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from coordinator import __version__
from coordinator.machine.state import State
from coordinator.model import LaunchState, WallMs
from coordinator.raft import RaftStatus

_BAD_ENDS = (LaunchState.FAILED, LaunchState.TIMED_OUT, LaunchState.LOST, LaunchState.MISSED)


@dataclass(frozen=True, slots=True)
class MachineFigures:
    """How busy the machine is; each 0 to 100."""

    cpu_percent: float
    memory_percent: float
    disk_percent: float
    """Of the file system that has the master's files."""


def read_machine(directory: Path) -> MachineFigures:
    """Asks the system; the processor's figure is that of the time since the last call. A missing figure is 0."""
    try:
        disk_percent = float(psutil.disk_usage(str(directory)).percent)
    except OSError:
        disk_percent = 0.0
    return MachineFigures(psutil.cpu_percent(interval=None), float(psutil.virtual_memory().percent), disk_percent)


@dataclass(frozen=True, slots=True)
class View:
    """What the master knows of itself at one moment."""

    master_id: str
    cluster_name: str
    leader_id: str
    """Empty while nobody leads, as far as this master knows."""
    is_stopping: bool
    sessions: int
    """Workers with a session here; 0 unless this master leads."""
    masters: int
    """How many there are, itself among them."""
    discovery: str
    """The backend's name."""


def health_document(
    view: View, raft: RaftStatus, state: State, machine: MachineFigures, now: WallMs
) -> tuple[int, Mapping[str, Any]]:
    """The HTTP status and the document."""
    is_healthy = bool(view.leader_id) and not view.is_stopping
    owned = [job.id for job in state.jobs.values() if job.owner]
    document = {
        "status": "healthy" if is_healthy else "unhealthy",
        "instance_id": view.master_id,
        "timestamp": datetime.fromtimestamp(now / 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "metrics": {
            "cpu_percent": round(machine.cpu_percent, 1),
            "memory_percent": round(machine.memory_percent, 1),
            "disk_percent": round(machine.disk_percent, 1),
            "active_connections": view.sessions,
            # What is committed and waits for the state machine.
            "queue_depth": max(0, raft.commit_index - raft.applied_index),
        },
        "services": {
            "leader": "connected" if view.leader_id else "connecting",
            "peers": f"{len(raft.connected_peers)} of {view.masters - 1} connected",
            "discovery": view.discovery,
        },
        "loops": {"running": len(owned), "healthy": sum(not _is_failing(state, job_id) for job_id in owned)},
        "cluster": view.cluster_name,
        "version": __version__,
        "role": raft.role,
        "leader": view.leader_id,
        "term": raft.term,
        "commit_index": raft.commit_index,
        "applied_index": raft.applied_index,
    }
    return (200 if is_healthy else 503), document


def _is_failing(state: State, job_id: str) -> bool:
    """True when the latest launch of the job that has ended did not do its work."""
    for scheduled_at_ms in reversed(state.launch_times.get(job_id, ())):
        launch = state.launches[(job_id, scheduled_at_ms)]
        if launch.state.has_ended:
            return launch.state in _BAD_ENDS
    return False
