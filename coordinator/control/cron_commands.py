"""The commands with which the leader decides on a scheduled time of a job. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.model import CronJob, LaunchState, WallMs


def commit(job: CronJob, scheduled_at_ms: WallMs, worker: str) -> command_pb2.Command:
    """The command that launches it on a worker."""
    commit = command_pb2.CommitLaunch(
        job_id=job.id,
        scheduled_at_unix_ms=scheduled_at_ms,
        worker=worker,
        trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE,
        due_unix_ms=scheduled_at_ms + job.spec.jitter_ms,
    )
    return command_pb2.Command(commit_launch=commit)


def commit_waiting(job: CronJob, scheduled_at_ms: WallMs, reason: str, not_before_ms: int = 0) -> command_pb2.Command:
    """The command that launches it once others have ended, or a time has come."""
    command = commit(job, scheduled_at_ms, "")
    command.commit_launch.reason = reason
    command.commit_launch.not_before_unix_ms = not_before_ms
    return command


def no_launch(
    job: CronJob, scheduled_at_ms: WallMs, state: LaunchState, reason: str, earlier_ms: Iterable[WallMs] = ()
) -> command_pb2.Command:
    """The command that records it, and others before it, as MISSED or SKIPPED."""
    record = command_pb2.RecordNoLaunch(
        job_id=job.id, scheduled_at_unix_ms=scheduled_at_ms, reason=reason, earlier_unix_ms=earlier_ms
    )
    record.state = types_pb2.LAUNCH_STATE_MISSED if state is LaunchState.MISSED else types_pb2.LAUNCH_STATE_SKIPPED
    return command_pb2.Command(record_no_launch=record)
