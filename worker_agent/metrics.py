"""What the worker measures of itself and of its machine.

`read_counters` asks the operating system (psutil); `figures` is pure and makes rates from two readings.
Reading may wait for a disk that hangs, so the agent reads in a thread; processor use is computed here from
the times, because psutil's own `cpu_percent` remembers its last call per thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from coordinator.api.v1 import session_pb2
from coordinator.model import Monotonic

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Counters:
    """One reading. Counters only grow; a platform that lacks one gives 0."""

    at: Monotonic
    cpu_busy_s: float = 0.0
    """Processor time spent on work since the machine started, all processors together."""
    cpu_total_s: float = 0.0
    memory_percent: float = 0.0
    disk_percent: float = 0.0
    network_received_bytes: int = 0
    network_sent_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
    resident_memory_bytes: int = 0


def read_counters(now: Monotonic, directory: Path) -> Counters:
    """Reads them; `directory` is on the file system whose use is wanted. Never raises for a missing counter."""
    times = _value(psutil.cpu_times, None)
    network = _value(psutil.net_io_counters, None)
    disk = _value(psutil.disk_io_counters, None)
    total_s = 0.0 if times is None else sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    idle_s = 0.0 if times is None else times.idle + getattr(times, "iowait", 0.0)
    return Counters(
        at=now,
        cpu_busy_s=total_s - idle_s,
        cpu_total_s=total_s,
        memory_percent=_value(lambda: float(psutil.virtual_memory().percent), 0.0),
        disk_percent=_value(lambda: float(psutil.disk_usage(str(directory)).percent), 0.0),
        network_received_bytes=0 if network is None else network.bytes_recv,
        network_sent_bytes=0 if network is None else network.bytes_sent,
        disk_read_bytes=0 if disk is None else disk.read_bytes,
        disk_written_bytes=0 if disk is None else disk.write_bytes,
        resident_memory_bytes=_value(lambda: int(psutil.Process().memory_info().rss), 0),
    )


def figures(before: Counters, after: Counters) -> session_pb2.NodeMetrics:
    """The figures of the time between two readings; rates are 0 when no time passed or a counter started over."""
    seconds = after.at - before.at

    def rate(old: int, new: int) -> float:
        return max(0.0, (new - old) / seconds) if seconds > 0 else 0.0

    cpu_total_s = after.cpu_total_s - before.cpu_total_s
    cpu_busy_s = after.cpu_busy_s - before.cpu_busy_s
    return session_pb2.NodeMetrics(
        cpu_percent=min(100.0, max(0.0, 100.0 * cpu_busy_s / cpu_total_s)) if cpu_total_s > 0 else 0.0,
        memory_percent=after.memory_percent,
        disk_percent=after.disk_percent,
        network_received_bytes_per_s=rate(before.network_received_bytes, after.network_received_bytes),
        network_sent_bytes_per_s=rate(before.network_sent_bytes, after.network_sent_bytes),
        disk_read_bytes_per_s=rate(before.disk_read_bytes, after.disk_read_bytes),
        disk_write_bytes_per_s=rate(before.disk_written_bytes, after.disk_written_bytes),
        resident_memory_bytes=after.resident_memory_bytes,
    )


def _value(read: Callable[[], Value], otherwise: Value) -> Value:
    """What `read` gives, or `otherwise` where this platform or this container does not tell."""
    try:
        return read()
    except (OSError, RuntimeError, NotImplementedError, AttributeError, ValueError, psutil.Error):
        return otherwise
