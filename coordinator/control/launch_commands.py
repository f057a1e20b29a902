"""The commands with which the leader says what becomes of a launch. Pure."""

from __future__ import annotations

from coordinator.api.v1 import command_pb2
from coordinator.control.launch_reports import Report
from coordinator.model import Launch


def report(report: Report, retry_at_ms: int) -> command_pb2.Command:
    """The command that commits a report. `retry_at_ms`: when another attempt follows this end; 0 for never."""
    message = report.message
    if not report.is_final:
        start = command_pb2.StartLaunch(
            job_id=message.job_id,
            scheduled_at_unix_ms=message.scheduled_at_unix_ms,
            attempt=message.attempt,
            started_unix_ms=message.started_unix_ms,
        )
        return command_pb2.Command(start_launch=start)
    finish = command_pb2.FinishLaunch(
        job_id=message.job_id,
        scheduled_at_unix_ms=message.scheduled_at_unix_ms,
        attempt=message.attempt,
        state=message.state,
        reason=message.reason,
        started_unix_ms=message.started_unix_ms,
        finished_unix_ms=message.finished_unix_ms,
        exit_status=message.exit_status,
        output=message.output,
        retry_at_unix_ms=retry_at_ms,
    )
    return command_pb2.Command(finish_launch=finish)


def decline(report: Report, next_worker: str) -> command_pb2.Command:
    """The command that commits a decline. `next_worker`: who gets the next attempt at once; empty for nobody."""
    message = report.message
    declined = command_pb2.DeclineLaunch(
        job_id=message.job_id,
        scheduled_at_unix_ms=message.scheduled_at_unix_ms,
        attempt=message.attempt,
        next_worker=next_worker,
        reason=f"{report.node_id} declined: {message.reason or 'it does not say why'}",
    )
    return command_pb2.Command(decline_launch=declined)


def assign(launch: Launch, worker: str) -> command_pb2.Command:
    """The command that begins the next attempt."""
    assigned = command_pb2.AssignLaunch(
        job_id=launch.job_id, scheduled_at_unix_ms=launch.scheduled_at_ms, attempt=launch.attempt, worker=worker
    )
    return command_pb2.Command(assign_launch=assigned)


def lose(launch: Launch, reason: str, next_worker: str = "", retry_at_ms: int = 0) -> command_pb2.Command:
    """The command that gives up the present attempt, or the wait for one. Without what follows the launch ends."""
    lost = command_pb2.LoseLaunch(
        job_id=launch.job_id,
        scheduled_at_unix_ms=launch.scheduled_at_ms,
        attempt=launch.attempt,
        next_worker=next_worker,
        reason=reason,
        retry_at_unix_ms=retry_at_ms,
    )
    return command_pb2.Command(lose_launch=lost)


def cancel(launch: Launch, reason: str) -> command_pb2.Command:
    """The command that tells a launch to stop."""
    job_id, scheduled_at_ms = launch.key
    cancelled = command_pb2.CancelLaunch(job_id=job_id, scheduled_at_unix_ms=scheduled_at_ms, reason=reason)
    return command_pb2.Command(cancel_launch=cancelled)
