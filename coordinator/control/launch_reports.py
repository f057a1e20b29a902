"""What workers say of launches: judged against the state, answered with receipts. Pure.

A report is committed before it gets its receipt. `judge` says what the state already knows: a report that is in it is
confirmed, one that can no longer count is refused with the reason, any other one must be proposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.api.v1 import session_pb2, types_pb2
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
        """True when the worker has nothing more to say: how the run ended, or that there is none."""
        return self.message.state in FINAL_STATES or self.is_decline

    @property
    def is_decline(self) -> bool:
        """True when it says that the attempt never started, and never will."""
        return self.message.decline != session_pb2.LAUNCH_DECLINE_UNSPECIFIED


def judge(launch: Launch | None, report: Report) -> str | None:
    """The refusal for a report's receipt, empty when it is committed already; None when it must be proposed."""
    message = report.message
    if report.is_decline:
        return _judge_decline(launch, report)
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


def _judge_decline(launch: Launch | None, report: Report) -> str | None:
    """The same for an attempt that was declined: of one that is over nothing more need be said."""
    if launch is None or launch.attempt != report.message.attempt or launch.state is not LaunchState.COMMITTED:
        return ""
    return None if report.node_id == launch.worker else f"this attempt belongs to {launch.worker}"


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
