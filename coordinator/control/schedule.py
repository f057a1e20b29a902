"""Cron expressions in a time zone: which moments a job is due at. Pure.

cronsim parses the expression and walks the calendar without a zone; this module maps the local times that it finds to
moments. Five fields (minute, hour, day, month, weekday) or six with seconds first. Debian's rules where clocks change:

- A schedule at **set times** (neither the minute nor the hour field starts with `*`): a local time in the gap is due
  once, at the moment the gap ends (several of them together, once); a local time that comes twice is due the first
  time only.
- A schedule at **intervals** (`*` or `*/n` in the minute or the hour field): each real moment whose local time
  matches is due. So an hour that comes twice is served twice, and one that does not exist is not served, which keeps
  "every ten minutes" at ten real minutes.

cronsim applies these rules to five fields only, and its zone arithmetic loses times after changes of half an hour or at
midnight (Lord Howe, Havana); hence the mapping here. Resolution is one second; offsets come from `zoneinfo`.

Invariants: `next_after(t) > t`; it never decreases with `t`; `between` and `latest` give what repeated `next_after`
gives.
"""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from coordinator.model import WallMs
from coordinator.model.errors import InvalidRequest

EXPRESSION_LENGTH_MAX = 256
_EPOCH = datetime(1970, 1, 1)
_CHECK_FROM_MS = WallMs(1_704_067_200_000)
"""2024-01-01T00:00:00Z: from where `check_schedule` looks for a first time, so that its answer is always the same."""
_SECOND = timedelta(seconds=1)
_FORM = "five fields (minute hour day month weekday), or six with seconds first"


class Schedule:
    """A compiled schedule. Immutable; share it freely. Raises InvalidRequest with one line when it cannot be."""

    __slots__ = ("_is_interval", "_walker", "_zone", "expression", "time_zone")

    def __init__(self, expression: str, time_zone: str) -> None:
        self.expression = expression
        self.time_zone = time_zone
        self._zone = _load_zone(time_zone)
        self._walker = _parse(expression)
        minute, hour = self._walker.parts[1], self._walker.parts[2]
        self._is_interval = minute.startswith("*") or hour.startswith("*")

    def next_after(self, wall_ms: WallMs) -> WallMs | None:
        """The first due moment later than `wall_ms`; None when there is none within about fifty years."""
        after_s = wall_ms // 1_000
        try:
            local = datetime.fromtimestamp(after_s, self._zone)
            found_s = self._next_interval(local, after_s) if self._is_interval else self._next_set_time(local, after_s)
        except (OverflowError, ValueError, OSError):
            return None  # The calendar ends with the year 9999.
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

        Looks back in windows that double, so a long stretch of time costs about what it holds near its end.
        """
        window_ms = 60_000
        while True:
            from_ms = max(after_ms, WallMs(until_ms - window_ms))
            found: list[WallMs] = []
            moment = self.next_after(from_ms)
            while moment is not None and moment <= until_ms:
                found.append(moment)
                moment = self.next_after(moment)
            if len(found) >= count or from_ms <= after_ms:
                return found[-count:] if count > 0 else []
            window_ms *= 2

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
        first = local.replace(tzinfo=self._zone).utcoffset()
        second = local.replace(tzinfo=self._zone, fold=1).utcoffset()
        assert first is not None
        assert second is not None
        return (first.days * 86_400 + first.seconds, second.days * 86_400 + second.seconds)

    def _change_within(self, before_s: int, after_s: int) -> int:
        """The first second of the new offset, given a moment before the change and one at or after it."""
        new_offset = datetime.fromtimestamp(after_s, self._zone).utcoffset()
        while after_s - before_s > 1:
            middle_s = (before_s + after_s) // 2
            if datetime.fromtimestamp(middle_s, self._zone).utcoffset() == new_offset:
                after_s = middle_s
            else:
                before_s = middle_s
        return after_s


@lru_cache(maxsize=4_096)
def compile_schedule(expression: str, time_zone: str) -> Schedule:
    """As `Schedule`, remembered. Raises InvalidRequest."""
    return Schedule(expression, time_zone)


@lru_cache(maxsize=4_096)
def check_schedule(expression: str, time_zone: str) -> str | None:
    """What is wrong with a schedule, in one line; None when nothing is. Remembered: a search may cross years."""
    try:
        schedule = compile_schedule(expression, time_zone)
    except InvalidRequest as error:
        return str(error)
    if schedule.next_after(_CHECK_FROM_MS) is None:
        return f"schedule {expression!r} never comes: no day has these fields; check day and month"
    return None


def format_wall(wall_ms: WallMs) -> str:
    """RFC 3339 in UTC, with milliseconds only where there are any."""
    moment = datetime.fromtimestamp(wall_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{moment}.{wall_ms % 1_000:03}Z" if wall_ms % 1_000 else f"{moment}Z"


def _load_zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise InvalidRequest(
            f"time_zone {name!r} is not known; use a name of the IANA data base such as 'Europe/Berlin' or 'UTC'"
        ) from None


def _parse(expression: str) -> CronSim:
    if len(expression) > EXPRESSION_LENGTH_MAX:
        raise InvalidRequest(f"schedule has {len(expression)} characters; at most {EXPRESSION_LENGTH_MAX} are allowed")
    fields = len(expression.split())
    if fields not in (5, 6):
        raise InvalidRequest(f"schedule {expression!r} has {fields} fields; use {_FORM}")
    try:
        return CronSim(expression, _EPOCH)
    except (CronSimError, ValueError, AssertionError) as error:
        fault = str(error)[:1].lower() + str(error)[1:] or "not a cron expression"
        raise InvalidRequest(f"schedule {expression!r}: {fault}; use {_FORM}") from None


def _naive(local: datetime) -> datetime:
    return local.replace(tzinfo=None, fold=0)


def _seconds(local: datetime) -> int:
    since = local - _EPOCH
    return since.days * 86_400 + since.seconds
