"""When a cron expression is due, found by looking at every second or minute of real time: slow, simple, and without
anything of coordinator/control/.

It has its own reading of the fields and its own form of the rules where clocks change. Set times: a job is due at the
first real moment at which the clock shows, or has just gone past, a matching local time that it has never shown or gone
past before. Intervals: at each real moment whose local time matches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

BOUNDS = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")


@dataclass(frozen=True, slots=True)
class Fields:
    """The six fields of an expression as sets."""

    seconds: frozenset[int]
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    both_days: bool
    """True when day and weekday must both match, which is so when one of them begins with a star."""
    is_interval: bool

    def match(self, local: datetime) -> bool:
        """True when the local time is one of the expression's."""
        if local.second not in self.seconds or local.minute not in self.minutes or local.hour not in self.hours:
            return False
        if local.month not in self.months:
            return False
        day, weekday = local.day in self.days, (local.weekday() + 1) % 7 in self.weekdays
        return (day and weekday) if self.both_days else (day or weekday)


def read(expression: str) -> Fields:
    """The fields of an expression of stars, numbers, names, ranges, lists and steps."""
    texts = expression.upper().split()
    texts = ["0", *texts] if len(texts) == 5 else texts
    second, minute, hour, day, month, weekday = (
        frozenset(_members(text, *bounds)) for text, bounds in zip(texts, BOUNDS, strict=True)
    )
    return Fields(
        seconds=second,
        minutes=minute,
        hours=hour,
        days=day,
        months=month,
        weekdays=frozenset(number % 7 for number in weekday),
        both_days=texts[3][0] == "*" or texts[5][0] == "*",
        is_interval=texts[1][0] == "*" or texts[2][0] == "*",
    )


def _members(text: str, low: int, high: int) -> Iterator[int]:
    for part in text.split(","):
        span, _, step = part.partition("/")
        if span == "*":
            first, last = low, high
        else:
            begin, _, end = span.partition("-")
            first = _number(begin)
            last = _number(end) if end else high if step else first
        yield from range(first, last + 1, int(step or 1))


def _number(text: str) -> int:
    if text in DAYS:
        return DAYS.index(text)
    return MONTHS.index(text) + 1 if text in MONTHS else int(text)


class Walk:
    """Real time from one second to another in equal steps, with what clocks show. The first step is only the beginning:
    there must be no change of clocks less than a repeated stretch before it."""

    def __init__(self, zone: ZoneInfo, start_s: int, end_s: int, step_s: int) -> None:
        step = timedelta(seconds=step_s)
        self.moments: list[tuple[int, datetime, list[datetime]]] = []
        """Each step after the first: its second, what clocks show, and what they go past or show for the first time."""
        newest = datetime.fromtimestamp(start_s, zone).replace(tzinfo=None)
        for second in range(start_s + step_s, end_s + 1, step_s):
            local = datetime.fromtimestamp(second, zone).replace(tzinfo=None)
            new = []
            while newest < local:
                newest += step
                new.append(newest)
            self.moments.append((second, local, new))

    def due(self, fields: Fields) -> list[int]:
        """The due seconds."""
        match = fields.match
        if fields.is_interval:
            return [second for second, local, _ in self.moments if match(local)]
        return [second for second, _, new in self.moments if any(map(match, new))]


def changes_of(zone: ZoneInfo, from_year: int, to_year: int) -> list[int]:
    """The first seconds of new offsets, from the beginning of one year to the end of another. No offset of these years
    lasts less than a month (Ramadan in Morocco), so one look a week is enough."""
    found = []
    moment = round(datetime(from_year, 1, 1, tzinfo=UTC).timestamp())
    end = round(datetime(to_year + 1, 1, 1, tzinfo=UTC).timestamp())
    week = 7 * 86_400
    while moment < end:
        if (before := _offset(zone, moment)) != _offset(zone, moment + week):
            last, first = moment, moment + week
            while first - last > 1:
                middle = (first + last) // 2
                if _offset(zone, middle) == before:
                    last = middle
                else:
                    first = middle
            found.append(first)
        moment += week
    return found


def _offset(zone: ZoneInfo, second: int) -> timedelta:
    offset = datetime.fromtimestamp(second, zone).utcoffset()
    assert offset is not None
    return offset
