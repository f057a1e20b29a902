"""Schedules: which moments a job is due at, whatever form its schedule has. Pure.

    */5 * * * *, 30 0 9 * * MON-FRI    a cron expression, read in the job's zone: cron_calendar.py has its rules
    @hourly, @daily, ...               a word for one (WORDS)
    @every 90s, @every 1h30m           the multiples of the interval, counted from the Unix epoch

The last needs no zone and no beginning, so that all masters and all leaders agree on its moments, and neither a restart
nor a change of clocks shifts them.

Invariants: `next_after(t) > t`; it never decreases with `t`; `between` and `latest` give what repeated `next_after`
gives. Times are whole seconds.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol
from zoneinfo import ZoneInfo

from coordinator.control.cron_calendar import FORM, CronCalendar
from coordinator.model import WallMs
from coordinator.model.errors import InvalidRequest

EXPRESSION_LENGTH_MAX = 256
WORDS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
EVERY = "@every"
EVERY_S_MAX = 366 * 86_400
LOOKED_AT_MIN = 60
"""So many moments are looked at to find the last few: a first window of a minute has no more."""
_DURATION = re.compile(r"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", re.ASCII)
_EVERY_FORM = f'use "{EVERY} 90s", "{EVERY} 45m" or "{EVERY} 1h30m"'
_CHECK_FROM_S = 1_704_067_200
"""2024-01-01T00:00:00Z: from where a first time is looked for, so that the answer is always the same."""


class Rule(Protocol):
    """What a form of schedule has to know."""

    def next_after_s(self, after_s: int) -> int | None:
        """The first due second later than `after_s`; None when there is none."""
        ...


class Every:
    """An interval in seconds, counted from the Unix epoch."""

    __slots__ = ("interval_s",)

    def __init__(self, interval_s: int) -> None:
        self.interval_s = interval_s

    def next_after_s(self, after_s: int) -> int | None:
        """The next multiple."""
        return (after_s // self.interval_s + 1) * self.interval_s


class Schedule:
    """A compiled schedule. Immutable; share it freely. Raises InvalidRequest with one line when it cannot be."""

    __slots__ = ("expression", "rule", "time_zone")

    def __init__(self, expression: str, time_zone: str) -> None:
        self.expression = expression
        self.time_zone = time_zone
        zone = zone_of(time_zone)
        try:
            self.rule: Rule = _parse(expression, zone)
        except ValueError as error:
            raise InvalidRequest(f"schedule {expression!r} {error}") from None

    def next_after(self, wall_ms: WallMs) -> WallMs | None:
        """The first due moment later than `wall_ms`; None when there is none within about fifty years."""
        found_s = self.rule.next_after_s(wall_ms // 1_000)
        return None if found_s is None else WallMs(found_s * 1_000)

    def between(self, after_ms: WallMs, until_ms: WallMs, limit: int) -> list[WallMs]:
        """The first `limit` due moments later than `after_ms` and not later than `until_ms`, ascending."""
        found: list[WallMs] = []
        moment = self.next_after(after_ms)
        while moment is not None and moment <= until_ms and len(found) < limit:
            found.append(moment)
            moment = self.next_after(moment)
        return found

    def latest(self, after_ms: WallMs, until_ms: WallMs, count: int) -> list[WallMs]:
        """The last `count` due moments later than `after_ms` and not later than `until_ms`, ascending.

        Looks back in windows that double, so a long stretch of time costs about what it holds near its end. A window
        that turns out to hold too many (as one of a schedule that rests for a season) is cut in halves.
        """
        if count <= 0:
            return []
        found_max = 2 * count + LOOKED_AT_MIN
        short_ms, long_ms = until_ms, None  # From the one on there are too few moments, from the other on too many.
        from_ms = max(after_ms, WallMs(until_ms - 60_000))
        while True:
            found = self.between(from_ms, until_ms, found_max + 1)
            if len(found) > found_max:
                long_ms = from_ms
            elif len(found) >= count or from_ms <= after_ms:
                return found[-count:]
            else:
                short_ms = from_ms
            if long_ms is None:
                from_ms = max(after_ms, WallMs(until_ms - 2 * (until_ms - from_ms)))
            else:
                from_ms = WallMs((long_ms + short_ms) // 2)


@lru_cache(maxsize=4_096)
def compile_schedule(expression: str, time_zone: str) -> Schedule:
    """As `Schedule`, remembered. Raises InvalidRequest."""
    return Schedule(expression, time_zone)


@lru_cache(maxsize=4_096)
def schedule_fault(expression: str) -> str | None:
    """What is wrong with a schedule, to be read after its name; None when nothing is.

    The only judge, of the API, of files and of the controllers. Remembered: a search may cross years.
    """
    try:
        rule = _parse(expression, ZoneInfo("UTC"))
    except ValueError as error:
        return str(error)
    if rule.next_after_s(_CHECK_FROM_S) is None:
        return "never comes: no day has these fields; check day and month"
    return None


def zone_of(name: str) -> ZoneInfo:
    """The time zone. Raises InvalidRequest."""
    if fault := zone_fault(name):
        raise InvalidRequest(f"time_zone {name!r} {fault}")
    return ZoneInfo(name)


def zone_fault(name: str) -> str | None:
    """What is wrong with the name of a time zone, to be read after it; None when nothing is."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return 'is not an IANA time zone; use one like "Europe/Berlin", or "UTC"'
    return None


def format_wall(wall_ms: WallMs) -> str:
    """RFC 3339 in UTC, with milliseconds only where there are any."""
    moment = datetime.fromtimestamp(wall_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{moment}.{wall_ms % 1_000:03}Z" if wall_ms % 1_000 else f"{moment}Z"


def _parse(expression: str, zone: ZoneInfo) -> Rule:
    """The rule of an expression. Raises ValueError with what is wrong, to be read after the expression."""
    if len(expression) > EXPRESSION_LENGTH_MAX:
        raise ValueError(f"has {len(expression)} characters; at most {EXPRESSION_LENGTH_MAX} are allowed")
    words = expression.split()
    if not words or not words[0].startswith("@"):
        return CronCalendar(expression, zone)
    if words[0] == EVERY:
        return Every(_interval_s(words[1:]))
    if words[0] not in WORDS:
        raise ValueError(f"is not known; use {', '.join(WORDS)}, {EVERY} with an interval, or {FORM}")
    if len(words) > 1:
        raise ValueError(f"has something behind {words[0]}; write {words[0]} alone")
    return CronCalendar(WORDS[words[0]], zone)


def _interval_s(words: list[str]) -> int:
    """The seconds of `1h30m`. Raises ValueError."""
    match = _DURATION.fullmatch(words[0]) if len(words) == 1 else None
    if match is None or not words[0]:
        raise ValueError(f"has no interval of whole hours, minutes and seconds behind {EVERY}; {_EVERY_FORM}")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    interval_s = hours * 3_600 + minutes * 60 + seconds
    if not 1 <= interval_s <= EVERY_S_MAX:
        raise ValueError(f"has an interval of {interval_s} s; use 1 s to {EVERY_S_MAX // 3_600} h")
    return interval_s
