"""Commands about launches: committed, begun, ended, lost, cancelled, or never made and why.

Invariant: of each job, scheduled times are decided in ascending order, each exactly once. `decided_until` is the
watermark: a CommitLaunch or RecordNoLaunch at or below it is refused, and moves it up otherwise. A CommitLaunch of what
has passed in a pause or under another schedule (passed.py) is refused, too; and so is what was decided before the last
of these stretches closed, unless it is about what was closed already: it may leave times out. Manual launches stand
beside the schedule and leave it alone.

The fencing token of a run is (job, scheduled time, attempt): a report with another attempt is refused, and so is any
report once the attempt was given up. What a launch can become:

    (nothing)    -> COMMITTED    CommitLaunch with a worker: attempt 1
                 -> WAITING      CommitLaunch without: attempt 0, nobody has begun
                 -> MISSED, SKIPPED    RecordNoLaunch
    WAITING      -> COMMITTED    AssignLaunch: the next attempt
                 -> CANCELLED    CancelLaunch, or its job is paused before the first attempt
                 -> MISSED, or as its last attempt ended    LoseLaunch: nobody can run it
    COMMITTED    -> RUNNING      StartLaunch
                 -> COMMITTED, WAITING, CANCELLED    DeclineLaunch: its worker starts nothing of it
    COMMITTED,   -> SUCCEEDED, FAILED, TIMED_OUT, CANCELLED    FinishLaunch
    RUNNING      -> WAITING      FinishLaunch or LoseLaunch with a time for the next attempt
                 -> COMMITTED    LoseLaunch with a worker for the next attempt
                 -> LOST         LoseLaunch
                 -> (the same, with a cancel_reason)    CancelLaunch: no further attempt, whatever becomes of this one

A launch with a cancel_reason makes no further attempt. An attempt that was declined surely never started: it is not
filed among the earlier ones, so it counts for no retry policy, but its number is used up.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from coordinator.api.v1 import command_pb2
from coordinator.machine.draft import Draft
from coordinator.machine.passed import move_watermark, why_paused
from coordinator.model import CronJob, Launch, LaunchAttempt, LaunchState, LaunchTrigger, WallMs
from coordinator.model.errors import RefusalReason, Refused

OUTPUT_BYTES_MAX = 64 * 1024
"""A longer output is cut to its last bytes, whatever the worker's own limit says."""
RECORDS_MAX = 100
"""Times before the last one that one RecordNoLaunch names; a record takes a tenth of a millisecond at most."""
_RUN_ENDS = (LaunchState.SUCCEEDED, LaunchState.FAILED, LaunchState.TIMED_OUT, LaunchState.CANCELLED)


def _show_time(time_ms: int) -> str:
    # Without the datetime module's clock or locale: the story must read the same on every master.
    seconds = time_ms % 86_400_000 // 1000
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}Z"


def _require_undecided(draft: Draft, command: command_pb2.CommitLaunch | command_pb2.RecordNoLaunch) -> CronJob:
    job, scheduled_at_ms = draft.job(command.job_id), command.scheduled_at_unix_ms
    first_ms = scheduled_at_ms
    if isinstance(command, command_pb2.RecordNoLaunch) and command.earlier_unix_ms:
        first_ms = command.earlier_unix_ms[0]
    what = f"job {job.id} at {_show_time(first_ms)}"
    if first_ms <= job.decided_until_ms:
        raise Refused(RefusalReason.STALE, f"{what} has been decided already")
    known_ms = command.closed_until_unix_ms
    if command.HasField("closed_until_unix_ms") and known_ms < min(scheduled_at_ms, job.closed_until_ms):
        raise Refused(RefusalReason.STALE, f"{what} was decided before the job's times changed")
    return job


