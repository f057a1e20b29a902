"""Schedules: expressions, zones, and what happens when clocks change."""

from __future__ import annotations

from datetime import datetime

import pytest

from coordinator.control.schedule import Schedule, check_schedule, compile_schedule, format_wall
from coordinator.model import WallMs
from coordinator.model.errors import InvalidRequest

DAY_MS = 86_400_000


def at(text: str) -> WallMs:
    """A moment from RFC 3339 without seconds or zone, in UTC."""
    return WallMs(round(datetime.fromisoformat(f"{text}+00:00").timestamp() * 1_000))


def times(expression: str, time_zone: str, after: str, until: str) -> list[str]:
    """The due moments in UTC, as day of the month, hour and minute."""
    found = Schedule(expression, time_zone).between(at(after), at(until), 1_000)
    return [format_wall(moment)[8:16].replace("T", " ") for moment in found]


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("*/5 * * * *", "2026-03-01T10:02:30", "2026-03-01T10:05:00Z"),
        ("0 * * * *", "2026-03-01T10:00:00", "2026-03-01T11:00:00Z"),
        ("0 */12 * * *", "2026-03-01T12:00:00", "2026-03-02T00:00:00Z"),
        ("0 0 * * 0", "2026-03-02T00:00:00", "2026-03-08T00:00:00Z"),
        ("0 0 1 * *", "2026-03-01T00:00:00", "2026-04-01T00:00:00Z"),
        ("0 0 29 2 *", "2026-03-01T00:00:00", "2028-02-29T00:00:00Z"),
        ("0 9 * * MON-FRI", "2026-03-06T09:00:00", "2026-03-09T09:00:00Z"),
        ("* * * * * *", "2026-03-01T10:00:00", "2026-03-01T10:00:01Z"),
        ("*/15 30 2 * * *", "2026-03-01T02:30:45", "2026-03-02T02:30:00Z"),
        ("0 0 L * *", "2026-02-01T00:00:00", "2026-02-28T00:00:00Z"),
    ],
)
def test_next_in_utc(expression: str, after: str, expected: str) -> None:
    """Five fields, and six with seconds first, give the next moment strictly after the given one."""
    moment = Schedule(expression, "UTC").next_after(at(after))
    assert moment is not None
    assert format_wall(moment) == expected


def test_next_is_after_fractions_of_a_second() -> None:
    """A moment within a second counts as after its beginning, and the next one is a whole second."""
    schedule = Schedule("* * * * * *", "UTC")
    assert schedule.next_after(WallMs(1_999)) == 2_000
    assert schedule.next_after(WallMs(2_000)) == 3_000


