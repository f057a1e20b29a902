"""Which moments a schedule is due at, found by walking every minute; shares nothing with control/schedule.py.

The walk goes over real minutes, so a stretch of local time that comes twice is simply walked twice. DESIGN.md, section
8: set times that fall into a gap are due when it ends, once, and those that come twice the first time only; intervals
(`*` or `*/n` in the minute or the hour) are due at each real minute that matches. Zones change on whole minutes.
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

MINUTE_MS = 60_000
_EPOCH = datetime(1970, 1, 1)

Local = tuple[int, datetime, bool, tuple[datetime, ...]]
"""A real minute in ms, its local time, whether that comes for the second time, and the local minutes skipped before."""


def _numbers(field: str, low: int, high: int) -> frozenset[int]:
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = span.partition("-")
        begin = low if span == "*" else int(first)
        end = high if span == "*" or (step and not last) else int(last or first)
        found.update(range(begin, end + 1, int(step or 1)))
    return frozenset(found)


class Calendar:
    """The moments of one schedule between two wall times, both in ms."""

    def __init__(self, expression: str, zone: str, from_ms: int, until_ms: int) -> None:
        fields = expression.split()
        self._seconds = sorted(_numbers(fields[0], 0, 59)) if len(fields) == 6 else [0]
        minute, hour, day, month, weekday = fields[-5:]
        self._minutes, self._hours = _numbers(minute, 0, 59), _numbers(hour, 0, 23)
        self._days, self._months = _numbers(day, 1, 31), _numbers(month, 1, 12)
        self._weekdays = {number % 7 for number in _numbers(weekday, 0, 7)}
        self._any_day, self._any_weekday = day.startswith("*"), weekday.startswith("*")
        self._is_interval = minute.startswith("*") or hour.startswith("*")
        self.from_ms, self.until_ms = from_ms, until_ms
        self.times = self._walk(zone)

    def next_after(self, after_ms: int) -> int | None:
        """The first moment later than this one; None when it is beyond what was walked."""
        position = bisect_right(self.times, after_ms)
        return self.times[position] if position < len(self.times) else None

    def between(self, after_ms: int, until_ms: int) -> list[int]:
        """The moments after the one and up to the other, ascending."""
        return self.times[bisect_right(self.times, after_ms) : bisect_right(self.times, until_ms)]

    def _walk(self, zone: str) -> list[int]:
        found: list[int] = []
        for minute_ms, local, is_second, skipped in walk_zone(zone, self.from_ms, self.until_ms):
            if local.minute not in self._minutes and not skipped:
                continue
            matches = self._matches(local)
            if self._is_interval:
                if matches:
                    found += [minute_ms + second * 1_000 for second in self._seconds]
                continue
            if any(self._matches(minute) for minute in skipped):
                found.append(minute_ms)
            if matches and not is_second:
                moments = [minute_ms + second * 1_000 for second in self._seconds]
                found += [moment for moment in moments if moment not in found[-1:]]
        return found

    def _matches(self, local: datetime) -> bool:
        if local.minute not in self._minutes or local.hour not in self._hours or local.month not in self._months:
            return False
        is_day, is_weekday = local.day in self._days, local.isoweekday() % 7 in self._weekdays
        if self._any_day or self._any_weekday:
            return is_day and is_weekday
        return is_day or is_weekday


@lru_cache(maxsize=16)
def walk_zone(name: str, from_ms: int, until_ms: int) -> list[Local]:
    """Every real minute between the two with its local time."""
    zone = ZoneInfo(name)
    minutes: list[Local] = []
    before: datetime | None = None
    minute_ms = from_ms - from_ms % MINUTE_MS
    while minute_ms <= until_ms:
        aware = datetime.fromtimestamp(minute_ms // 1_000, zone)
        local = aware.replace(tzinfo=None, fold=0)
        skipped: list[datetime] = []
        if before is not None:
            missing = before + timedelta(minutes=1)
            while missing < local:
                skipped.append(missing)
                missing += timedelta(minutes=1)
        minutes.append((minute_ms, local, aware.fold == 1, tuple(skipped)))
        before = local
        minute_ms += MINUTE_MS
    return minutes
