"""Time as the code may know it: monotonic and wall time have different types, and clocks are passed in.

Intervals, leases and deadlines are counted on monotonic time only. Wall time is for schedules and for people.
Monotonic time goes on while the machine sleeps: a lease that stood still meanwhile would hold when it wakes up, and
others have led for long by then.
"""

from __future__ import annotations

import time
from typing import NewType, Protocol

Monotonic = NewType("Monotonic", float)
"""A reading of one process's monotonic clock, in seconds; means nothing in another process."""

WallMs = NewType("WallMs", int)
"""Wall time, in milliseconds since 1970-01-01T00:00:00Z; may step in either direction."""

NEVER_MS = WallMs(0)
"""Stands for "has not happened" wherever a wall time is stored."""


def offset_words(offset_s: float) -> str:
    """What a wall clock is of others, for people: "0.83 s ahead of" or "2400 s behind"."""
    amount = f"{abs(offset_s):.0f}" if abs(offset_s) >= 100 else f"{abs(offset_s):.3g}"
    return f"{amount} s {'ahead of' if offset_s > 0 else 'behind'}"


_ASLEEP_TOO: int | None = getattr(time, "CLOCK_BOOTTIME", None)
"""Linux stops its other monotonic clocks in sleep; where there is no such clock, the usual one has to do."""


def monotonic_s() -> float:
    """Seconds on the machine's monotonic clock, those that it slept among them."""
    return time.monotonic() if _ASLEEP_TOO is None else time.clock_gettime(_ASLEEP_TOO)


class Clock(Protocol):
    """Where a daemon reads the time. Decision-makers never hold one: they are handed readings."""

    def monotonic(self) -> Monotonic:
        """Seconds on the monotonic clock."""
        ...

    def wall_ms(self) -> WallMs:
        """Milliseconds on the wall clock."""
        ...


class SystemClock:
    """The clocks of the operating system."""

    def monotonic(self) -> Monotonic:
        return Monotonic(monotonic_s())

    def wall_ms(self) -> WallMs:
        return WallMs(time.time_ns() // 1_000_000)


class ManualClock:
    """Clocks that move only when told to; for tests and simulations."""

    def __init__(self, monotonic_s: float = 1_000.0, wall_ms: int = 1_700_000_000_000) -> None:
        self._monotonic_s = monotonic_s
        self._wall_ms = wall_ms

    def monotonic(self) -> Monotonic:
        return Monotonic(self._monotonic_s)

    def wall_ms(self) -> WallMs:
        return WallMs(self._wall_ms)

    def advance(self, seconds: float) -> None:
        """Moves both clocks forward by `seconds`, at least 0."""
        if seconds < 0:
            raise ValueError(f"a clock advances by at least 0 seconds, not {seconds}")
        self._monotonic_s += seconds
        self._wall_ms += round(seconds * 1_000)

    def step_wall(self, seconds: float) -> None:
        """Steps the wall clock alone, in either direction."""
        self._wall_ms += round(seconds * 1_000)
