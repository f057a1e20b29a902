"""What becomes of scheduled times that passed while nobody could launch: no leader, or no worker of the job. Pure.

A time is *on time* while its lateness, counted from when it is due (the scheduled time and the job's jitter), is at
most the job's start deadline; it is then simply launched late. Only older ones are a matter of the catch-up policy. The
plan is made once for a gap, so that times which become old while the leader works through it keep the verdict that they
had:

    NONE     all are missed
    LATEST   the last one is launched, however old it is; the others are missed
    ALL      the last `catch_up_limit` within `catch_up_window_s` are launched; the others are missed

Times are decided in ascending order. At most MISSED_RECORDS_MAX of a gap are recorded one by one, the latest ones;
those before them share one record, which names how many it stands for (counted up to MISSED_COUNT_MAX) and sits at the
last of them, so that the job's watermark moves over all.

What is launched is committed WAITING, each with a slot of its own (slots.py), so that an outage does not end in a
flood. When plans are made for many jobs is catch_up_plans.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.control.schedule import Schedule, format_wall
from coordinator.model import CatchUpPolicy, CronJobSpec, WallMs

MISSED_RECORDS_MAX = 100
MISSED_COUNT_MAX = 1_000
"""Counting costs about 20 us each on the leader's event loop: 20 ms."""
LOOKS_MIN = 20
"""About so many windows, of one look at least, lie between a minute and the gaps that masters leave."""


@dataclass(frozen=True, slots=True)
class CatchUpPlan:
    """The verdicts on all times up to `until_ms`. Invariant: shared_until_ms < every member of `launch`."""

    until_ms: WallMs
    launch: frozenset[WallMs]
    cause: str
    """Why they passed."""
    reason: str
    """Why the other times are missed."""
    shared_until_ms: WallMs | None = None
    """Times up to this one share one record."""
    shared_reason: str = ""


@dataclass(frozen=True, slots=True)
class Shared:
    """One record that stands for many times; it sits at the last of them."""

    until_ms: WallMs
    reason: str
    counted: int


@dataclass(frozen=True, slots=True)
class Count:
    """The times of a stretch, of which there is one at least: how many, if not more than MISSED_COUNT_MAX."""

    first_ms: WallMs
    last_ms: WallMs
    counted: int


class Counts:
    """Counts times, each stretch once: after an outage most jobs of a schedule have the same one behind them."""

    def __init__(self) -> None:
        self._known: dict[tuple[Schedule, WallMs, WallMs], Count | None] = {}
        self.looked_at = 0
        """About how many times were looked at, for who divides the work."""

    def latest(self, schedule: Schedule, after_ms: WallMs, until_ms: WallMs, count: int) -> list[WallMs]:
        """As the schedule's."""
        found = schedule.latest(after_ms, until_ms, count)
        # The windows before the last one hold as many again, and of the last one up to half is left out.
        self.looked_at += LOOKS_MIN + 3 * len(found)
        return found

    def count(self, schedule: Schedule, after_ms: WallMs, until_ms: WallMs) -> Count | None:
        """What is later than `after_ms` and not later than `until_ms`; None when nothing is."""
        stretch = (schedule, after_ms, until_ms)
        if stretch not in self._known:
            self._known[stretch] = self._count(schedule, after_ms, until_ms)
        return self._known[stretch]

    def forget(self) -> None:
        """Drops what it knows: nobody will ask for it again."""
        self._known.clear()

    def _count(self, schedule: Schedule, after_ms: WallMs, until_ms: WallMs) -> Count | None:
        times = schedule.between(after_ms, until_ms, MISSED_COUNT_MAX + 1)
        self.looked_at += len(times) + 1
        if not times:
            return None
        is_all = len(times) <= MISSED_COUNT_MAX
        return Count(times[0], times[-1] if is_all else self.latest(schedule, after_ms, until_ms, 1)[0], len(times))


def make_plan(
    schedule: Schedule, spec: CronJobSpec, decided_until_ms: WallMs, wall_ms: WallMs, reason: str, counts: Counts
) -> CatchUpPlan:
    """Decides on every time after `decided_until_ms` that is later than its start deadline at `wall_ms`."""
    until_ms = WallMs(wall_ms - spec.jitter_ms - round(spec.start_deadline_s * 1_000) - 1)
    cause = reason
    launch_max, window_from_ms = 0, decided_until_ms
    match spec.catch_up:
        case CatchUpPolicy.NONE:
            pass
        case CatchUpPolicy.LATEST:
            launch_max = 1
            reason += "; only the latest of the missed times is launched"
        case CatchUpPolicy.ALL:
            launch_max = spec.catch_up_limit
            window_from_ms = WallMs(wall_ms - round(spec.catch_up_window_s * 1_000) - 1)
            reason += (
                f"; of the missed times only those of the last {spec.catch_up_window_s:g} s are launched,"
                f" at most {spec.catch_up_limit}"
            )
    times = counts.latest(schedule, decided_until_ms, until_ms, MISSED_RECORDS_MAX + launch_max)
    launch = [time_ms for time_ms in times[-launch_max:] if time_ms > window_from_ms] if launch_max else []
    shared = share_one_record(schedule, decided_until_ms, times[-MISSED_RECORDS_MAX - len(launch) :], reason, counts)
    if shared is None:
        return CatchUpPlan(until_ms, frozenset(launch), cause, reason)
    return CatchUpPlan(until_ms, frozenset(launch), cause, reason, shared.until_ms, shared.reason)


def share_one_record(
    schedule: Schedule, after_ms: WallMs, tail: Sequence[WallMs], reason: str, counts: Counts
) -> Shared | None:
    """The record for all times after `after_ms` and before those of `tail`; None when there are none."""
    stretch = counts.count(schedule, after_ms, WallMs(tail[0] - 1)) if tail else None
    if stretch is None:
        return None
    count = str(stretch.counted) if stretch.counted <= MISSED_COUNT_MAX else f"more than {MISSED_COUNT_MAX}"
    reason += f"; this record stands for {count} times from {format_wall(stretch.first_ms)} on"
    return Shared(stretch.last_ms, reason, stretch.counted)
