"""What becomes of scheduled times that passed while nobody could launch. Pure.

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

What is launched is committed WAITING, each with a slot of its own (`Slots`), so that an outage does not end in a flood.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.control.overlap import is_paced
from coordinator.control.schedule import Schedule, format_wall
from coordinator.model import CatchUpPolicy, CronJobSpec, Launch, Monotonic, WallMs

MISSED_RECORDS_MAX = 100
MISSED_COUNT_MAX = 1_000
"""Counting costs about 20 us each on the leader's event loop: 20 ms."""


@dataclass(frozen=True, slots=True)
class CatchUpPlan:
    """The verdicts on all times up to `until_ms`. Invariant: shared_until_ms < every member of `launch`."""

    until_ms: WallMs
    launch: frozenset[WallMs]
    reason: str
    """Why the other times are missed."""
    shared_until_ms: WallMs | None = None
    """Times up to this one share one record."""
    shared_reason: str = ""


def make_plan(
    schedule: Schedule, spec: CronJobSpec, decided_until_ms: WallMs, wall_ms: WallMs, reason: str
) -> CatchUpPlan:
    """Decides on every time after `decided_until_ms` that is later than its start deadline at `wall_ms`."""
    until_ms = WallMs(wall_ms - spec.jitter_ms - round(spec.start_deadline_s * 1_000) - 1)
    match spec.catch_up:
        case CatchUpPolicy.NONE:
            launch: list[WallMs] = []
        case CatchUpPolicy.LATEST:
            launch = schedule.latest(decided_until_ms, until_ms, 1)
            reason += "; only the latest of the missed times is launched"
        case CatchUpPolicy.ALL:
            window_from_ms = WallMs(wall_ms - round(spec.catch_up_window_s * 1_000) - 1)
            launch = schedule.latest(max(decided_until_ms, window_from_ms), until_ms, spec.catch_up_limit)
            reason += (
                f"; of the missed times only those of the last {spec.catch_up_window_s:g} s are launched,"
                f" at most {spec.catch_up_limit}"
            )
    tail = schedule.latest(decided_until_ms, until_ms, MISSED_RECORDS_MAX + len(launch))
    shared = share_one_record(schedule, decided_until_ms, tail, reason)
    if shared is None:
        return CatchUpPlan(until_ms, frozenset(launch), reason)
    return CatchUpPlan(until_ms, frozenset(launch), reason, shared.until_ms, shared.reason)


@dataclass(frozen=True, slots=True)
class Shared:
    """One record that stands for many times; it sits at the last of them."""

    until_ms: WallMs
    reason: str
    counted: int


def share_one_record(schedule: Schedule, after_ms: WallMs, tail: Sequence[WallMs], reason: str) -> Shared | None:
    """The record for all times after `after_ms` and before those of `tail`; None when there are none."""
    if not tail:
        return None
    before_tail_ms = WallMs(tail[0] - 1)
    times = schedule.between(after_ms, before_tail_ms, MISSED_COUNT_MAX + 1)
    if not times:
        return None
    count = str(len(times)) if len(times) <= MISSED_COUNT_MAX else f"more than {MISSED_COUNT_MAX}"
    until_ms = schedule.latest(after_ms, before_tail_ms, 1)[0]
    reason += f"; this record stands for {count} times from {format_wall(times[0])} on"
    return Shared(until_ms, reason, len(times))


class Slots:
    """When the launches of all catch-ups may start: one every 1/`per_s` seconds, over all jobs of the cluster.

    Kept on the monotonic clock, so that a step of the wall clock neither bunches nor delays them. A new leader goes on
    after the latest slot among the launches that still wait.
    """

    def __init__(self, launches: Iterable[Launch], per_s: float, now: Monotonic, wall: WallMs) -> None:
        self._apart_s = 1 / per_s
        latest_ms = max((launch.not_before_ms for launch in launches if is_paced(launch)), default=None)
        self._next: Monotonic = now
        if latest_ms is not None:
            self._next = Monotonic(max(now, now + (latest_ms - wall) / 1_000 + self._apart_s))

    def take(self, now: Monotonic, wall: WallMs) -> WallMs:
        """The next slot, as wall time, rounded up so that slots are never closer than they should be."""
        slot = max(now, self._next)
        self._next = Monotonic(slot + self._apart_s)
        return WallMs(wall + math.ceil(round((slot - now) * 1_000, 3)))
