"""What workers say of launches: judged against the state, made into commands, answered with receipts. Pure.

A report is committed before it gets its receipt. `judge` says what the state already knows: a report that is in it is
confirmed, one that can no longer count is refused with the reason, any other one must be proposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.control.interface import SendToNode
from coordinator.machine.state import LaunchKey
from coordinator.model import Launch, LaunchState, WallMs

FINAL_STATES = (
    types_pb2.LAUNCH_STATE_SUCCEEDED,
    types_pb2.LAUNCH_STATE_FAILED,
    types_pb2.LAUNCH_STATE_TIMED_OUT,
    types_pb2.LAUNCH_STATE_CANCELLED,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker said of a launch, and on which session it waits for the receipt."""

    session: int
    node_id: str
    message: session_pb2.LaunchReport

    @property
    def key(self) -> LaunchKey:
        """The launch that it speaks of."""
        return (self.message.job_id, WallMs(self.message.scheduled_at_unix_ms))

    @property
    def is_final(self) -> bool:
        """True when it says how the run ended."""
        return self.message.state in FINAL_STATES


def judge(launch: Launch | None, report: Report) -> str | None:
    """The refusal for a report's receipt, empty when it is committed already; None when it must be proposed."""
    message = report.message
    if launch is None:
        return "this launch is not known; it was deleted, or is too old to be kept"
    if message.attempt != launch.attempt or launch.state is LaunchState.WAITING:
        return _judge_earlier(launch, report)
    if report.node_id != launch.worker:
        return f"this attempt belongs to {launch.worker}"
    if message.state == launch.state.value:
        return ""
    if launch.state.has_ended:
        return f"the launch has ended as {launch.state.name}"
    if message.state == types_pb2.LAUNCH_STATE_RUNNING or report.is_final:
        return None
    return f"a worker cannot report the state {message.state}"


def _judge_earlier(launch: Launch, report: Report) -> str:
    """The verdict on an attempt that is over, while the launch goes on."""
    attempt = report.message.attempt
    for earlier in launch.earlier_attempts:
        if earlier.attempt == attempt and earlier.worker == report.node_id and earlier.state is not LaunchState.LOST:
            is_same = report.message.state == earlier.state.value
            return "" if is_same else f"attempt {attempt} has ended as {earlier.state.name}"
    counts = launch.attempt + 1 if launch.state is LaunchState.WAITING else launch.attempt
    return f"attempt {attempt} was given up; attempt {counts} counts"


def was_given_up(launch: Launch, attempt: int) -> bool:
    """True when a leader called this attempt lost: whoever still runs it shall stop."""
    if attempt == launch.attempt and launch.state is LaunchState.LOST:
        return True
    return any(it.attempt == attempt and it.state is LaunchState.LOST for it in launch.earlier_attempts)


def report_command(report: Report, retry_at_ms: int) -> command_pb2.Command:
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


def receipt(report: Report, refusal: str) -> SendToNode:
    """The answer to a report."""
    message = report.message
    answer = session_pb2.LaunchReportReceipt(
        job_id=message.job_id,
        scheduled_at_unix_ms=message.scheduled_at_unix_ms,
        attempt=message.attempt,
        state=message.state,
        refusal=refusal,
    )
    return SendToNode(report.session, session_pb2.OpenResponse(launch_report_receipt=answer))
