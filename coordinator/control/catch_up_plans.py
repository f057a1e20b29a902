"""The catch-up plans of many jobs, a few at a time. A passive machine.

After an outage of all masters, or a step of the wall clock, every job needs a plan (catch_up.py) in the same instant.
One looks at up to some 1,600 scheduled times (5,500 with the largest `catch_up_limit`), 15 to 20 us each, on the
leader's event loop; while that stands still nobody hears the leader, and after 0.3 s another one is elected. So:

- In TURN_S plans may look at TIMES_PER_TURN times, and the last of them beyond: measured are 25 to 40 ms at once, and
  on average a third of the event loop. What was looked at beyond is taken off the next turn.
- Jobs whose plan has to wait take their turns in the order of their coming. A job that needs none waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator

from coordinator.control.catch_up import CatchUpPlan, Counts, make_plan
from coordinator.control.schedule import Schedule
from coordinator.control.timers import Moment
from coordinator.model import CronJob, Monotonic

TIMES_PER_TURN = 1_000
TURN_S = 0.05


class CatchUpPlanner:
    """Makes plans in turns. `next_turn` is set while jobs wait for theirs."""

    def __init__(self) -> None:
        self._waiting: dict[str, None] = {}
        self._counts = Counts()
        self._times_left = TIMES_PER_TURN
        self._turn_at: Monotonic | None = None

    @property
    def next_turn(self) -> Monotonic | None:
        """When plans are made for jobs that wait."""
        return self._turn_at if self._waiting else None

    def plan(self, at: Moment, job: CronJob, schedule: Schedule, reason: str) -> CatchUpPlan | None:
        """The job's plan; None when it has to wait for its turn."""
        self._begin_turn(at.now)
        if self._times_left <= 0:
            self._waiting[job.id] = None
            return None
        self._waiting.pop(job.id, None)
        before = self._counts.looked_at
        plan = make_plan(schedule, job.spec, job.closed_until_ms, at.wall, reason, self._counts)
        self._times_left -= self._counts.looked_at - before
        return plan

    def turns(self, now: Monotonic) -> Iterator[str]:
        """The jobs whose turn it is, at the end of a step."""
        self._begin_turn(now)
        while self._waiting and self._times_left > 0:
            job_id = next(iter(self._waiting))
            del self._waiting[job_id]
            yield job_id
        if not self._waiting:
            self._counts.forget()

    def _begin_turn(self, now: Monotonic) -> None:
        if self._turn_at is None or now >= self._turn_at:
            self._times_left = min(TIMES_PER_TURN, self._times_left + TIMES_PER_TURN)
            self._turn_at = Monotonic(now + TURN_S)
