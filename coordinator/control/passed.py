"""The records of what passed while a job, or all, was paused, or before its schedule was changed. A passive machine.

The state has the stretches, each with its schedule and its reason (machine/passed.py). Of a stretch the latest
PASSED_RECORDS_MAX times have a record each, all made by one command, so that what is due next does not wait for them;
those before them share one record, as in a catch-up. These are fewer than there, because one person decided once and
one reason says it all: a job keeps some 200 launches.

A thousand jobs may go on together. So what is to be recorded is found for some jobs at a time, the others wait:

- In one step so many times are counted (TIMES_PER_STEP); then the event loop has its turn.
- So many jobs record at once (JOBS_AT_ONCE): what piled up while a commit took long becomes one log entry, and a master
  hears nobody while it applies one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from coordinator.control.catch_up import Counts, share_one_record
from coordinator.control.schedule import compile_schedule
from coordinator.model import CronJob, PassedTimes, WallMs
from coordinator.model.errors import InvalidRequest

PASSED_RECORDS_MAX = 20
TIMES_PER_STEP = 1_000
"""Counting costs about 20 us each on the leader's event loop: 20 ms, and as much for the last job."""
TURN_S = 0.005
"""What is left to the event loop until the next step."""
JOBS_AT_ONCE = 50
"""In an entry 1,000 records, as many as a batch may have commands."""


@dataclass(frozen=True, slots=True)
class PassedRecord:
    """What one command records."""

    scheduled_at_ms: WallMs
    reason: str
    earlier: tuple[WallMs, ...] = ()
    """Times before it with a record each, ascending."""
    counted: int = 1
    """How many times were counted to make it."""


@dataclass(slots=True)
class _Prepared:
    """What is to be recorded of one job."""

    closed_ms: WallMs
    """The job's `closed_until_ms` for which it was found."""
    records: deque[PassedRecord] = field(default_factory=deque)


class PassedRecorder:
    """Finds the next record of each job. `is_waiting` while some jobs have yet to come to their turn."""

    def __init__(self) -> None:
        self._prepared: dict[str, _Prepared] = {}
        self._recording: set[str] = set()
        """Jobs that have something to record, as far as it was found."""
        self._waiting: dict[str, None] = {}
        """Jobs in the order of their coming."""
        self._times_left = TIMES_PER_STEP

    @property
    def is_waiting(self) -> bool:
        """True while a job waits for its turn."""
        return bool(self._waiting)

    def is_prepared(self, job: CronJob) -> bool:
        """True when `next_of` can tell; otherwise the job waits for its turn."""
        prepared = self._prepared.get(job.id)
        if not job.passed or (prepared is not None and prepared.closed_ms == job.closed_until_ms):
            return True
        if job.id not in self._recording and not self._has_room():
            self._waiting[job.id] = None
            return False
        records = deque(records_of(job))
        self._prepared[job.id] = _Prepared(job.closed_until_ms, records)
        self._times_left -= PASSED_RECORDS_MAX + sum(record.counted for record in records)
        return True

    def next_of(self, job: CronJob) -> PassedRecord | None:
        """What is to be recorded next; None when all is."""
        if not job.passed:
            self.forget(job.id)
            return None
        records = self._prepared[job.id].records
        while records and records[0].scheduled_at_ms <= job.decided_until_ms:
            records.popleft()
        if records and records[0].earlier and records[0].earlier[0] <= job.decided_until_ms:
            # Decided otherwise in part, as by a proposal of before that was in doubt: what is left is another record.
            records.clear()
            records.extend(records_of(job))
        if not records:
            self._recording.discard(job.id)
            return None
        self._recording.add(job.id)
        return records[0]

    def forget(self, job_id: str) -> None:
        """The job is gone, or all of it is recorded."""
        self._prepared.pop(job_id, None)
        self._recording.discard(job_id)

    def turns(self) -> Iterator[str]:
        """The jobs whose turn it is, at the end of a step."""
        while self._waiting and self._has_room():
            job_id = next(iter(self._waiting))
            del self._waiting[job_id]
            yield job_id
        self._times_left = TIMES_PER_STEP

    def _has_room(self) -> bool:
        return self._times_left > 0 and len(self._recording) < JOBS_AT_ONCE


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
    times = schedule.latest(after_ms, past.until_ms, PASSED_RECORDS_MAX)
    if not times:
        return []
    latest = PassedRecord(times[-1], past.reason, tuple(times[:-1]), len(times))
    shared = share_one_record(schedule, after_ms, times, past.reason, Counts())
    if shared is None:
        return [latest]
    return [PassedRecord(shared.until_ms, shared.reason, counted=shared.counted), latest]
