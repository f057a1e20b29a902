"""Commands about cron jobs and launches.

Invariant: of each job, scheduled times are decided in ascending order, each exactly once. `decided_until` is the
watermark: a CommitLaunch or RecordNoLaunch at or below it is refused, and moves it up otherwise. An edit and a resume
move it to the time of their log entry, so they never launch retroactively. Manual launches stand beside the schedule
and leave it alone.

The fencing token of a run is (job, scheduled time, attempt): a report with another attempt is refused.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.codec import job_spec_from_proto
from coordinator.machine.draft import Draft
from coordinator.machine.nodes import check_name
from coordinator.model import CronJob, CronJobSpec, Launch, LaunchState, LaunchTrigger, WallMs
from coordinator.model.errors import RefusalReason, Refused

OUTPUT_BYTES_MAX = 64 * 1024
"""A longer output is cut to its last bytes, whatever the worker's own limit says."""


def _show_time(time_ms: int) -> str:
    # Without the datetime module's clock or locale: the story must read the same on every master.
    seconds = time_ms % 86_400_000 // 1000
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}Z"


def _check_spec(spec: CronJobSpec) -> None:
    """Refuses what can be seen without a calendar; schedule and time zone are checked before the proposal."""
    check_name("job id", spec.id)
    problems = [
        (not spec.schedule, "schedule is empty"),
        (bool(spec.command) == bool(spec.python), "exactly one of command and python must be given"),
        (not 0 <= spec.priority_class <= 6, f"priority_class = {spec.priority_class}; use 0 to 6"),
        (not spec.timeout_s > 0, f"timeout_s = {spec.timeout_s}; use more than 0"),
        (not spec.start_deadline_s > 0, f"start_deadline_s = {spec.start_deadline_s}; use more than 0"),
        (not spec.catch_up_window_s > 0, f"catch_up_window_s = {spec.catch_up_window_s}; use more than 0"),
        (not 1 <= spec.catch_up_limit <= 1000, f"catch_up_limit = {spec.catch_up_limit}; use 1 to 1000"),
        (not 1 <= spec.attempts_max <= 100, f"attempts_max = {spec.attempts_max}; use 1 to 100"),
    ]
    for is_wrong, problem in problems:
        if is_wrong:
            raise Refused(RefusalReason.INVALID, f"job {spec.id}: {problem}")


def apply_job(draft: Draft, command: command_pb2.ApplyJob) -> None:
    """Creates or replaces a job's definition."""
    try:
        spec = job_spec_from_proto(command.spec)
    except ValueError as error:
        raise Refused(RefusalReason.INVALID, f"job {command.spec.id}: {error}") from None
    _check_spec(spec)
    before = draft.jobs.get(spec.id)
    if before is None:
        draft.put_job(
            CronJob(
                spec=spec,
                source=command.source or "api",
                decided_until_ms=draft.time_ms,
                created_ms=draft.time_ms,
                updated_ms=draft.time_ms,
            )
        )
        draft.record("cron", spec.id, f"created: {spec.schedule} ({spec.time_zone})")
    elif before.spec != spec:
        draft.put_job(
            replace(
                before,
                spec=spec,
                source=command.source or "api",
                decided_until_ms=max(before.decided_until_ms, draft.time_ms),
                updated_ms=draft.time_ms,
            )
        )
        draft.record("cron", spec.id, f"changed: {spec.schedule} ({spec.time_zone})")


def delete_job(draft: Draft, command: command_pb2.DeleteJob) -> None:
    """Forgets a job and its history."""
    draft.drop_job(draft.job(command.job_id))
    draft.record("cron", command.job_id, "deleted")


def set_job_paused(draft: Draft, command: command_pb2.SetJobPaused) -> None:
    """Pauses or resumes a job."""
    job = draft.job(command.job_id)
    if job.paused == command.paused:
        return
    decided_until_ms = job.decided_until_ms if command.paused else max(job.decided_until_ms, draft.time_ms)
    draft.put_job(replace(job, paused=command.paused, decided_until_ms=decided_until_ms))
    draft.record("cron", job.id, "paused" if command.paused else "resumed")


def assign_jobs(draft: Draft, command: command_pb2.AssignJobs) -> None:
    """Sets owners and backups."""
    for assignment in command.assignments:
        job = draft.jobs.get(assignment.job_id)
        if job is None:
            continue
        if assignment.owner:
            draft.node(assignment.owner)
        backups = tuple(assignment.backups)
        if assignment.owner in backups or len(set(backups)) != len(backups):
            raise Refused(
                RefusalReason.INVALID, f"job {job.id}: owner {assignment.owner} and backups {backups} must be distinct"
            )
        draft.put_job(replace(job, owner=assignment.owner, backups=backups))
        if job.owner != assignment.owner:
            draft.record("cron", job.id, f"owner is {assignment.owner or 'nobody'}, was {job.owner or 'nobody'}")


