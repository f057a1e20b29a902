"""Schedules against an independent evaluator that looks at every minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.control.schedule import Schedule
from coordinator.model import WallMs

MINUTE_MS = 60_000
ZONES = (
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "America/Havana",
    "Asia/Beirut",
    "Asia/Kathmandu",
    "America/St_Johns",
    "Africa/Casablanca",
    "Antarctica/Troll",
)


def _changes(name: str) -> list[int]:
    """Seconds since 1970 of the offset changes of 2024 to 2030, to the minute."""
    zone = ZoneInfo(name)
    found = []
    moment = datetime(2024, 1, 1, tzinfo=UTC)
    while moment.year <= 2030:
        later = moment + timedelta(days=1)
        if moment.astimezone(zone).utcoffset() != later.astimezone(zone).utcoffset():
            minute = moment
            while minute.astimezone(zone).utcoffset() == moment.astimezone(zone).utcoffset():
                minute += timedelta(minutes=1)
            found.append(round(minute.timestamp()))
        moment = later
    return found


CHANGES = {name: _changes(name) or [1_711_846_800] for name in ZONES}


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, str, int, list[int], list[int]]:
    """(expression, zone, a second near a change, minutes, hours)."""
    zone = draw(st.sampled_from(ZONES))
    start_s = draw(st.sampled_from(CHANGES[zone])) + draw(st.integers(-6 * 60, 4 * 60)) * 60
    minute_step = draw(st.sampled_from((0, 1, 7, 15, 20, 30)))
    hour_step = draw(st.sampled_from((0, 1, 2, 5)))
    minutes = list(range(0, 60, minute_step)) if minute_step else draw(st.lists(st.integers(0, 59), min_size=1))
    hours = list(range(0, 24, hour_step)) if hour_step else draw(st.lists(st.integers(0, 4), min_size=1))
    minute_field = f"*/{minute_step}" if minute_step else ",".join(map(str, minutes))
    hour_field = f"*/{hour_step}" if hour_step else ",".join(map(str, hours))
    seconds = draw(st.sampled_from(("", "0 ")))
    return f"{seconds}{minute_field} {hour_field} * * *", zone, start_s, minutes, hours


def _expected(
    expression: str, zone_name: str, start_s: int, end_s: int, minutes: list[int], hours: list[int]
) -> list[int]:
    """The due seconds in (start, end], by looking at each minute of real time, or of local time for set times."""
    zone = ZoneInfo(zone_name)
    due = set()
    if "*/" in expression.removeprefix("0 ").rsplit(" * * *", 1)[0]:
        for second in range(start_s - start_s % 60, end_s + 1, 60):
            local = datetime.fromtimestamp(second, zone)
            if local.minute in minutes and local.hour in hours:
                due.add(second)
    else:
        local = datetime.fromtimestamp(start_s, zone).replace(tzinfo=None, fold=0, second=0) - timedelta(days=1)
        for _ in range((end_s - start_s) // 60 + 3 * 1_440):
            if local.minute in minutes and local.hour in hours:
                due.add(_first_moment(local, zone))
            local += timedelta(minutes=1)
    return sorted(second for second in due if start_s < second <= end_s)


def _first_moment(local: datetime, zone: ZoneInfo) -> int:
    """When a local time comes first; in a gap, the first existing local time after it."""
    while True:
        moment = local.replace(tzinfo=zone).astimezone(UTC)
        if moment.astimezone(zone).replace(tzinfo=None, fold=0) == local:
            return round(moment.timestamp())
        local += timedelta(minutes=1)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_agrees_with_looking_at_every_minute(case: tuple[str, str, int, list[int], list[int]]) -> None:
    """Around every change of clocks, each due minute is found once and nothing else is."""
    expression, zone, start_s, minutes, hours = case
    end_s = start_s + 30 * 3_600
    found = Schedule(expression, zone).between(WallMs(start_s * 1_000), WallMs(end_s * 1_000), 10_000)
    assert [moment // 1_000 for moment in found] == _expected(expression, zone, start_s, end_s, minutes, hours)


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(0, 59_999), st.integers(1, 30))
def test_between_is_next_after_repeated(
    case: tuple[str, str, int, list[int], list[int]], offset_ms: int, limit: int
) -> None:
    """`between` gives what repeated `next_after` gives: ascending, without repetition, from any start within a gap."""
    expression, zone, start_s, _, _ = case
    schedule = Schedule(expression, zone)
    start_ms = WallMs(start_s * 1_000 + offset_ms)
    until_ms = WallMs(start_ms + 40 * 3_600_000)
    found = schedule.between(start_ms, until_ms, limit)
    assert found == sorted(set(found))
    moment: WallMs | None = start_ms
    for expected in found:
        assert moment is not None
        middle = WallMs((moment + expected) // 2)
        assert schedule.next_after(middle) == expected
        moment = schedule.next_after(moment)
        assert moment == expected
    if len(found) < limit and moment is not None:
        following = schedule.next_after(moment)
        assert following is None or following > until_ms


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(1, 200), st.integers(1, 40))
def test_latest_is_the_end_of_between(
    case: tuple[str, str, int, list[int], list[int]], hours_back: int, count: int
) -> None:
    """`latest` gives the last of what `between` gives."""
    expression, zone, start_s, _, _ = case
    schedule = Schedule(expression, zone)
    until_ms = WallMs(start_s * 1_000)
    after_ms = WallMs(until_ms - hours_back * 3_600_000)
    assert schedule.latest(after_ms, until_ms, count) == schedule.between(after_ms, until_ms, 100_000)[-count:]
