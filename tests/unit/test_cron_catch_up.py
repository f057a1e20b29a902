"""Catch-up after an outage: what is made up for, and that it never floods; the leader's cron controller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.control.catch_up import Counts, make_plan
from coordinator.control.catch_up_plans import TIMES_PER_TURN
from coordinator.control.cron_calendar import CronCalendar
from coordinator.control.schedule import Every, compile_schedule
from coordinator.control.slots import Slots
from coordinator.control.timers import Moment
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CatchUpPolicy, CronJobSpec, Launch, LaunchState, Monotonic, OverlapPolicy, WallMs
from tests.cron_harness import START_MS, CronHarness

ONE_AT_A_TIME = (OverlapPolicy.SKIP, OverlapPolicy.QUEUE, OverlapPolicy.CANCEL_PREVIOUS)


def minutely(job_id: str = "tick", **fields: object) -> CronJobSpec:
    """A minutely job that makes up for every time of an hour."""
    defaults: dict[str, object] = {
        "catch_up": CatchUpPolicy.ALL,
        "catch_up_limit": 60,
        "overlap": OverlapPolicy.ALLOW,
        "overlap_limit": 100,
    }
    return CronJobSpec(**{"id": job_id, "schedule": "* * * * *", "command": ("true",), **defaults, **fields})  # type: ignore[arg-type]


def order_times(harness: CronHarness, seconds: float) -> list[int]:
    """Lets time pass in steps of 10 ms; the wall times at which something was ordered."""
    times: list[int] = []
    for _ in range(round(seconds * 100)):
        before = len(harness.orders)
        harness.advance(0.01)
        times += [harness.clock.wall_ms()] * (len(harness.orders) - before)
    return times


def gaps(times: Sequence[int]) -> list[int]:
    """Times between neighbours."""
    return [later - earlier for earlier, later in pairwise(times)]


def test_an_outage_of_many_jobs_does_not_end_in_a_flood() -> None:
    """Twenty jobs that missed ten minutes start two launches per second in all, each once; what has not passed its
    deadline starts before that, if no turn is free earlier."""
    specs = [minutely(f"job_{number:02}") for number in range(20)]
    harness = CronHarness(*specs)
    harness.clock.advance(659)  # 9 times of each job are older than the start deadline, one is on time.
    harness.lead(order_timeout_s=1_000.0, catch_up_per_s=2.0)
    assert len(harness.orders) == 1 + 1  # What is late does not wait behind what is made up for.
    for name in ("w1", "w2", "w3"):
        harness.heartbeat(name, slots_free=1_000)
    waiting = [launch for launch in harness.state.launches.values() if launch.state is LaunchState.WAITING]
    late = [launch for launch in waiting if launch.reason == "is late and waits for its turn"]
    assert len(late) == 20 - 1
    assert sorted(launch.not_before_ms - START_MS for launch in late) == [659_500, *[660_000] * 18]
    assert len(waiting) == 20 * 9 - 1 + 19
    assert {launch.reason for launch in waiting} - {late[0].reason} == {"waits for its turn after an outage: no leader"}
    starts = order_times(harness, 91)
    made_up = [o for o in harness.orders if o.launch.due_ms < START_MS + 600_000]
    assert len(made_up) == len({o.launch.key for o in made_up}) == 20 * 9
    # What is on time, and those at their deadline, start on the minute.
    paced = [t for t in starts if t % 60_000 > 10 and t > START_MS + 660_000]
    assert len(paced) >= 20 * 9 - 4
    assert min(gaps(paced)) >= 490


def test_pacing_goes_on_under_the_next_leader() -> None:
    """A leader that dies within a catch-up leaves slots in the state: the next one keeps to them, and goes on after."""
    harness = CronHarness(minutely())
    harness.clock.advance(603)
    harness.lead(order_timeout_s=1_000.0, catch_up_per_s=1.0)
    slots = [launch.not_before_ms for launch in harness.history() if launch.not_before_ms]
    assert gaps(slots) == [1_000] * 7  # Nine, of which the first has begun.
    starts = order_times(harness, 3.5)
    harness.control = None
    harness.clock.advance(1.7)
    harness.orders.clear()
    harness.lead(order_timeout_s=1_000.0, catch_up_per_s=1.0)
    assert harness.control is not None
    waiting = [launch for launch in harness.history() if launch.state is LaunchState.WAITING]
    assert [launch.not_before_ms for launch in waiting] == slots[-len(waiting) :]
    harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(minutely("next")), source="api"))
    harness.clock.step_wall(295)  # Another job has something to make up for: after the turns that wait already.
    harness.assign("next", "w1")
    harness.advance(0)
    first = harness.history("next")[0]
    assert first.not_before_ms - 295_000 == slots[-1] + 1_000
    starts = order_times(harness, 3.5)  # Then a minute is full, and what is on time is not paced.
    assert len(starts) == 3
    assert min(gaps(starts)) >= 990


def test_slots_are_apart_whatever_the_wall_clock_does() -> None:
    """Slots follow the monotonic clock: a step of the wall clock moves their wall times, not their distance."""
    slots = Slots((), 4.0, Monotonic(100.0), WallMs(START_MS))
    assert [slots.take(Monotonic(100.0), WallMs(START_MS)) - START_MS for _ in range(3)] == [0, 250, 500]
    assert slots.take(Monotonic(100.0), WallMs(START_MS - 3_600_000)) - START_MS == 750 - 3_600_000
    assert slots.take(Monotonic(200.0), WallMs(START_MS)) == START_MS


def test_slots_go_on_after_the_latest_that_waits() -> None:
    """Only launches that wait for their turn count: not retries, and not slots that have passed."""
    turn = Launch("a", WallMs(START_MS), 0, state=LaunchState.WAITING, not_before_ms=WallMs(START_MS + 5_000))
    retry = Launch("b", WallMs(START_MS), 1, state=LaunchState.WAITING, not_before_ms=WallMs(START_MS + 90_000))
    assert Slots((turn, retry), 2.0, Monotonic(1.0), WallMs(START_MS)).take(Monotonic(1.0), WallMs(START_MS)) == (
        START_MS + 5_500
    )
    late = WallMs(START_MS + 60_000)
    assert Slots((turn,), 2.0, Monotonic(1.0), late).take(Monotonic(1.0), late) == late


@pytest.mark.parametrize("overlap", ONE_AT_A_TIME)
def test_a_catch_up_runs_one_after_the_other(overlap: OverlapPolicy) -> None:
    """With policies that allow one run, what is made up for is never skipped: each begins when the one before ended."""
    harness = CronHarness(minutely(overlap=overlap, catch_up_limit=4))
    harness.clock.advance(590)
    harness.lead(order_timeout_s=1_000.0)
    harness.advance(5)
    made_up = [launch for launch in harness.history() if launch.due_ms and launch.due_ms < START_MS + 540_000]
    made_up = [launch for launch in made_up if launch.state is not LaunchState.MISSED]
    if overlap is OverlapPolicy.CANCEL_PREVIOUS:
        # The time that is on time replaces what has not begun.
        assert {launch.state for launch in made_up} <= {LaunchState.CANCELLED, LaunchState.COMMITTED}
        return
    assert len(made_up) == 4
    for _ in range(10):
        running = [launch for launch in harness.history() if launch.state is LaunchState.COMMITTED]
        assert len(running) <= 1
        for order in harness.orders:
            if harness.state.launches[order.launch.key].state is LaunchState.COMMITTED:
                harness.finish(order)
        harness.advance(0.5)
    ended = [harness.state.launches[launch.key].state for launch in made_up]
    assert ended == [LaunchState.SUCCEEDED] * 4


def test_what_is_on_time_goes_before_a_turn_with_skip() -> None:
    """A time that is due is not skipped because an old one waits for its turn; the old one waits for its end."""
    harness = CronHarness(minutely(catch_up=CatchUpPolicy.LATEST, overlap=OverlapPolicy.SKIP), minutely("other"))
    harness.clock.advance(659)
    harness.lead(order_timeout_s=1_000.0, catch_up_per_s=0.1)
    harness.advance(1.5)
    story = harness.story()
    assert story[-1] == (660, "COMMITTED") or story[-2] == (600, "COMMITTED")
    states = dict(story)
    assert states[540] in ("WAITING", "COMMITTED")
    assert list(states.values()).count("COMMITTED") == 1


def test_a_turn_that_finds_no_worker_is_missed_after_its_deadline() -> None:
    """The start deadline of a launch that waits for its turn counts from its slot, where its worker is only busy."""
    harness = CronHarness(minutely(catch_up=CatchUpPolicy.LATEST, start_deadline_s=10.0), workers=("w1",))
    harness.clock.advance(650)
    harness.hold = True
    harness.lead(order_timeout_s=1_000.0)
    harness.heartbeat("w1", slots_free=0)
    while harness.held:
        harness.release()
    harness.hold = False
    harness.advance(9.9)
    assert harness.launch(600).state is LaunchState.WAITING
    harness.advance(0.2)
    assert harness.launch(600).state is LaunchState.MISSED
    assert harness.launch(600).reason == "no worker could run it: w1 has no free slot"


def counted_looks(monkeypatch: pytest.MonkeyPatch, rule: type[Every] | type[CronCalendar]) -> list[int]:
    """Has a list's first number count how often a schedule is asked for its next time."""
    looks, real = [0], rule.next_after_s

    def next_after_s(self: Any, after_s: int) -> int | None:
        looks[0] += 1
        return real(self, after_s)

    monkeypatch.setattr(rule, "next_after_s", next_after_s)
    return looks