def _require_undecided(draft: Draft, job_id: str, scheduled_at_ms: int) -> CronJob:
    job = draft.job(job_id)
    if scheduled_at_ms <= job.decided_until_ms:
        raise Refused(
            RefusalReason.STALE, f"job {job_id} at {_show_time(scheduled_at_ms)} has been decided already"
        )
    return job


def commit_launch(draft: Draft, command: command_pb2.CommitLaunch) -> None:
    """Commits the intent to launch."""
    draft.node(command.worker)
    if command.trigger == LaunchTrigger.MANUAL.value:
        job = draft.job(command.job_id)
        scheduled_at_ms = command.scheduled_at_unix_ms or draft.time_ms
        # Schedules know whole seconds only, so a manual launch beside them never takes the identity of a scheduled one.
        while scheduled_at_ms % 1_000 == 0 or (job.id, WallMs(scheduled_at_ms)) in draft.launches:
            scheduled_at_ms += 1
    else:
        scheduled_at_ms = command.scheduled_at_unix_ms
        job = _require_undecided(draft, command.job_id, scheduled_at_ms)
        if job.paused or draft.settings.cron_paused:
            raise Refused(RefusalReason.PRECONDITION, f"job {job.id} is paused")
        draft.put_job(replace(job, decided_until_ms=WallMs(scheduled_at_ms)))
    draft.scheduled_at_ms = scheduled_at_ms
    draft.put_launch(
        Launch(
            job_id=job.id,
            scheduled_at_ms=WallMs(scheduled_at_ms),
            worker=command.worker,
            trigger=LaunchTrigger(command.trigger or LaunchTrigger.SCHEDULE.value),
            committed_ms=draft.time_ms,
            cause=draft.cause,
        )
    )


def record_no_launch(draft: Draft, command: command_pb2.RecordNoLaunch) -> None:
    """Records a scheduled time at which nothing is launched."""
    job = _require_undecided(draft, command.job_id, command.scheduled_at_unix_ms)
    if command.state not in (LaunchState.MISSED.value, LaunchState.SKIPPED.value):
        raise Refused(RefusalReason.INVALID, f"job {job.id}: state {command.state} is neither MISSED nor SKIPPED")
    state = LaunchState(command.state)
    scheduled_at_ms = WallMs(command.scheduled_at_unix_ms)
    draft.put_job(replace(job, decided_until_ms=scheduled_at_ms))
    if (job.id, scheduled_at_ms) not in draft.launches:
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
    draft.record("launch", job.id, f"{state.name.lower()} at {_show_time(scheduled_at_ms)}: {command.reason}")


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


def start_launch(draft: Draft, command: command_pb2.StartLaunch) -> None:
    """The worker started the run."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    draft.put_launch(
        replace(launch, state=LaunchState.RUNNING, started_ms=WallMs(command.started_unix_ms or draft.time_ms))
    )


def finish_launch(draft: Draft, command: command_pb2.FinishLaunch) -> None:
    """The worker reports how the run ended."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    ends = (LaunchState.SUCCEEDED, LaunchState.FAILED, LaunchState.TIMED_OUT)
    if command.state not in {state.value for state in ends}:
        raise Refused(RefusalReason.INVALID, f"state {command.state} is no way for a run to end")
    state = LaunchState(command.state)
    draft.put_launch(
        replace(
            launch,
            state=state,
            reason=command.reason,
            started_ms=WallMs(command.started_unix_ms or launch.started_ms),
            finished_ms=WallMs(command.finished_unix_ms or draft.time_ms),
            exit_status=command.exit_status,
            output=command.output[-OUTPUT_BYTES_MAX:],
        )
    )
    if state is not LaunchState.SUCCEEDED:
        draft.record(
            "launch",
            launch.job_id,
            f"{state.name.lower()} at {_show_time(launch.scheduled_at_ms)} on {launch.worker}: "
            f"{command.reason or f'exit status {command.exit_status}'}",
        )


def lose_launch(draft: Draft, command: command_pb2.LoseLaunch) -> None:
    """The worker of an attempt is lost."""
    launch = _require_attempt(draft, command.job_id, command.scheduled_at_unix_ms, command.attempt)
    when = _show_time(launch.scheduled_at_ms)
    if command.next_worker:
        draft.node(command.next_worker)
        draft.put_launch(
            replace(
                launch,
                attempt=launch.attempt + 1,
                worker=command.next_worker,
                state=LaunchState.COMMITTED,
                reason=command.reason,
                started_ms=WallMs(0),
            )
        )
        draft.record(
            "launch",
            launch.job_id,
            f"attempt {launch.attempt} at {when} lost on {launch.worker} ({command.reason}); "
            f"attempt {launch.attempt + 1} on {command.next_worker}",
        )
    else:
        draft.put_launch(
            replace(launch, state=LaunchState.LOST, reason=command.reason, finished_ms=draft.time_ms)
        )
        draft.record("launch", launch.job_id, f"lost at {when} on {launch.worker}: {command.reason}")
