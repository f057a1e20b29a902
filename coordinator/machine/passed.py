"""Scheduled times that passed and were not launched: the job was paused, or another schedule took the place of theirs.

The machine knows no schedules, only when a stretch ended: at a resume, and at a change of schedule or zone. So it notes
the stretch together with the schedule that it belongs to, and the leader makes the records (control/passed.py), as
RecordNoLaunch in ascending order. Whoever leads then finds all that takes in the state.

Invariant: `closed_until` is the end of the last stretch, or `decided_until` without one; no CommitLaunch of the
schedule at or below it is accepted, whenever it was proposed. A stretch is forgotten once the watermark has reached its
end. One without scheduled times, or whose times are all recorded, stays until something later is decided: harmless.

Schedules know whole seconds only: a stretch without one adds nothing to what was there before. So there is at most one
a second, however often somebody edits.
"""

from __future__ import annotations

from dataclasses import replace

from coordinator.machine.draft import Draft
from coordinator.model import CronJob, PassedTimes, WallMs

JOB_PAUSED = "the job was paused"
ALL_PAUSED = "all jobs were paused"
EDITED = "the schedule was changed"
PASSED_MAX = 32
"""Stretches of one job. So many take as many seconds at least, and the first is recorded within one."""


def why_paused(draft: Draft, job: CronJob) -> str:
    """Why nothing new of the job begins now; empty when something may."""
    if job.paused:
        return JOB_PAUSED
    return ALL_PAUSED if draft.settings.cron_paused else ""


def why_not_launched(draft: Draft, job: CronJob) -> str:
    """Why what the job's present schedule has not launched until now never will be, once it ends."""
    return why_paused(draft, job) or EDITED


def pass_over(draft: Draft, job: CronJob, reason: str) -> CronJob:
    """The job with everything that its schedule has not decided until now given up, for the leader to record."""
    now_ms, closed_ms = draft.time_ms, job.closed_until_ms
    if now_ms <= closed_ms:
        return job
    if now_ms // 1_000 == closed_ms // 1_000:
        if not job.passed:
            return replace(job, decided_until_ms=now_ms)
        return replace(job, passed=(*job.passed[:-1], replace(job.passed[-1], until_ms=now_ms)))
    past = PassedTimes(now_ms, job.spec.schedule, job.spec.time_zone, reason)
    earlier = job.passed
    if earlier and replace(earlier[-1], until_ms=now_ms) == past:
        earlier = earlier[:-1]
    job = replace(job, passed=(*earlier, past))
    if len(job.passed) > PASSED_MAX:
        job = move_watermark(job, job.passed[0].until_ms)
        draft.record("cron", job.id, f"changed over {PASSED_MAX} times: what the first left open may have no record")
    return job


def move_watermark(job: CronJob, until_ms: WallMs) -> CronJob:
    """The job with all times up to this one decided."""
    return replace(
        job, decided_until_ms=until_ms, passed=tuple(past for past in job.passed if past.until_ms > until_ms)
    )