@pytest.mark.parametrize(
    ("catch_up", "jobs"), [(CatchUpPolicy.NONE, 20), (CatchUpPolicy.LATEST, 20), (CatchUpPolicy.ALL, 200)]
)
def test_no_step_makes_the_plans_of_many_jobs(
    catch_up: CatchUpPolicy, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a day without a leader many jobs have their plans by and by, a few per step, and each as it is alone."""
    specs = [
        minutely(f"job_{number:03}", catch_up=catch_up, catch_up_limit=3, schedule=f"* * * * {number % 7}-7,*")
        for number in range(jobs)
    ]
    harness = CronHarness(*specs, minutely("on_time", schedule="0 0 1 1 *"), workers=("w1",))
    harness.hold = True
    harness.clock.advance(86_400)
    harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(minutely("on_time"))))
    harness.clock.advance(65)
    looks = counted_looks(monkeypatch, CronCalendar)
    at = Moment(harness.clock.monotonic(), harness.clock.wall_ms())
    harness.lead()
    first = {(launch.commit_launch.job_id or launch.record_no_launch.job_id) for launch in harness.proposed}
    assert "on_time" in first  # It waits for nobody's plan.
    steps = [looks[0]]
    assert harness.control is not None
    while harness.control._planner.next_turn is not None:
        looks[0] = 0
        harness.clock.advance(0.01)
        harness.tick()
        steps.append(looks[0])
    assert max(steps) <= TIMES_PER_TURN + 1_700 + 2 * len(specs)
    assert max(steps[1:]) <= TIMES_PER_TURN + 1_700
    for spec in specs:
        job = harness.state.jobs[spec.id]
        schedule = compile_schedule(spec.schedule, "UTC")
        alone = make_plan(schedule, spec, job.closed_until_ms, at.wall, "no leader", Counts())
        made = harness.control._jobs[spec.id].plan
        assert made is not None
        assert (made.launch, made.reason, made.shared_until_ms) == (alone.launch, alone.reason, alone.shared_until_ms)
        assert made.shared_reason == alone.shared_reason


def test_a_schedule_that_rests_for_a_season_is_not_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last times of a month full of seconds are found from its end, in a bounded number of looks."""
    schedule = compile_schedule("* * * 12 *", "UTC")
    looks = counted_looks(monkeypatch, CronCalendar)
    from_ms = WallMs(START_MS - 31 * 86_400_000)
    times = schedule.latest(from_ms, WallMs(START_MS + 40 * 86_400_000), 101)
    assert [time_ms - START_MS for time_ms in times[-2:]] == [-43_320_000, -43_260_000]
    assert len(times) == 101
    assert looks[0] < 3_000
    assert schedule.latest(from_ms, WallMs(START_MS + 40 * 86_400_000), 0) == []


def test_an_outage_within_the_start_deadline_ends_in_no_flood() -> None:
    """What is late by more than a failover starts in turns too, before its deadline; what is not, at once."""
    for gap_s, at_once in ((62.0, 200), (80.0, 1)):
        specs = [minutely(f"job_{number:03}", catch_up=CatchUpPolicy.NONE) for number in range(200)]
        harness = CronHarness(*specs, workers=("w1",))
        harness.clock.advance(gap_s)
        harness.lead(order_timeout_s=1_000.0)
        harness.heartbeat("w1", slots_free=1_000)
        assert len([command for command in harness.proposed if command.commit_launch.worker]) == at_once
        starts = order_times(harness, 20.5)
        assert len(harness.orders) == 200
        assert gap_s == 62.0 or min(gaps(starts)) >= 90


def test_late_turns_go_on_under_the_next_leader() -> None:
    """A new leader gives what is late the turns after those that wait, whatever turns a catch-up has."""
    old, late = minutely(catch_up_limit=9), [minutely(f"job_{n}", catch_up=CatchUpPolicy.NONE) for n in range(4)]
    harness = CronHarness(old, workers=("w1",))
    harness.clock.advance(610)
    for spec in late:
        harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(spec), source="api"))
    harness.clock.advance(60)
    for spec in late[:3]:
        harness.assign(spec.id, "w1")
    harness.lead(order_timeout_s=1_000.0, catch_up_per_s=1.0)
    harness.lead(order_timeout_s=1_000.0, catch_up_per_s=1.0)
    harness.assign(late[3].id, "w1")
    turns = [harness.history(spec.id)[0].not_before_ms - START_MS for spec in late]
    assert turns == [0 - START_MS, 671_000, 672_000, 674_000]


