"""Schedules: expressions, zones, and what happens when clocks change."""

from __future__ import annotations

from datetime import datetime

import pytest

from coordinator.control.clock_changes import clock_note, next_clock_note
from coordinator.control.schedule import WORDS, Schedule, compile_schedule, format_wall, schedule_fault, zone_fault
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
    ("expression", "words"),
    [
        ("", "has 0 fields"),
        ("* * * *", "is not a cron expression: it has 4 fields; use five fields (minute hour day month weekday)"),
        ("@fortnightly", "is not known; use @hourly, @daily,"),
        ("@reboot", "is not known; use @hourly, @daily,"),
        ("@daily 3", "has something behind @daily; write @daily alone"),
        ("@every", 'has no interval of whole hours, minutes and seconds behind @every; use "@every 90s"'),
        ("@every 90", "has no interval of whole hours"),
        ("@every 1.5s", "has no interval of whole hours"),
        ("@every 30m1h", "has no interval of whole hours"),
        ("@every 1h 30m", "has no interval of whole hours"),
        ("@every -5s", "has no interval of whole hours"),
        ("@every \u0665s", "has no interval of whole hours"),
        ("@every 0s", "has an interval of 0 s; use 1 s to 8784 h"),
        ("@every 8785h", "has an interval of 31626000 s; use 1 s to 8784 h"),
        ("61 * * * *", 'bad minute "61"; use 0 to 59'),
        ("0 61 * * * *", 'bad minute "61"; use 0 to 59'),
        ("60 * * * * *", 'bad second "60"; use 0 to 59'),
        ("0 24 * * *", 'bad hour "24"; use 0 to 23'),
        ("0 0 * 13 *", 'bad month "13"; use 1 to 12'),
        ("0 0 30 2 *", 'bad day-of-month "30"; use 1 to 31 as the months have them'),
        ("0 0 * * 5L/2", 'bad day-of-week "5L/2"; use 0 to 7'),
        ("*/0 * * * *", 'bad minute "*/0"'),
        ("1," * 200 + "1 * * * *", "has 409 characters; at most 256 are allowed"),
    ],
)
def test_problems_are_named(expression: str, words: str) -> None:
    """A schedule that cannot be used is refused in one line that names the field, its value and what would be right."""
    problem = schedule_fault(expression)
    assert problem is not None
    assert words in problem
    assert "\n" not in problem
    with pytest.raises(InvalidRequest, match=r"^schedule '"):
        Schedule(expression, "UTC")


@pytest.mark.parametrize("time_zone", ["Europe", "", "Mars/Olympus", "../../etc/passwd"])
def test_unknown_zones_are_named(time_zone: str) -> None:
    """A name that is no zone's is refused."""
    assert zone_fault(time_zone) == 'is not an IANA time zone; use one like "Europe/Berlin", or "UTC"'
    with pytest.raises(InvalidRequest, match=r"^time_zone '.*' is not an IANA"):
        Schedule("* * * * *", time_zone)


def test_sound_schedules_have_no_problem() -> None:
    """The fifteen loops' expressions, a six-field one, words and intervals are sound, and compiled once."""
    for expression in ("*/5 * * * *", "0 */3 * * *", "0 0 * * 0", "0 0 1 * *", "*/2 * * * * *", *WORDS, "@every 1h1s"):
        assert schedule_fault(expression) is None
        assert compile_schedule(expression, "UTC") is compile_schedule(expression, "UTC")


def test_words_stand_for_expressions() -> None:
    """Each word gives what its expression gives, in the zone of the job."""
    for word, expression in WORDS.items():
        after, until = at("2026-03-01T00:00"), at("2027-03-01T00:00")
        found = Schedule(word, "Europe/Berlin").between(after, until, 1_000)
        assert found == Schedule(expression, "Europe/Berlin").between(after, until, 1_000) != []


