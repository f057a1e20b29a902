"""Virtual time that jumps from event to event, with a clock for the sessions that stands still while all is well.

A year of heartbeats would cost hours, and in a cluster where every worker is heard, every lease holds and nobody is
expected, one heartbeat changes nothing. So whatever counts the sessions' time (the workers' session machines, their
leases, the membership controller) lives on `session_now`, which runs from each fault until all is well again and stands
still otherwise. Everything else (schedules, order timeouts, runs, retries) counts `now`, which never stands.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

from coordinator.model import Monotonic

Event = Callable[[], object]


class Time:
    """Events in the order of their time, and of their making among those of one time."""

    def __init__(self) -> None:
        self.now = Monotonic(1_000.0)
        self.is_frozen = False
        self.frozen_at = Monotonic(0.0)
        """Session time at which it stands, while it does."""
        self._lag_s = 0.0
        self._session_reached = 0.0
        """The session clock shows at least this, however `now - lag` is rounded."""
        self._order = 0
        self._events: list[tuple[float, int, Event]] = []
        self._session_events: list[tuple[float, int, Event]] = []

    @property
    def session_now(self) -> Monotonic:
        """The clock of the sessions."""
        if self.is_frozen:
            return self.frozen_at
        return Monotonic(max(self._session_reached, self.now - self._lag_s))

    def at(self, time: float, what: Event) -> None:
        """Calls `what` at a time."""
        self._order += 1
        heapq.heappush(self._events, (time, self._order, what))

    def after(self, delay_s: float, what: Event) -> None:
        """Calls `what` after a delay."""
        self._order += 1
        heapq.heappush(self._events, (self.now + delay_s, self._order, what))

    def at_session(self, time: float, what: Event) -> None:
        """Calls `what` at a session time."""
        self._order += 1
        heapq.heappush(self._session_events, (time, self._order, what))

    def freeze(self) -> None:
        """The clock of the sessions stands."""
        if not self.is_frozen:
            self.frozen_at, self.is_frozen = self.session_now, True

    def thaw(self) -> None:
        """The clock of the sessions goes on."""
        if self.is_frozen:
            self.is_frozen = False
            self._lag_s = self.now - self.frozen_at

    def run_until(self, end: float) -> None:
        """Lets time go on."""
        events, session_events = self._events, self._session_events
        while True:
            time = events[0][0] if events else math.inf
            is_session = False
            if session_events and not self.is_frozen:
                session_time = session_events[0][0] + self._lag_s
                if session_time < time:
                    time, is_session = session_time, True
            if time > end:
                break
            own_time, _, what = heapq.heappop(session_events if is_session else events)
            if time > self.now:
                self.now = Monotonic(time)
            if is_session and own_time > self._session_reached:
                self._session_reached = own_time
            what()
        self.now = Monotonic(max(self.now, end))


class Alarm:
    """The next call of something that says when it wants to be called; the latest word counts."""

    def __init__(self, set_at: Callable[[float, Event], None], clock: Callable[[], float], ring: Event) -> None:
        self._set_at, self._clock, self._ring = set_at, clock, ring
        self._wanted = math.inf
        self._set_for = math.inf

    def want(self, time: float | None) -> None:
        """Replaces the time; None for never."""
        self._wanted = math.inf if time is None else time
        if self._wanted < self._set_for:
            self._set_for = self._wanted
            self._set_at(self._wanted, self._rings)

    def _rings(self) -> None:
        if self._clock() < self._set_for:
            return  # An older entry of the heap, for a time that was replaced by an earlier one.
        self._set_for = math.inf
        if self._wanted <= self._clock():
            self._wanted = math.inf
            self._ring()
        else:
            self.want(self._wanted)