def test_a_late_turn_is_not_later_than_the_deadline() -> None:
    """Where more is late than there are turns in time, the rest starts at the deadline, whatever the policy."""
    for catch_up in CatchUpPolicy:
        harness = CronHarness(*[minutely(f"job_{number}", catch_up=catch_up) for number in range(9)], workers=("w1",))
        harness.clock.advance(117)
        harness.lead(order_timeout_s=1_000.0, catch_up_per_s=1.0)
        harness.advance(2.9)
        assert len(harness.orders) == 3
        harness.advance(0.1)
        first = [order for order in harness.orders if order.launch.due_ms == START_MS + 60_000]
        assert len(first) == 9


@pytest.mark.parametrize(
    ("overlap", "expected"),
    [
        (OverlapPolicy.SKIP, {"COMMITTED": 1, "SKIPPED": 39}),
        (OverlapPolicy.ALLOW, {"COMMITTED": 10, "SKIPPED": 30}),
        (OverlapPolicy.QUEUE, {"COMMITTED": 1, "WAITING": 10, "SKIPPED": 29}),
        (OverlapPolicy.CANCEL_PREVIOUS, {"COMMITTED": 1, "CANCELLED": 38, "WAITING": 1}),
    ],
)
def test_turns_do_not_change_what_overlaps(overlap: OverlapPolicy, expected: dict[str, int]) -> None:
    """A late time that waits for its turn is for the times after it as if it had started."""
    spec = minutely(schedule="* * * * * *", overlap=overlap, overlap_limit=10, catch_up=CatchUpPolicy.NONE)
    harness = CronHarness(minutely("a", catch_up=CatchUpPolicy.NONE, schedule="1 * * * * *"), spec, workers=("w1",))
    harness.clock.advance(40.5)
    harness.lead(order_timeout_s=1_000.0)
    assert dict(harness.story())[1] in ("WAITING", "CANCELLED")  # The other job has the first turn.
    harness.advance(0)
    harness.clock.step_wall(-1)  # Nothing more is due while the turns are taken.
    harness.advance(1)
    assert Counter(state for _, state in harness.story()) == expected


