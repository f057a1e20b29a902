"""What a change of clocks does to the times of a schedule, in words. Pure.

The words follow from the rules of cron_calendar.py and are computed beside it, from the zone's offsets alone; a
property test holds the two together. Intervals of `@every` have no zone and so no note.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from coordinator.control.cron_calendar import CronCalendar
from coordinator.control.schedule import Schedule
from coordinator.model import WallMs

DAY_S = 86_400
LOOK_AROUND_S = 2 * DAY_S
"""How far from a time its change of clocks can be: a job of the hour that is left out is due a day later."""
NAMED_MAX = 3
"""So many times are named one by one; of more the first and the last."""
_EPOCH = datetime(1970, 1, 1)


@dataclass(frozen=True, slots=True)
class ClockChange:
    """The first second with another offset. Offsets are seconds east of UTC."""

    at_s: int
    offset_before_s: int
    offset_after_s: int

    @property
    def gain_s(self) -> int:
        """How far clocks go forward; below 0 when they go back."""
        return self.offset_after_s - self.offset_before_s

    @property
    def local_before(self) -> datetime:
        """What clocks would show without the change."""
        return _EPOCH + timedelta(seconds=self.at_s + self.offset_before_s)

    @property
    def local_after(self) -> datetime:
        """What they show."""
        return _EPOCH + timedelta(seconds=self.at_s + self.offset_after_s)

    @property
    def words(self) -> str:
        """For people."""
        direction = "forward" if self.gain_s > 0 else "back"
        return f"clocks go {direction} from {_time(self.local_before)} to {_time(self.local_after)}"


def clock_changes(zone: ZoneInfo, after_s: int, until_s: int) -> Iterator[ClockChange]:
    """The changes later than `after_s` and not later than `until_s`, ascending. None lasts less than a day."""
    before_s, offset_s = after_s, _offset_s(zone, after_s)
    while before_s < until_s:
        next_s = min(before_s + DAY_S, until_s)
        if _offset_s(zone, next_s) != offset_s:
            low_s, high_s = before_s, next_s
            while high_s - low_s > 1:
                middle_s = (low_s + high_s) // 2
                low_s, high_s = (middle_s, high_s) if _offset_s(zone, middle_s) == offset_s else (low_s, middle_s)
            next_s, before_offset_s, offset_s = high_s, offset_s, _offset_s(zone, high_s)
            yield ClockChange(high_s, before_offset_s, offset_s)
        before_s = next_s


def clock_note(schedule: Schedule, moment_ms: WallMs) -> str:
    """What a change of clocks does to a due moment of the schedule, in one sentence; empty for nothing."""
    rule, moment_s = schedule.rule, moment_ms // 1_000
    if not isinstance(rule, CronCalendar):
        return ""
    for change in clock_changes(rule.zone, moment_s - LOOK_AROUND_S, moment_s + LOOK_AROUND_S):
        if change.gain_s < 0 and abs(moment_s - change.at_s + 0.5) < -change.gain_s:
            return _note_of_repeat(rule, change, moment_s)
        if change.gain_s > 0 and change.at_s <= moment_s and rule.next_after_s(change.at_s - 1) == moment_s:
            return _note_of_gap(rule, change, moment_s)
    return ""


def next_clock_note(schedule: Schedule, after_ms: WallMs, until_ms: WallMs) -> tuple[WallMs, str] | None:
    """The first due moment later than `after_ms` to which a change of clocks does something, and what."""
    rule, after_s = schedule.rule, after_ms // 1_000
    if not isinstance(rule, CronCalendar):
        return None
    for change in clock_changes(rule.zone, after_s - LOOK_AROUND_S, until_ms // 1_000):
        from_s = max(after_s, min(change.at_s, change.at_s + change.gain_s) - 1)
        moment_s = rule.next_after_s(from_s)
        if moment_s is not None and (note := clock_note(schedule, WallMs(moment_s * 1_000))):
            return WallMs(moment_s * 1_000), note
    return None


def _note_of_repeat(rule: CronCalendar, change: ClockChange, moment_s: int) -> str:
    is_first = moment_s < change.at_s
    offset_s = change.offset_before_s if is_first else change.offset_after_s
    time = _time(_EPOCH + timedelta(seconds=moment_s + offset_s))
    runs = "runs the first time"
    if rule.is_interval:
        runs = f"runs both times, here the {'first' if is_first else 'second'}"
    return f"{change.words}: {time} comes twice, {runs}"


def _note_of_gap(rule: CronCalendar, change: ClockChange, moment_s: int) -> str:
    missing = [_time(local) for local in rule.local_matches(change.local_before, change.local_after)]
    if not missing:
        return ""
    at = _time(change.local_after)
    if not rule.is_interval:
        runs = f"runs once at {at}" if len(missing) == 1 else f"run once together at {at}"
    else:
        left_out = "is left out" if len(missing) == 1 else "are left out"
        runs = f"goes on at {at}" if moment_s == change.at_s else left_out
    if len(missing) > NAMED_MAX:
        named = f"{len(missing)} times from {missing[0]} to {missing[-1]}"
    else:
        named = " and ".join(filter(None, (", ".join(missing[:-1]), missing[-1])))
    return f"{change.words}: {named} {'does' if len(missing) == 1 else 'do'} not exist, {runs}"


def _offset_s(zone: ZoneInfo, moment_s: int) -> int:
    offset = datetime.fromtimestamp(moment_s, zone).utcoffset()
    assert offset is not None
    return offset.days * DAY_S + offset.seconds


def _time(local: datetime) -> str:
    return f"{local:%H:%M:%S}" if local.second else f"{local:%H:%M}"