@pytest.mark.parametrize(
    ("expression", "interval_s"),
    [("@every 1s", 1), ("@every 90s", 90), ("@every 45m", 2_700), ("@every 1h30m", 5_400), ("@every 25h", 90_000)],
)
def test_intervals_are_multiples_from_the_epoch(expression: str, interval_s: int) -> None:
    """An interval is due at its multiples since 1970 in every zone, from whenever one looks, whatever clocks do."""
    begin = at("2024-03-31T00:00")
    for time_zone in ("UTC", "Europe/Berlin", "Australia/Lord_Howe"):
        found = Schedule(expression, time_zone).between(WallMs(begin + 1), WallMs(begin + 3 * DAY_MS), 20)
        first = (begin // 1_000 // interval_s + 1) * interval_s
        assert found == [WallMs((first + number * interval_s) * 1_000) for number in range(len(found))]
        assert found
        assert Schedule(expression, time_zone).next_after(WallMs(found[0] - 1)) == found[0]


FORWARD, BACK = "clocks go forward from 02:00 to 03:00: ", "clocks go back from 03:00 to 02:00: "


@pytest.mark.parametrize(
    ("expression", "moment", "note"),
    [
        ("30 2 * * *", "2024-03-31T01:00", FORWARD + "02:30 does not exist, runs once at 03:00"),
        ("0,30 2,3 * * *", "2024-03-31T01:00", FORWARD + "02:00 and 02:30 do not exist, run once together at 03:00"),
        ("30 2 * * *", "2024-03-30T01:30", ""),
        ("0 3 * * *", "2024-03-31T01:00", ""),
        ("30 2 * * *", "2024-10-27T00:30", BACK + "02:30 comes twice, runs the first time"),
        ("0 2 * * *", "2024-10-27T00:00", BACK + "02:00 comes twice, runs the first time"),
        ("0 3 * * *", "2024-10-27T02:00", ""),
        ("59 1 * * *", "2024-10-26T23:59", ""),
        ("*/30 * * * *", "2024-10-27T00:30", BACK + "02:30 comes twice, runs both times, here the first"),
        ("*/30 * * * *", "2024-10-27T01:30", BACK + "02:30 comes twice, runs both times, here the second"),
        ("*/30 * * * *", "2024-10-27T02:00", ""),
        ("0 * * * *", "2024-03-31T01:00", FORWARD + "02:00 does not exist, goes on at 03:00"),
        ("*/10 * * * *", "2024-03-31T01:00", FORWARD + "6 times from 02:00 to 02:50 do not exist, goes on at 03:00"),
        ("*/10 * * * *", "2024-03-31T01:10", ""),
        ("*/30 2 * * *", "2024-04-01T00:00", FORWARD + "02:00 and 02:30 do not exist, are left out"),
        ("15 */2 * * *", "2024-03-31T02:15", FORWARD + "02:15 does not exist, is left out"),
        ("@every 1h", "2024-03-31T01:00", ""),
    ],
)
def test_notes_say_what_a_change_of_clocks_does(expression: str, moment: str, note: str) -> None:
    """A due time that is shifted, repeated or follows a gap says so; its neighbours say nothing."""
    schedule = Schedule(expression, "Europe/Berlin")
    assert schedule.next_after(WallMs(at(moment) - 1)) == at(moment)
    assert clock_note(schedule, at(moment)) == note


def test_the_next_note_is_found_far_ahead() -> None:
    """Months before the clocks change, the first time that will be different is found; a job at noon has none."""
    begin, end = at("2024-04-15T00:00"), at("2025-04-15T00:00")
    found = next_clock_note(Schedule("45 1 * * *", "Australia/Lord_Howe"), begin, end)
    note = "clocks go back from 02:00 to 01:30: 01:45 comes twice, runs the first time"
    assert found == (at("2025-04-05T14:45"), note)
    assert next_clock_note(Schedule("0 12 * * *", "Europe/Berlin"), begin, end) is None
    assert next_clock_note(Schedule("0 2 * * *", "UTC"), begin, end) is None
    assert next_clock_note(Schedule("@every 1h", "Europe/Berlin"), begin, end) is None


def test_the_end_of_the_calendar_is_no_error() -> None:
    """Beyond the year 9999 there is no next moment."""
    assert Schedule("0 0 1 1 *", "UTC").next_after(WallMs(253_402_300_000_000)) is None