def commit_launch(draft: Draft, command: command_pb2.CommitLaunch) -> None:
    """Commits the intent to launch: on a worker at once, or later."""
    if command.worker:
        draft.node(command.worker)
    if command.trigger == LaunchTrigger.MANUAL.value:
        job = draft.job(command.job_id)
        scheduled_at_ms = command.scheduled_at_unix_ms or draft.time_ms
        # Schedules know whole seconds only, so a manual launch beside them never takes the identity of a scheduled one.
        while scheduled_at_ms % 1_000 == 0 or (job.id, WallMs(scheduled_at_ms)) in draft.launches:
            scheduled_at_ms += 1
        due_ms = command.due_unix_ms or draft.time_ms
    else:
        scheduled_at_ms = command.scheduled_at_unix_ms
        due_ms = command.due_unix_ms or scheduled_at_ms
        job = _require_undecided(draft, command)
        if job.paused or draft.settings.cron_paused:
            raise Refused(RefusalReason.PRECONDITION, f"job {job.id} is paused")
        if scheduled_at_ms <= job.closed_until_ms:
            when = _show_time(scheduled_at_ms)
            raise Refused(RefusalReason.STALE, f"job {job.id} at {when} is not launched: {job.passed[-1].reason}")
        draft.put_job(move_watermark(job, WallMs(scheduled_at_ms)))
    draft.scheduled_at_ms = scheduled_at_ms
    draft.put_launch(
        Launch(
            job_id=job.id,
            scheduled_at_ms=WallMs(scheduled_at_ms),
            attempt=1 if command.worker else 0,
            worker=command.worker,
            state=LaunchState.COMMITTED if command.worker else LaunchState.WAITING,
            trigger=LaunchTrigger(command.trigger or LaunchTrigger.SCHEDULE.value),
            reason="" if command.worker else command.reason,
            committed_ms=draft.time_ms,
            cause=draft.cause,
            due_ms=WallMs(due_ms),
            not_before_ms=WallMs(0 if command.worker else command.not_before_unix_ms),
        )
    )


def assign_launch(draft: Draft, command: command_pb2.AssignLaunch) -> None:
    """A launch that waits begins its next attempt."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    if launch.state is not LaunchState.WAITING:
        raise Refused(RefusalReason.STALE, f"{_named(launch)} does not wait: it is {launch.state.name.lower()}")
    draft.node(command.worker)
    draft.put_launch(
        replace(
            launch,
            attempt=launch.attempt + 1,
            worker=command.worker,
            state=LaunchState.COMMITTED,
            reason="",
            not_before_ms=WallMs(0),
        )
    )


def cancel_launch(draft: Draft, command: command_pb2.CancelLaunch) -> None:
    """A launch shall stop, or never start."""
    launch = draft.launches.get((command.job_id, WallMs(command.scheduled_at_unix_ms)))
    if launch is None or launch.state.has_ended:
        _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, 0)  # Says which, and raises.
        return
    reason = command.reason or "cancelled"
    if launch.state is LaunchState.WAITING:
        _cancel_waiting(draft, launch, reason)
    elif not launch.cancel_reason:
        draft.put_launch(replace(launch, cancel_reason=reason))
        when = _show_time(launch.scheduled_at_ms)
        draft.record("launch", launch.job_id, f"told to stop at {when} on {launch.worker}: {reason}")


def drop_waiting(draft: Draft, job_id: str, reason: str) -> None:
    """Ends the launches of a job that its schedule committed and that nobody has begun."""
    for scheduled_at_ms in draft.launch_times.get(job_id, ()):
        launch = draft.launches[(job_id, scheduled_at_ms)]
        if launch.state is LaunchState.WAITING and _is_unbegun(launch):
            _cancel_waiting(draft, launch, reason)


def _is_unbegun(launch: Launch) -> bool:
    """True for a launch of the schedule that no worker has begun: of one that waits."""
    return launch.attempts_counted == 0 and launch.trigger is LaunchTrigger.SCHEDULE


def _cancel_waiting(draft: Draft, launch: Launch, reason: str) -> None:
    ended = _end_waiting(draft, launch, reason)
    draft.put_launch(replace(ended, state=LaunchState.CANCELLED, cancel_reason=reason))
    draft.record("launch", launch.job_id, f"cancelled at {_show_time(launch.scheduled_at_ms)}: {reason}")


def record_no_launch(draft: Draft, command: command_pb2.RecordNoLaunch) -> None:
    """Records scheduled times at which nothing is launched."""
    job = _require_undecided(draft, command)
    times = [WallMs(time_ms) for time_ms in (*command.earlier_unix_ms, command.scheduled_at_unix_ms)]
    if len(times) > RECORDS_MAX + 1 or any(first >= second for first, second in pairwise(times)):
        raise Refused(RefusalReason.INVALID, f"job {job.id}: {len(times)} times to record, too many or not ascending")
    if command.state not in (LaunchState.MISSED.value, LaunchState.SKIPPED.value):
        raise Refused(RefusalReason.INVALID, f"job {job.id}: state {command.state} is neither MISSED nor SKIPPED")
    state = LaunchState(command.state)
    draft.put_job(move_watermark(job, times[-1]))
    for scheduled_at_ms in times:
        if (job.id, scheduled_at_ms) in draft.launches:
            continue
        draft.put_launch(
            Launch(
                job_id=job.id,
                scheduled_at_ms=scheduled_at_ms,
                attempt=0,
                state=state,
                reason=command.reason,
                committed_ms=draft.time_ms,
                finished_ms=draft.time_ms,
                cause=draft.cause,
            )
        )
    earlier = f" and {len(times) - 1} times before, from {_show_time(times[0])} on" if len(times) > 1 else ""
    draft.record("launch", job.id, f"{state.name.lower()} at {_show_time(times[-1])}{earlier}: {command.reason}")


def _require_attempt(draft: Draft, job_id: str, scheduled_at_ms: int, attempt: int) -> Launch:
    launch = draft.launches.get((job_id, WallMs(scheduled_at_ms)))
    if launch is None:
        raise Refused(
            RefusalReason.NOT_FOUND, f"there is no launch of job {job_id!r} at {_show_time(scheduled_at_ms)}"
        )
    if launch.state.has_ended:
        raise Refused(
            RefusalReason.STALE,
            f"the launch of {job_id} at {_show_time(scheduled_at_ms)} has ended ({launch.state.name.lower()})",
        )
    if launch.attempt != attempt:
        raise Refused(
            RefusalReason.STALE,
            f"the launch of {job_id} at {_show_time(scheduled_at_ms)} is at attempt {launch.attempt}, not {attempt}",
        )
    return launch


def _named(launch: Launch) -> str:
    return f"the launch of {launch.job_id} at {_show_time(launch.scheduled_at_ms)}"


def start_launch(draft: Draft, command: command_pb2.StartLaunch) -> None:
    """The worker started the run."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    _refuse_waiting(launch)
    draft.put_launch(
        replace(
            launch,
            state=LaunchState.RUNNING,
            reason="",
            started_ms=WallMs(command.started_unix_ms or draft.time_ms),
        )
    )