@pytest.mark.parametrize(
    ("expression", "time_zone", "after", "until", "expected"),
    [
        # Gap of an hour: once, just after it; three times in it, once too.
        ("30 2 * * *", "Europe/Berlin", "2024-03-30T12:00", "2024-04-01T12:00", ["31 01:00", "01 00:30"]),
        ("10,20,30 2 * * *", "Europe/Berlin", "2024-03-30T12:00", "2024-03-31T12:00", ["31 01:00"]),
        ("0 30 2 * * *", "Europe/Berlin", "2024-03-30T12:00", "2024-03-31T12:00", ["31 01:00"]),
        ("30 2 * * *", "America/New_York", "2024-03-09T12:00", "2024-03-11T12:00", ["10 07:00", "11 06:30"]),
        # Overlap of an hour: the first time only, also with a field of seconds.
        ("30 2 * * *", "Europe/Berlin", "2024-10-26T12:00", "2024-10-28T12:00", ["27 00:30", "28 01:30"]),
        ("0 30 2 * * *", "Europe/Berlin", "2024-10-26T12:00", "2024-10-28T12:00", ["27 00:30", "28 01:30"]),
        ("30 1 * * *", "America/New_York", "2024-11-02T12:00", "2024-11-04T12:00", ["03 05:30", "04 06:30"]),
        # Half an hour (2:00 becomes 2:30; 2:00 becomes 1:30).
        ("15 2 * * *", "Australia/Lord_Howe", "2024-10-05T00:00", "2024-10-06T23:00", ["05 15:30", "06 15:15"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2024-04-05T20:00", "2024-04-07T20:00", ["06 14:45", "07 15:15"]),
        # At midnight (0:00 becomes 1:00).
        ("0 0 * * *", "America/Havana", "2024-03-08T12:00", "2024-03-11T12:00", ["09 05:00", "10 05:00", "11 04:00"]),
        ("15 0 * * *", "Asia/Beirut", "2024-03-30T00:00", "2024-04-01T00:00", ["30 22:00", "31 21:15"]),
    ],
)
def test_set_times_at_clock_changes(
    expression: str, time_zone: str, after: str, until: str, expected: list[str]
) -> None:
    """A set time in the gap is due once just after it, and one that comes twice is due the first time."""
    assert times(expression, time_zone, after, until) == expected


@pytest.mark.parametrize(
    ("expression", "time_zone", "after", "until", "expected"),
    [
        ("*/30 * * * *", "Europe/Berlin", "2024-03-31T00:00", "2024-03-31T02:00", ["00:30", "01:00", "01:30", "02:00"]),
        ("*/30 2 * * *", "Europe/Berlin", "2024-10-27T00:00", "2024-10-27T12:00", ["00:30", "01:00", "01:30"]),
        ("0 */2 * * *", "Europe/Berlin", "2024-10-26T21:00", "2024-10-27T04:00", ["22:00", "00:00", "01:00", "03:00"]),
        # From the first pass into the second: the walk must come back to local times that it has seen.
        ("*/20 1 * * *", "Australia/Lord_Howe", "2024-04-06T14:30", "2024-04-06T16:00", ["14:40", "15:10"]),
        # The hour that follows the change of half an hour is whole.
        (
            "*/20 3 * * *",
            "Australia/Lord_Howe",
            "2024-10-05T10:00",
            "2024-10-05T18:00",
            ["16:00", "16:20", "16:40"],
        ),
        ("0 */5 10 3 *", "America/Havana", "2024-03-09T12:00", "2024-03-10T15:00", ["09:00", "14:00"]),
    ],
)
def test_intervals_at_clock_changes(
    expression: str, time_zone: str, after: str, until: str, expected: list[str]
) -> None:
    """A schedule with a star in minute or hour is due at each real moment whose local time matches."""
    assert [moment[3:] for moment in times(expression, time_zone, after, until)] == expected


def test_latest_equals_the_end_of_between() -> None:
    """`latest` looks back in growing windows and finds what `between` finds, also when most windows are empty."""
    for expression in ("* * * * * *", "*/10 * * * *", "0 0 1 * *", "0 0 29 2 *"):
        schedule = Schedule(expression, "Europe/Berlin")
        until = at("2026-03-01T00:00")
        after = WallMs(until - (3_600_000 if expression.startswith("* *") else 400 * DAY_MS))
        everything = schedule.between(after, until, 100_000)
        for count in (0, 1, 7):
            assert schedule.latest(after, until, count) == everything[len(everything) - min(count, len(everything)) :]


@pytest.mark.parametrize(
    ("expression", "time_zone", "words"),
    [
        ("", "UTC", "has 0 fields"),
        ("* * * *", "UTC", "has 4 fields"),
        ("@daily", "UTC", "has 1 fields"),
        ("61 * * * *", "UTC", "bad minute"),
        ("0 24 * * *", "UTC", "bad hour"),
        ("0 0 30 2 *", "UTC", "bad day-of-month"),
        ("0 0 * * 5L/2", "UTC", "bad day-of-week"),
        ("*/0 * * * *", "UTC", "bad minute"),
        ("1," * 200 + "1 * * * *", "UTC", "characters"),
        ("* * * * *", "Europe", "'Europe' is not known"),
        ("* * * * *", "", "'' is not known"),
        ("* * * * *", "../../etc/passwd", "is not known"),
    ],
)
def test_problems_are_named(expression: str, time_zone: str, words: str) -> None:
    """A schedule that cannot be used is refused in one line that names the value."""
    problem = check_schedule(expression, time_zone)
    assert problem is not None
    assert words in problem
    assert "\n" not in problem
    with pytest.raises(InvalidRequest):
        Schedule(expression, time_zone)


def test_sound_schedules_have_no_problem() -> None:
    """The fifteen loops' expressions and a six-field one are sound, and compiled once."""
    for expression in ("*/5 * * * *", "0 */3 * * *", "0 0 * * 0", "0 0 1 * *", "*/2 * * * * *"):
        assert check_schedule(expression, "Asia/Kathmandu") is None
        assert compile_schedule(expression, "UTC") is compile_schedule(expression, "UTC")


def test_the_end_of_the_calendar_is_no_error() -> None:
    """Beyond the year 9999 there is no next moment."""
    assert Schedule("0 0 1 1 *", "UTC").next_after(WallMs(253_402_300_000_000)) is None
