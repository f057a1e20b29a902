"""The records of what passed while a job, or all, was paused, or before its schedule was changed. Pure.

The state has the stretches, each with its schedule and its reason (machine/passed.py). Of a stretch the latest
PASSED_RECORDS_MAX times are recorded one by one; those before them share one record, as in a catch-up. These are fewer
than there, because one person decided once and one reason says it all: a job keeps some 200 launches, and a thousand
jobs that go on together would push everything else out of the cluster's story.
"""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.control.catch_up import share_one_record
from coordinator.control.schedule import compile_schedule
from coordinator.model import CronJob, PassedTimes, WallMs
from coordinator.model.errors import InvalidRequest

PASSED_RECORDS_MAX = 20


@dataclass(frozen=True, slots=True)
class PassedRecord:
    """One record to make."""

    scheduled_at_ms: WallMs
    reason: str
    counted: int = 1
    """For how many times it stands, as far as they were counted: what it cost to make."""


def records_of(job: CronJob) -> list[PassedRecord]:
    """What is to be recorded of the job, by scheduled time. A stretch may have none."""
    records: list[PassedRecord] = []
    after_ms = job.decided_until_ms
    for past in job.passed:
        records += _records_after(after_ms, past)
        after_ms = past.until_ms
    return records


def _records_after(after_ms: WallMs, past: PassedTimes) -> list[PassedRecord]:
    try:
        schedule = compile_schedule(past.schedule, past.time_zone)
    except InvalidRequest:
        return []  # It was never due; see cron.py.
    single = schedule.latest(after_ms, past.until_ms, PASSED_RECORDS_MAX)
    records = [PassedRecord(scheduled_at_ms, past.reason) for scheduled_at_ms in single]
    shared = share_one_record(schedule, after_ms, single, past.reason)
    if shared is not None:
        records.insert(0, PassedRecord(shared.until_ms, shared.reason, shared.counted))
    return records
