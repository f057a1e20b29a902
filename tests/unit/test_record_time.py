"""The time in a shard's records, by which request ids are forgotten: whatever wall clocks say, it is not ahead."""

from __future__ import annotations

from coordinator.model import Monotonic, WallMs
from worker_agent.record_time import RecordTime

START_MS = 1_790_000_000_000
HOUR_MS = 3_600_000


def test_a_fast_wall_clock_gains_nothing() -> None:
    """Shows that a primary whose clock is an hour ahead goes on from the log's time, as fast as time passes."""
    times = RecordTime()
    assert times.next_ms(Monotonic(5.0), WallMs(START_MS + HOUR_MS), START_MS) == START_MS
    assert times.next_ms(Monotonic(6.5), WallMs(START_MS + HOUR_MS + 1_500), START_MS) == START_MS + 1_500


def test_many_writes_within_a_millisecond_do_not_stop_the_time() -> None:
    """Shows that the time is counted from one moment, so nothing is rounded away."""
    times = RecordTime()
    for count in range(10_001):
        now_s = count / 10_000
        last_ms = times.next_ms(Monotonic(now_s), WallMs(START_MS + round(now_s * 1_000)), START_MS)
    assert last_ms == START_MS + 1_000


def test_after_a_fast_clock_nothing_is_forgotten_at_once() -> None:
    """Shows that a log whose time is ahead of this clock stays there, and its records are of the latest time."""
    times = RecordTime()
    ahead_ms = START_MS + HOUR_MS
    assert times.next_ms(Monotonic(1.0), WallMs(START_MS), ahead_ms) == ahead_ms
    assert times.next_ms(Monotonic(2.0), WallMs(START_MS + 1_000), ahead_ms) == ahead_ms


def test_a_new_shard_begins_with_the_wall_clock() -> None:
    """Shows where a log without records begins, and that an idle hour counts."""
    times = RecordTime()
    assert times.next_ms(Monotonic(1.0), WallMs(START_MS), 0) == START_MS
    assert times.next_ms(Monotonic(3_601.0), WallMs(START_MS + HOUR_MS), START_MS) == START_MS + HOUR_MS


def test_what_another_primary_wrote_meanwhile_counts() -> None:
    """Shows that a worker that becomes primary again goes on from the log, not from where it was."""
    times = RecordTime()
    times.next_ms(Monotonic(1.0), WallMs(START_MS), 0)
    assert times.next_ms(Monotonic(100.0), WallMs(START_MS + 99_000), START_MS + 50_000) == START_MS + 50_000