def finish_launch(draft: Draft, command: command_pb2.FinishLaunch) -> None:
    """The worker reports how the run ended: that is the end of the launch, or of this attempt."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    _refuse_waiting(launch)
    if command.state not in {state.value for state in _RUN_ENDS}:
        raise Refused(RefusalReason.INVALID, f"state {command.state} is no way for a run to end")
    state = LaunchState(command.state)
    ended = replace(
        launch,
        state=state,
        reason=command.reason,
        started_ms=WallMs(command.started_unix_ms or launch.started_ms),
        finished_ms=WallMs(command.finished_unix_ms or draft.time_ms),
        exit_status=command.exit_status,
        output=command.output[-OUTPUT_BYTES_MAX:],
    )
    will_retry = bool(command.retry_at_unix_ms) and not launch.cancel_reason
    if will_retry and state not in (LaunchState.FAILED, LaunchState.TIMED_OUT):
        raise Refused(RefusalReason.INVALID, f"{_named(launch)} ended as {state.name.lower()}: nothing to try again")
    draft.put_launch(_wait_for_retry(ended, command.retry_at_unix_ms) if will_retry else ended)
    if state is not LaunchState.SUCCEEDED:
        draft.record(
            "launch",
            launch.job_id,
            f"{state.name.lower()} at {_show_time(launch.scheduled_at_ms)} on {launch.worker}: "
            f"{command.reason or f'exit status {command.exit_status}'}{_next_words(ended, will_retry)}",
        )


def lose_launch(draft: Draft, command: command_pb2.LoseLaunch) -> None:
    """The attempt is lost, or a launch that waits finds nobody to run it."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    when = _show_time(launch.scheduled_at_ms)
    if launch.state is LaunchState.WAITING:
        _give_up_waiting(draft, launch, command.reason)
        return
    lost = replace(launch, state=LaunchState.LOST, reason=command.reason, finished_ms=draft.time_ms)
    if command.next_worker and not launch.cancel_reason:
        draft.node(command.next_worker)
        draft.put_launch(
            replace(
                _wait_for_retry(lost, 0),
                attempt=launch.attempt + 1,
                worker=command.next_worker,
                state=LaunchState.COMMITTED,
            )
        )
        next_words = f"; attempt {launch.attempt + 1} on {command.next_worker}"
    else:
        will_retry = bool(command.retry_at_unix_ms) and not launch.cancel_reason
        draft.put_launch(_wait_for_retry(lost, command.retry_at_unix_ms) if will_retry else lost)
        next_words = _next_words(lost, will_retry)
    lost_words = f"attempt {launch.attempt} at {when} lost on {launch.worker}: {command.reason}"
    draft.record("launch", launch.job_id, f"{lost_words}{next_words}")


