"""What the cron controller remembers of one job."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.control.catch_up import CatchUpPlan
from coordinator.control.schedule import Schedule
from coordinator.model import CronJobSpec, Monotonic, WallMs


@dataclass(slots=True)
class JobWatch:
    """Soft state of one job."""

    spec: CronJobSpec
    schedule: Schedule | None
    """None for a schedule that cannot be read: checks before the proposal keep those out; it is never due."""
    jitter_ms: int
    wake_ms: WallMs | None = None
    """Wall time of the next look; the heap's entry that equals it is the valid one."""
    closed_ms: WallMs | None = None
    """The job's `closed_until_ms` for which `scheduled_ms` was computed."""
    scheduled_ms: WallMs | None = None
    """The next time to decide once all that passed is recorded; due `jitter_ms` later."""
    plan: CatchUpPlan | None = None
    starved_ms: WallMs | None = None
    """The first due time since when no worker of the job served."""
    starved_reason: str = ""
    """Why none did at that time."""
    backoff_until: Monotonic | None = None
    is_held_up: bool = False
    """True while a time is due, and a launch of the job is just beginning, or one in its way is just ending."""
