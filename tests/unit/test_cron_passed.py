"""The leader's cron controller on what passed in a pause or under another schedule: a record each, or a shared one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.control.catch_up import MISSED_COUNT_MAX
from coordinator.control.passed import JOBS_AT_ONCE, PASSED_RECORDS_MAX, TIMES_PER_STEP, records_of
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CatchUpPolicy, CronJob, CronJobSpec, LaunchState, OverlapPolicy, PassedTimes, WallMs
from tests.cron_harness import START_MS, CronHarness, every_second

WEEK_S = 7 * 86_400


def pause(harness: CronHarness, paused: bool = True, job_id: str = "tick") -> None:
    """Pauses or resumes a job."""
    harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id=job_id, paused=paused))


def pause_all(harness: CronHarness, paused: bool = True) -> None:
    """Pauses or resumes all jobs."""
    settings = types_pb2.Settings(replicas=2, cron_paused=paused)
    harness.accept(change_settings=command_pb2.ChangeSettings(settings=settings))


def edit(harness: CronHarness, spec: CronJobSpec) -> None:
    """Changes a job."""
    harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(spec)))


def reasons(harness: CronHarness) -> list[tuple[int, str]]:
    """What was recorded: (seconds since the start, reason)."""
    skipped = [launch for launch in harness.history() if launch.state is LaunchState.SKIPPED]
    return [((launch.scheduled_at_ms - START_MS) // 1_000, launch.reason) for launch in skipped]


@pytest.mark.parametrize("catch_up", CatchUpPolicy)
def test_a_pause_of_a_week_makes_few_records(catch_up: CatchUpPolicy) -> None:
    """Of a job of every second the last times have a record each and the others share one; nothing is made up for."""
    harness = CronHarness(every_second(catch_up=catch_up))
    harness.lead()
    pause(harness)
    harness.advance(60)
    harness.clock.advance(WEEK_S - 60)
    harness.tick()
    assert harness.proposed == []
    pause(harness, False)
    assert len(harness.proposed) == 2
    shared, *single = reasons(harness)
    assert single == [(WEEK_S - back, "the job was paused") for back in reversed(range(PASSED_RECORDS_MAX))]
    assert shared == (
        WEEK_S - PASSED_RECORDS_MAX,
        f"the job was paused; this record stands for more than {MISSED_COUNT_MAX} times from 2026-01-01T12:00:01Z on",
    )
    assert harness.orders == []
    harness.advance(1)
    assert harness.story()[-1] == (WEEK_S + 1, "COMMITTED")
    assert harness.state.jobs["tick"].passed == ()


def test_the_next_leader_goes_on_with_the_records() -> None:
    """A leader that is lost within them, with one on its way, leaves the rest to the next; none is lost or doubled."""
    for is_applied in (True, False):
        harness = CronHarness(every_second())
        harness.lead()
        pause(harness)
        harness.advance(30)
        harness.hold = True
        pause(harness, False)
        harness.release()
        harness.control = None
        if is_applied:
            harness.apply(harness.held[0].command)
        assert len(harness.history()) == (1 + PASSED_RECORDS_MAX if is_applied else 1)
        harness.hold = False
        harness.lead()
        seconds = [second for second, _ in reasons(harness)]
        assert seconds == list(range(30 - PASSED_RECORDS_MAX, 31))
        assert "this record stands for 10 times from 2026-01-01T12:00:01Z on" in reasons(harness)[0][1]


def test_a_leader_that_comes_after_pause_and_edit_knows_all() -> None:
    """What was paused, resumed and edited while nobody decided is recorded by the schedules of then, in order."""
    spec = every_second(overlap=OverlapPolicy.ALLOW)
    harness = CronHarness(spec)
    harness.clock.advance(2)
    edit(harness, replace(spec, schedule="*/2 * * * * *"))
    harness.clock.advance(2.5)
    pause(harness)
    harness.clock.advance(3)
    edit(harness, replace(spec, schedule="*/5 * * * * *"))
    harness.clock.advance(5)
    pause(harness, False)
    harness.clock.advance(10)
    harness.lead()
    changed, paused = "the schedule was changed", "the job was paused"
    assert reasons(harness) == [(1, changed), (2, changed), (4, paused), (6, paused), (10, paused)]
    assert harness.story()[5:] == [(15, "COMMITTED"), (20, "COMMITTED")]


def test_an_edit_within_a_pause_is_recorded_at_once() -> None:
    """What the old schedule left is recorded while the job is still paused; the rest after its resume."""
    harness = CronHarness(every_second())
    harness.lead()
    pause_all(harness)
    harness.advance(2)
    edit(harness, every_second(schedule="*/2 * * * * *"))
    assert reasons(harness) == [(1, "all jobs were paused"), (2, "all jobs were paused")]
    harness.advance(3)
    assert len(reasons(harness)) == 2
    pause_all(harness, False)
    assert reasons(harness)[2:] == [(4, "all jobs were paused")]


@pytest.mark.parametrize("is_edited_first", [False, True])
def test_a_decision_on_its_way_does_not_survive_an_edit(is_edited_first: bool) -> None:
    """A launch by the old schedule that reaches the log after the edit is refused, also when the edit is the older one
    and only its entry was on its way; the new schedule's times are launched."""
    harness = CronHarness(every_second())
    harness.lead()
    harness.hold = True
    harness.advance(1)
    [commit] = harness.held
    assert commit.command.commit_launch.scheduled_at_unix_ms == START_MS + 1_000
    since_s = 0.1 if is_edited_first else 0.0
    harness.clock.step_wall(-since_s)
    edit(harness, every_second(schedule="*/2 * * * * *"))
    harness.clock.step_wall(since_s)
    harness.release()
    harness.hold = False
    harness.advance(1)
    assert harness.story() == [(2, "COMMITTED")] if is_edited_first else [(1, "SKIPPED"), (2, "COMMITTED")]


