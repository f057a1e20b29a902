"""What operators change while the cluster runs, and the lines of the cluster's story."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.model.clock import WallMs


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Settings that are part of the replicated state. Fields as in `Settings` of types.proto."""

    replicas: int = 2
    rebalance_paused: bool = False
    cron_paused: bool = False
    launches_kept: int = 200
    launches_kept_s: float = 7_776_000.0
    copy_bytes_per_s: int = 0


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One line of the cluster's story. Fields as in `Event` of types.proto."""

    sequence: int
    index: int
    at_ms: WallMs
    kind: str
    subject: str
    message: str
    cause: str = ""
