"""Commands about cron jobs: what they are, who owns them. Their launches are launches.py's.

`decided_until` is the job's watermark: scheduled times up to it have been decided. A change of the schedule or its zone
and a resume close what came before their log entry (passed.py): it is recorded and never launched. For the same reason
a pause ends what the schedule has committed and nobody has begun. Any other edit closes nothing: the times are the
same, and those that wait for their jitter, for a worker or for a leader are still to be decided, by the new rules.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.api.v1 import command_pb2
from coordinator.machine.codec import job_spec_from_proto
from coordinator.machine.draft import Draft
from coordinator.machine.launches import drop_waiting
from coordinator.machine.nodes import check_name
from coordinator.machine.passed import JOB_PAUSED, pass_over, why_not_launched
from coordinator.model import CronJob, CronJobSpec
from coordinator.model.errors import RefusalReason, Refused


def _check_spec(spec: CronJobSpec) -> None:
    """Refuses what can be seen without a calendar; schedule and time zone are checked before the proposal."""
    check_name("job id", spec.id)
    if not spec.schedule:
        raise Refused(RefusalReason.INVALID, f"job {spec.id}: schedule is empty")
    if bool(spec.command) == bool(spec.python):
        raise Refused(RefusalReason.INVALID, f"job {spec.id}: exactly one of command and python must be given")
    ranges = (
        ("priority_class", 0 <= spec.priority_class <= 6, "0 to 6"),
        ("timeout_s", spec.timeout_s > 0, "more than 0"),
        ("start_deadline_s", spec.start_deadline_s > 0, "more than 0"),
        ("catch_up_window_s", spec.catch_up_window_s > 0, "more than 0"),
        ("catch_up_limit", 1 <= spec.catch_up_limit <= 1000, "1 to 1000"),
        ("attempts_max", 1 <= spec.attempts_max <= 100, "1 to 100"),
        ("overlap_limit", 1 <= spec.overlap_limit <= 1000, "1 to 1000"),
        ("jitter_s", spec.jitter_s >= 0, "0 or more"),
    )
    for name, is_in_range, wanted in ranges:
        if not is_in_range:
            raise Refused(RefusalReason.INVALID, f"job {spec.id}: {name} = {getattr(spec, name)}; use {wanted}")


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
        if (before.spec.schedule, before.spec.time_zone) != (spec.schedule, spec.time_zone):
            before = pass_over(draft, before, why_not_launched(draft, before))
        draft.put_job(replace(before, spec=spec, source=command.source or "api", updated_ms=draft.time_ms))
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
    if not command.paused:
        job = pass_over(draft, job, JOB_PAUSED)
    draft.put_job(replace(job, paused=command.paused))
    if command.paused:
        drop_waiting(draft, job.id, JOB_PAUSED)
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
