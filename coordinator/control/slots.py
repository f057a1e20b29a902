"""When launches that are late may start, so that the end of an outage is no flood. Pure, but for the next slot.

Two kinds take turns, each by slots of its own, over all jobs of the cluster: what a catch-up makes up for
(catch_up.py), and what can still start within its deadline, but is late by more than ON_TIME_MS: of an outage of a
minute nothing is beyond the usual deadline, and all of it would start at once. The latter does not wait behind the
former: what has an hour behind it can have another minute, and what is urgent may be late by seconds only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from coordinator.control.overlap import is_only_late, is_paced
from coordinator.machine.state import State
from coordinator.model import Launch, Monotonic, WallMs

ON_TIME_MS = 5_000
"""What is not later starts at once. A failover takes one to two seconds, with an election that fails three: that is no
outage, and 100 jobs per second would need ten times as long to start by slots. What piles up meanwhile is what workers
would have started in these five seconds anyhow."""


def split_late(state: State) -> tuple[list[Launch], list[Launch]]:
    """The launches that wait for a slot: those that are only late, and those of catch-ups."""
    late: list[Launch] = []
    old: list[Launch] = []
    for launch in state.launches.values():
        if is_paced(launch) and launch.job_id in state.jobs:
            (late if is_only_late(state.jobs[launch.job_id].spec, launch) else old).append(launch)
    return late, old


class Slots:
    """One slot every 1/`per_s` seconds.

    Kept on the monotonic clock, so that a step of the wall clock neither bunches nor delays them. A new leader goes on
    after the latest slot among the launches of the kind that still wait.
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

    def take_before(self, now: Monotonic, wall: WallMs, until_ms: WallMs) -> WallMs:
        """As `take`, but not later than `until_ms`: where no slot is left until then, it starts without one."""
        if self._next > now + (until_ms - wall) / 1_000:
            return until_ms
        return self.take(now, wall)
