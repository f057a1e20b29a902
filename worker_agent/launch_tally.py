"""What became of the launches of this process, counted for /health and /metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.api.v1 import session_pb2, types_pb2


@dataclass(slots=True)
class LaunchTally:
    """What became of the launches of this process."""

    by_end: Counter[str] = field(default_factory=Counter)
    failing: set[str] = field(default_factory=set)
    _last: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Scheduled time and attempt of the latest launch that ended, by job: an end is reported again when asked for."""

    def count(self, report: session_pb2.LaunchReport) -> None:
        """Takes a report in; a run that goes on, or was counted, changes nothing."""
        token = (report.scheduled_at_unix_ms, report.attempt)
        if report.state == types_pb2.LAUNCH_STATE_RUNNING or self._last.get(report.job_id) == token:
            return
        self._last[report.job_id] = token
        if report.decline:
            self.by_end["declined"] += 1
            return  # Another worker has it.
        name = types_pb2.LaunchState.Name(report.state).removeprefix("LAUNCH_STATE_").lower()
        self.by_end[name] += 1
        if report.state == types_pb2.LAUNCH_STATE_CANCELLED:
            return  # It was told to stop: that says nothing of the job's health.
        if report.state == types_pb2.LAUNCH_STATE_SUCCEEDED:
            self.failing.discard(report.job_id)
        else:
            self.failing.add(report.job_id)
