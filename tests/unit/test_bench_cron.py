"""The cron benchmark's own arithmetic: lateness, what is missed or doubled, rates, and the first run after a kill."""

from __future__ import annotations

import math

import pytest

from tools.bench_lib.cron_runs import (
    NS_PER_S,
    Run,
    account,
    first_after_s,
    most_per_s,
    parse_ours,
    parse_relative,
    parse_timed,
    per_s,
)
from tools.bench_lib.main import names

MS = 1_000_000


def run(second: float, late_ms: float, job: str = "a") -> Run:
    """A run that was due at a second and started so late."""
    due_ns = round(second * NS_PER_S)
    return Run(job, due_ns, due_ns + round(late_ms * MS))


def test_every_second_of_the_window_counts_once() -> None:
    """Shows lateness by due time, a second that is missed, and one that started twice, of which the first counts."""
    runs = [run(9.9, 1), run(10.5, 2), run(11.5, 3000), run(11.5, 4), run(13.5, 5), run(14.0, 6)]
    found = account(runs, ["a"], 10, 14)
    assert (sorted(found.lateness_ms), found.missed, found.doubled) == ([2, 4, 5], 1, 1)


def test_a_job_that_never_ran_missed_all() -> None:
    """Shows that jobs are counted one by one: too many runs of one do not make up for another."""
    found = account([run(10, 1), run(10.2, 1), run(10.4, 1), run(11, 1)], ["a", "b"], 10, 12)
    assert (found.missed, found.doubled) == (2, 0)


def test_a_rate_counts_starts_and_not_due_times() -> None:
    """Shows that what was due before the window, and started in it, is work of the window."""
    assert per_s([run(1, 1_500), run(2, 100), run(3, 1_500)], 2 * NS_PER_S, 4 * NS_PER_S) == 1.0


def test_more_is_asked_until_it_falls_short() -> None:
    """Shows that the highest rate counts, and that nobody is asked for more than they could not do."""
    asked: list[int] = []

    def rate_of(jobs: int) -> float:
        asked.append(jobs)
        return {100: 100.0, 200: 198.0, 400: 150.0}[jobs]

    assert most_per_s((100, 200, 400, 800), rate_of) == 198.0
    assert asked == [100, 200, 400]


def test_the_first_run_after_a_kill_is_of_what_became_due_after_it() -> None:
    """Shows that a run that the killed leader had ordered does not count, and that time runs from before the kill."""
    runs = [run(10.0, 30), run(10.05, 900), run(10.02, 800)]
    assert first_after_s(runs, 10 * NS_PER_S, 10 * NS_PER_S + 10 * MS) == pytest.approx(0.82)
    assert math.isinf(first_after_s([], 0, 0))


def test_lines_of_the_sinks() -> None:
    """Shows what each system's runs write: a token and a start; due and start; for beat what it sent and a start."""
    assert parse_ours("a/5000/2 5100000000\n", {"a": 7 * MS}) == [Run("a", 5_007 * MS, 5_100 * MS)]
    assert parse_timed("a 5 7\n") == [Run("a", 5, 7)]
    sent = "a 1000000000 1000000001\nb 5 6\na 2002000000 2003000000\n"
    assert parse_relative(sent) == [Run("a", 2_000 * MS, 2_003 * MS)]


@pytest.mark.parametrize("helper", ["cron_apscheduler", "cron_celery", "cron_celery_app", "cron_ours", "cron_runs"])
def test_helpers_are_no_benchmarks(helper: str) -> None:
    """Shows that only what can be run is listed."""
    assert helper not in names()
    assert "cron" in names()