def test_a_clock_that_steps_over_a_pause_launches_nothing_of_it() -> None:
    """Whatever the wall clock does around a resume, what lies before its log time is recorded and not launched."""
    for step_s in (-20.0, 20.0):
        harness = CronHarness(every_second(catch_up=CatchUpPolicy.ALL, overlap=OverlapPolicy.ALLOW))
        harness.lead()
        pause(harness)
        harness.advance(30)
        harness.clock.step_wall(step_s)
        pause(harness, False)
        closed_ms = harness.state.jobs["tick"].closed_until_ms
        harness.clock.step_wall(-step_s)
        harness.advance(40)
        launched = [launch for launch in harness.history() if launch.state is not LaunchState.SKIPPED]
        assert launched
        assert all(launch.scheduled_at_ms > closed_ms for launch in launched)
        times = [launch.scheduled_at_ms for launch in harness.history()]
        assert times == list(range(times[0], times[-1] + 1, 1_000))


def test_a_job_that_waits_for_a_worker_says_why_it_was_not_launched() -> None:
    """What waits for a worker when the job is paused is recorded with the pause, and starves no more after it."""
    harness = CronHarness(every_second(start_deadline_s=10.0, catch_up=CatchUpPolicy.NONE), workers=("w1",))
    harness.suspect("w1")
    harness.lead()
    harness.advance(3)
    pause(harness)
    pause(harness, False)
    assert reasons(harness) == [(second, "the job was paused") for second in (1, 2, 3)]
    harness.advance(11.5)
    assert harness.launch(4).reason == "no worker can run it: w1 is not heard"


def test_many_jobs_that_go_on_together_leave_the_event_loop_its_turns() -> None:
    """A step counts at most a job beyond its share, some jobs record at once, and all come to their turn soon."""
    specs = [every_second(id=f"job_{number:02}") for number in range(JOBS_AT_ONCE + 10)]
    harness = CronHarness(*specs)
    pause_all(harness)
    harness.lead()
    harness.clock.advance(2 * TIMES_PER_STEP)
    harness.hold = True
    pause_all(harness, False)
    assert len(harness.held) == 1
    for _ in range(JOBS_AT_ONCE):
        harness.advance(0.01)
    assert len(harness.held) == JOBS_AT_ONCE
    harness.hold = False
    harness.release()
    harness.advance(0.4)
    for spec in specs:
        skipped = [launch for launch in harness.history(spec.id) if launch.state is LaunchState.SKIPPED]
        assert len(skipped) == PASSED_RECORDS_MAX + 1
        assert harness.state.jobs[spec.id].passed == ()


def test_records_are_those_of_each_stretch() -> None:
    """Each stretch begins where the one before ended; one without times, or whose schedule cannot be read, has none."""
    spec = every_second(schedule="*/10 * * * * *")
    ends = [(15, "*/5 * * * * *"), (16, "* * * *"), (18, "*/30 * * * * *"), (21, "* * * * * *")]
    passed = tuple(PassedTimes(WallMs(START_MS + end * 1_000), text, "UTC", f"until {end}") for end, text in ends)
    job = CronJob(spec, decided_until_ms=WallMs(START_MS + 5_000), passed=passed)
    found = [
        ((scheduled_at_ms - START_MS) // 1_000, record.reason)
        for record in records_of(job)
        for scheduled_at_ms in (*record.earlier, record.scheduled_at_ms)
    ]
    assert found == [(10, "until 15"), (15, "until 15"), (19, "until 21"), (20, "until 21"), (21, "until 21")]
    assert records_of(replace(job, passed=())) == []