def test_a_pause_or_an_edit_within_a_catch_up() -> None:
    """A pause drops what waits for its turn; an edit keeps it, and makes up for nothing by the new schedule."""
    for change in ("pause", "edit"):
        harness = CronHarness(minutely(catch_up_limit=5))
        harness.clock.advance(603)
        harness.lead(order_timeout_s=1_000.0, catch_up_per_s=0.5)
        waiting = [launch for launch in harness.history() if launch.state is LaunchState.WAITING]
        assert len(waiting) == 4
        if change == "pause":
            harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=True))
            harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=False))
        else:
            edited = types_pb2.CronJobSpec(
                id="tick",
                schedule="*/5 * * * * *",
                command=["true"],
                overlap=types_pb2.OVERLAP_POLICY_ALLOW,
                overlap_limit=100,
                catch_up=types_pb2.CATCH_UP_POLICY_ALL,
            )
            harness.accept(apply_job=command_pb2.ApplyJob(spec=edited))
        before = len(harness.history())
        harness.advance(0.5)
        assert len(harness.history()) == before
        harness.advance(12)
        states = {harness.state.launches[launch.key].state for launch in waiting}
        assert states == {LaunchState.CANCELLED if change == "pause" else LaunchState.COMMITTED}


def test_jitter_counts_for_what_is_too_old() -> None:
    """A time is old when its jittered start is beyond the deadline; the window of the catch-up is as for all jobs."""
    spec = minutely(jitter_s=30.0, catch_up=CatchUpPolicy.NONE, start_deadline_s=20.0)
    harness = CronHarness(spec)
    harness.clock.advance(60 + spec.jitter_ms / 1_000 + 20)
    harness.lead()
    assert harness.story() == [(60, "COMMITTED")]
    harness = CronHarness(spec)
    harness.clock.advance(60 + spec.jitter_ms / 1_000 + 20.001)
    harness.lead()
    assert harness.story() == [(60, "MISSED")]