def decline_launch(draft: Draft, command: command_pb2.DeclineLaunch) -> None:
    """The worker never starts the attempt: the next one is on another worker, or follows when there is one."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    if launch.state is not LaunchState.COMMITTED:
        raise Refused(RefusalReason.STALE, f"{_named(launch)} is {launch.state.name.lower()}: it cannot be declined")
    declined = replace(launch, worker="", state=LaunchState.WAITING, reason=command.reason)
    if launch.cancel_reason:
        reason = launch.cancel_reason
        ended = replace(declined, state=LaunchState.CANCELLED, reason=reason, finished_ms=draft.time_ms)
        draft.put_launch(ended)
        draft.record("launch", launch.job_id, f"cancelled at {_show_time(launch.scheduled_at_ms)}: {reason}")
    elif _is_unbegun(declined) and (reason := why_paused(draft, draft.job(launch.job_id))):
        _cancel_waiting(draft, declined, reason)
    elif command.next_worker:
        draft.node(command.next_worker)
        draft.put_launch(
            replace(launch, attempt=launch.attempt + 1, worker=command.next_worker, reason=command.reason)
        )
    else:
        draft.put_launch(declined)


def _refuse_waiting(launch: Launch) -> None:
    if launch.state is LaunchState.WAITING:
        raise Refused(RefusalReason.STALE, f"attempt {launch.attempt} of {_named(launch)} was given up")


def _next_words(ended: Launch, will_retry: bool) -> str:
    return f"; attempt {ended.attempt + 1} follows" if will_retry else ""


def _wait_for_retry(ended: Launch, retry_at_unix_ms: int) -> Launch:
    """The launch between an attempt that ended and the next one. The output of the former stays until the latter's."""
    attempt = LaunchAttempt(
        attempt=ended.attempt,
        worker=ended.worker,
        state=ended.state,
        reason=ended.reason,
        started_ms=ended.started_ms,
        finished_ms=ended.finished_ms,
        exit_status=ended.exit_status,
    )
    return replace(
        ended,
        worker="",
        state=LaunchState.WAITING,
        started_ms=WallMs(0),
        finished_ms=WallMs(0),
        exit_status=0,
        not_before_ms=WallMs(retry_at_unix_ms),
        earlier_attempts=(*ended.earlier_attempts, attempt),
    )


def _give_up_waiting(draft: Draft, launch: Launch, reason: str) -> None:
    """Nobody can run it: it never ran, or ends as its last attempt did."""
    given_up = _end_waiting(draft, launch, reason)
    draft.put_launch(given_up)
    draft.record(
        "launch", launch.job_id, f"{given_up.state.name.lower()} at {_show_time(launch.scheduled_at_ms)}: {reason}"
    )


def _end_waiting(draft: Draft, launch: Launch, reason: str) -> Launch:
    """A launch that makes no further attempt: as its last one ended, or MISSED when there was none."""
    if not launch.earlier_attempts:
        return replace(
            launch, state=LaunchState.MISSED, reason=reason, finished_ms=draft.time_ms, not_before_ms=WallMs(0)
        )
    last = launch.earlier_attempts[-1]
    return replace(
        launch,
        attempt=last.attempt,
        worker=last.worker,
        state=last.state,
        reason=f"{last.reason or f'exit status {last.exit_status}'}; {reason}",
        started_ms=last.started_ms,
        finished_ms=last.finished_ms,
        exit_status=last.exit_status,
        not_before_ms=WallMs(0),
        earlier_attempts=launch.earlier_attempts[:-1],
    )
