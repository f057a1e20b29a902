"""Cron expressions in a time zone: which seconds they name. Pure.

cronsim parses the expression and walks the calendar without a zone; this module maps the local times that it finds to
moments. Debian's rules where clocks change:

- A schedule at **set times** (neither the minute nor the hour field starts with `*`): a local time in the gap is due
  once, at the moment the gap ends (several of them together, once); a local time that comes twice is due the first
  time only.
- A schedule at **intervals** (`*` or `*/n` in the minute or the hour field): each real moment whose local time
  matches is due. So an hour that comes twice is served twice, and one that does not exist is not served, which keeps
  "every ten minutes" at ten real minutes.

cronsim applies these rules to five fields only, and its zone arithmetic loses times after changes of half an hour or at
midnight (Lord Howe, Havana); hence the mapping here. Resolution is one second; offsets come from `zoneinfo`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

FORM = "five fields (minute hour day month weekday), or six with seconds first"
_EPOCH = datetime(1970, 1, 1)
_SECOND = timedelta(seconds=1)
_FIELDS = {
    "second": "0 to 59",
    "minute": "0 to 59",
    "hour": "0 to 23",
    "day-of-month": "1 to 31 as the months have them, or L for the last",
    "month": "1 to 12, or JAN to DEC",
    "day-of-week": "0 to 7 (0 and 7 are Sunday), or SUN to SAT",
}
"""What each field may be, by cronsim's name of it, in the order of six fields."""


class CronCalendar:
    """A cron expression in a zone. Immutable. Raises ValueError, with what is wrong in one line, when it cannot be."""

    __slots__ = ("_walker", "is_interval", "zone")

    def __init__(self, expression: str, zone: ZoneInfo) -> None:
        self.zone = zone
        self._walker = _parse(expression)
        minute, hour = self._walker.parts[1], self._walker.parts[2]
        self.is_interval = minute.startswith("*") or hour.startswith("*")
        """True for a schedule at intervals, False for one at set times: see above."""

    def next_after_s(self, after_s: int) -> int | None:
        """The first due second later than `after_s`; None when there is none within about fifty years."""
        try:
            local = datetime.fromtimestamp(after_s, self.zone)
            return self._next_interval(local, after_s) if self.is_interval else self._next_set_time(local, after_s)
        except (OverflowError, ValueError, OSError):
            return None  # The calendar ends with the year 9999.

    def local_matches(self, first: datetime, end: datetime) -> Iterator[datetime]:
        """The local times that the expression names, from `first` on and before `end`, whether they exist or not."""
        for match in self._walk_from(first - _SECOND):
            if match >= end:
                return
            yield match

    def _next_set_time(self, local: datetime, after_s: int) -> int | None:
        """Set times: every local match stands for one moment, and later matches never for earlier moments."""
        walker = self._walk_from(_naive(local))
        for match in walker:
            first_offset_s, second_offset_s = self._offsets_s(match)
            match_s = _seconds(match)
            if first_offset_s < second_offset_s:  # In the gap: as soon as it ends.
                moment_s = self._change_within(match_s - second_offset_s, match_s - first_offset_s)
            else:
                moment_s = match_s - first_offset_s
            if moment_s > after_s:
                return moment_s
        return None

    def _next_interval(self, local: datetime, after_s: int) -> int | None:
        """Intervals: the first moment whose local time matches."""
        found_s = self._first_matching(_naive(local), after_s)
        first_offset_s, second_offset_s = self._offsets_s(_naive(local))
        if local.fold == 0 and first_offset_s > second_offset_s:
            # This local time will come again: what matches earlier in the repeated stretch may be next.
            local_s = _seconds(_naive(local))
            change_s = self._change_within(local_s - first_offset_s, local_s - second_offset_s)
            repeat_begins = _EPOCH + timedelta(seconds=change_s + second_offset_s) - _SECOND
            repeated_s = self._first_matching(repeat_begins, change_s - 1)
            if repeated_s is not None and (found_s is None or repeated_s < found_s):
                return repeated_s
        return found_s

    def _first_matching(self, from_local: datetime, after_s: int) -> int | None:
        """The first moment later than `after_s` among those of the local matches later than `from_local`."""
        walker = self._walk_from(from_local)
        for match in walker:
            first_offset_s, second_offset_s = self._offsets_s(match)
            match_s = _seconds(match)
            if first_offset_s < second_offset_s:  # Does not exist: go on where the gap ends.
                change_s = self._change_within(match_s - second_offset_s, match_s - first_offset_s)
                walker.dt = _EPOCH + timedelta(seconds=change_s + second_offset_s) - _SECOND
                continue
            for offset_s in (first_offset_s, second_offset_s):
                if match_s - offset_s > after_s:
                    return match_s - offset_s
        return None

    def _walk_from(self, local: datetime) -> CronSim:
        """The calendar's matches later than `local`, ascending, without a zone."""
        walker = copy.copy(self._walker)
        walker.dt = local
        return walker

    def _offsets_s(self, local: datetime) -> tuple[int, int]:
        """Seconds east of UTC before and after a change, were `local` in one; equal when it is not."""
        first = local.replace(tzinfo=self.zone).utcoffset()
        second = local.replace(tzinfo=self.zone, fold=1).utcoffset()
        assert first is not None
        assert second is not None
        return (first.days * 86_400 + first.seconds, second.days * 86_400 + second.seconds)

    def _change_within(self, before_s: int, after_s: int) -> int:
        """The first second of the new offset, given a moment before the change and one at or after it."""
        new_offset = datetime.fromtimestamp(after_s, self.zone).utcoffset()
        while after_s - before_s > 1:
            middle_s = (before_s + after_s) // 2
            if datetime.fromtimestamp(middle_s, self.zone).utcoffset() == new_offset:
                after_s = middle_s
            else:
                before_s = middle_s
        return after_s


def _parse(expression: str) -> CronSim:
    fields = expression.split()
    if len(fields) not in (5, 6):
        raise ValueError(f"is not a cron expression: it has {len(fields)} fields; use {FORM}")
    try:
        return CronSim(expression, _EPOCH)
    except (CronSimError, ValueError, AssertionError) as error:
        name = str(error).removeprefix("Bad ")
        if name not in _FIELDS:
            raise ValueError(f"is not a cron expression: {str(error) or 'unreadable'}; use {FORM}") from None
        value = ["0", *fields][-6:][list(_FIELDS).index(name)]
        raise ValueError(f'is not a cron expression: bad {name} "{value}"; use {_FIELDS[name]}') from None


def _naive(local: datetime) -> datetime:
    return local.replace(tzinfo=None, fold=0)


def _seconds(local: datetime) -> int:
    since = local - _EPOCH
    return since.days * 86_400 + since.seconds
