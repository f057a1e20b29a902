"""Schedules around every change of clocks of every zone from 2024 to 2030, against `tests/schedule_oracle.py`.

The suite takes a few expressions for each change, others for each zone; the campaign takes many:
`SCHEDULE_DRAWS=60 tools/test -m campaign -k schedule`.
"""

from __future__ import annotations

import os
import random
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

import pytest

from coordinator.control.clock_changes import clock_note
from coordinator.control.schedule import Schedule
from coordinator.model import WallMs
from tests.schedule_oracle import Walk, changes_of, read

YEARS = (2024, 2030)
DRAWS_IN_SUITE = 3
DRAWS_IN_CAMPAIGN = int(os.environ.get("SCHEDULE_DRAWS", "40"))
MUST_HAVE = {
    "Australia/Lord_Howe": 14,  # Half an hour.
    "America/Havana": 14,  # At midnight.
    "Europe/Dublin": 14,  # Summer time is the standard, winter time the exception.
    "Africa/Casablanca": 15,  # Back for Ramadan, forward after it.
    "America/Scoresbysund": 13,
    "Antarctica/Troll": 14,  # Two hours.
    "Asia/Almaty": 1,  # Back once, for good.
}
"""Zones that the enumeration must find, with their numbers of changes."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of clocks."""

    zone_name: str
    at_s: int

    @property
    def zone(self) -> ZoneInfo:
        """Where."""
        return ZoneInfo(self.zone_name)

    def local(self, seconds_later: int) -> datetime:
        """What clocks show so long after it."""
        return datetime.fromtimestamp(self.at_s + seconds_later, self.zone).replace(tzinfo=None)


@cache
def all_changes() -> tuple[Change, ...]:
    """Every change of every zone, those of zones that are alike once."""
    found: dict[tuple[object, ...], list[Change]] = {}
    for name in sorted(zoneinfo.available_timezones()):
        changes = [Change(name, at_s) for at_s in changes_of(ZoneInfo(name), *YEARS)]
        alike = tuple((change.at_s, change.local(-1), change.local(0)) for change in changes)
        # A zone that must be there keeps its own name.
        if alike and (alike not in found or name in MUST_HAVE):
            found[alike] = changes
    return tuple(change for changes in found.values() for change in changes)


def expressions(change: Change, rng: random.Random) -> Iterator[str]:
    """Five-field expressions that come near the change, without end, set times and intervals."""
    near = [change.local(-1), change.local(0), change.local(-1) + timedelta(seconds=1), change.local(7_200)]
    while True:
        moment = rng.choice(near)
        hours = sorted({moment.hour, rng.choice(near).hour})
        minute = rng.choice(
            (
                "0",
                "30",
                "15,45",
                "5-25/10",
                "0-59/20",
                "50/3",
                f"{rng.randrange(60)}",
                f"{rng.randrange(60)}",
                "*/7",
                "*/30",
                "*",
            )
        )
        hour = rng.choice(
            (f"{moment.hour}", ",".join(map(str, hours)), f"{hours[0]}-{hours[-1]}", "0-23/2", "0-23", "*", "*/5")
        )
        weekday = f"{moment:%a}"
        day = rng.choice(("* *", "* *", f"{moment.day} *", f"{moment.day},1 {moment.month}", f"*/2 {moment:%b}"))
        yield f"{minute} {hour} {day} {rng.choice(('*', '*', weekday, f'{weekday},3-4'))}"


def compare(change: Change, walk: Walk, expression: str, start_s: int, end_s: int) -> None:
    """The schedule and the oracle agree, and a time that a change touches says so, and only such a time."""
    schedule, fields = Schedule(expression, change.zone_name), read(expression)
    found = schedule.between(WallMs(start_s * 1_000), WallMs(end_s * 1_000), 100_000)
    expected = walk.due(fields)
    where = f"{expression!r} in {change.zone_name} around {change.at_s}"
    assert [moment // 1_000 for moment in found] == expected, where
    touched = {moment for moment, _, new in walk.moments if len(new) > 1}
    shown = [local for _, local, _ in walk.moments]
    twice = {local for local in shown if shown.count(local) > 1} if len(set(shown)) < len(shown) else set()
    local_at = {moment: local for moment, local, _ in walk.moments}
    for second in expected if len(expected) <= 40 else ():
        note = clock_note(schedule, WallMs(second * 1_000))
        if local_at[second] in twice:
            assert "comes twice" in note, where
        elif second in touched and not fields.match(local_at[second]):
            assert "not exist" in note, where
        elif not fields.is_interval and second not in touched:
            assert "not exist" not in note, where


def minutes_around(change: Change, draws: int, rng: random.Random) -> None:
    """Every minute from four hours before the change to six after it."""
    start_s, end_s = change.at_s - 4 * 3_600, change.at_s + 6 * 3_600
    walk = Walk(change.zone, start_s, end_s, 60)
    drawn = expressions(change, rng)
    for _ in range(draws):
        compare(change, walk, next(drawn), start_s, end_s)


def seconds_around(change: Change, draws: int, rng: random.Random) -> None:
    """Every second of the two minutes before the change and after it."""
    start_s, end_s = change.at_s - 120, change.at_s + 120
    walk = Walk(change.zone, start_s, end_s, 1)
    drawn = expressions(change, rng)
    for _ in range(draws):
        second = rng.choice(("0", "*/20", "59", "7-50/9", f"{rng.randrange(60)}"))
        compare(change, walk, f"{second} {next(drawn)}", start_s, end_s)


def test_the_zones_are_all_there() -> None:
    """The enumeration has the zones with half an hour, midnight, negative and single changes, with all of these."""
    counts: dict[str, int] = {}
    for change in all_changes():
        counts[change.zone_name] = counts.get(change.zone_name, 0) + 1
    assert {name: counts.get(name, 0) for name in MUST_HAVE} == MUST_HAVE
    assert len(counts) >= 30


def test_every_minute_around_every_change() -> None:
    """Around each change of each zone, drawn schedules are due at the minutes that looking at every minute finds."""
    for number, change in enumerate(all_changes()):
        minutes_around(change, DRAWS_IN_SUITE, random.Random(number))


def test_every_second_around_changes() -> None:
    """Around each change of each zone, schedules with seconds are due at the seconds that looking at each finds."""
    for number, change in enumerate(all_changes()):
        seconds_around(change, DRAWS_IN_SUITE, random.Random(number))


def test_intervals_are_the_multiples_of_real_seconds() -> None:
    """`@every` is due at each second that its interval divides, whatever clocks do, by looking at every second."""
    rng = random.Random(1)
    for change in random.Random(2).sample(all_changes(), 20):
        interval_s = rng.choice((1, 7, 90, 600, 1_800, 3_600, 5_400))
        start_s, end_s = change.at_s - 2_000, change.at_s + 6_000
        expected = [second for second in range(start_s + 1, end_s + 1) if second % interval_s == 0]
        found = Schedule(f"@every {interval_s}s", change.zone_name).between(
            WallMs(start_s * 1_000), WallMs(end_s * 1_000), 100_000
        )
        assert [moment // 1_000 for moment in found] == expected


@pytest.mark.campaign
@pytest.mark.timeout(7_200)
def test_schedule_campaign() -> None:
    """The same with many more schedules at every change, minutes and seconds."""
    for number, change in enumerate(all_changes()):
        minutes_around(change, DRAWS_IN_CAMPAIGN, random.Random(f"minutes {number}"))
        seconds_around(change, max(1, DRAWS_IN_CAMPAIGN // 4), random.Random(f"seconds {number}"))
