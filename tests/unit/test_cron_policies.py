"""Overlap policies, jitter, required labels and manual launches; the leader's cron controller over the real machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.codec import job_spec_to_proto
from coordinator.model import CatchUpPolicy, CronJobSpec, LaunchState, OverlapPolicy, RetryPolicy
from tests.cron_harness import START_MS, CronHarness, every_second, report_of

CANCEL = OverlapPolicy.CANCEL_PREVIOUS
ONE_AT_A_TIME = (OverlapPolicy.SKIP, OverlapPolicy.QUEUE, CANCEL)


def led(seconds: float, **fields: object) -> CronHarness:
    """A leader of an every-second job, so many seconds later; the first launch has started if there is one."""
    harness = CronHarness(every_second(**fields))
    harness.lead(order_timeout_s=1_000.0)
    harness.advance(min(seconds, 1))
    if harness.orders:
        harness.start(harness.orders[0])
    harness.advance(max(0.0, seconds - 1))
    return harness


def begun(harness: CronHarness) -> list[tuple[int, int]]:
    """What was ordered: scheduled second and attempt."""
    return [((o.launch.scheduled_at_ms - START_MS) // 1_000, o.launch.attempt) for o in harness.orders]


# Allow


def test_allow_is_bounded() -> None:
    """With `allow` at most `overlap_limit` launches run at once; what comes beyond is recorded, until one ends."""
    harness = led(3, overlap=OverlapPolicy.ALLOW, overlap_limit=2)
    assert harness.story() == [(1, "RUNNING"), (2, "COMMITTED"), (3, "SKIPPED")]
    assert harness.launch(3).reason == "2 launches have not ended, overlap_limit = 2"
    harness.finish(harness.orders[1])
    harness.advance(2)
    assert harness.story()[3:] == [(4, "COMMITTED"), (5, "SKIPPED")]


def test_a_retry_that_waits_has_not_ended() -> None:
    """A launch between two attempts counts for the overlap policy as if it ran."""
    fields = {"retry": RetryPolicy.ON_FAILURE, "retry_backoff_s": 2.0}
    harness = led(1, overlap=OverlapPolicy.ALLOW, overlap_limit=1, **fields)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    harness.advance(1)
    assert harness.story() == [(1, "WAITING"), (2, "SKIPPED")]
    harness = led(1, overlap=OverlapPolicy.SKIP, **fields)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    harness.advance(1)
    assert harness.launch(2).reason == "previous launch of 12:00:01Z waits for attempt 2"
    harness.advance(1.3)
    assert begun(harness) == [(1, 1), (1, 2)]


# Queue


def test_a_queue_runs_one_at_a_time_in_order() -> None:
    """With `queue` launches wait for the one before, begin when it ends, and beyond the limit are skipped."""
    harness = led(4, overlap=OverlapPolicy.QUEUE, overlap_limit=2)
    assert harness.story() == [(1, "RUNNING"), (2, "WAITING"), (3, "WAITING"), (4, "SKIPPED")]
    assert harness.launch(2).reason == "waits for the end of the launch of 12:00:01Z"
    assert harness.launch(4).reason == "2 launches wait already, overlap_limit = 2"
    assert begun(harness) == [(1, 1)]
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    assert begun(harness) == [(1, 1), (2, 1)]
    harness.finish(harness.orders[1])
    assert begun(harness) == [(1, 1), (2, 1), (3, 1)]
    harness.advance(1)
    assert harness.story()[4:] == [(5, "WAITING")]


def test_a_queue_waits_for_retries() -> None:
    """A launch that is tried again keeps its place at the head of the queue."""
    harness = led(2, overlap=OverlapPolicy.QUEUE, retry=RetryPolicy.ON_FAILURE)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    harness.advance(1.2)
    assert begun(harness) == [(1, 1), (1, 2)]
    harness.finish(harness.orders[1])
    assert begun(harness) == [(1, 1), (1, 2), (2, 1)]


def test_a_queue_outlives_its_leader() -> None:
    """What waits is in the state: the next leader begins it when the run before ends."""
    harness = led(3, overlap=OverlapPolicy.QUEUE)
    first = harness.orders[0].launch
    harness.lead(order_timeout_s=1_000.0)
    harness.report("w1", report_of(first, LaunchState.SUCCEEDED))
    assert begun(harness)[-1] == (2, 1)
    assert harness.launch(3).state is LaunchState.WAITING


def test_a_queued_launch_that_finds_no_worker_is_missed() -> None:
    """Without catch-up a queued launch waits for a worker as long as the start deadline, once its predecessor ended."""
    catch_up = CatchUpPolicy.NONE
    harness = led(2, overlap=OverlapPolicy.QUEUE, start_deadline_s=5.0, retry=RetryPolicy.NEVER, catch_up=catch_up)
    for worker in ("w2", "w3"):
        harness.expire(worker)
    harness.advance(10)  # The run goes on: no deadline counts meanwhile.
    assert harness.launch(2).state is LaunchState.WAITING
    harness.expire("w1")
    harness.advance(4.9)
    assert harness.launch(2).state is LaunchState.WAITING
    harness.advance(0.2)
    assert harness.launch(2).state is LaunchState.MISSED
    assert harness.launch(2).reason == "no worker could run it: w1 is down, w2 is down, w3 is down"


def test_the_time_in_a_queue_does_not_count_for_the_start_deadline() -> None:
    """What is asked to wait for its predecessor, or for that to stop, begins after it, however long that took."""
    for overlap in (OverlapPolicy.QUEUE, CANCEL):
        fields = {"overlap": overlap, "catch_up": CatchUpPolicy.NONE, "schedule": "* * * * *"}
        harness = CronHarness(every_second(start_deadline_s=5.0, overlap_limit=1, **fields))
        harness.lead(order_timeout_s=1_000.0)
        harness.advance(60)
        harness.start(harness.orders[0])
        harness.advance(300)
        waiting = [launch for launch in harness.history() if launch.state is LaunchState.WAITING]
        assert len(waiting) == 1
        state = LaunchState.SUCCEEDED if overlap is OverlapPolicy.QUEUE else LaunchState.CANCELLED
        harness.report("w1", report_of(harness.orders[0].launch, state))
        assert harness.orders[-1].launch.key == waiting[0].key
        late_s = (harness.clock.wall_ms() - waiting[0].due_ms) / 1_000
        assert late_s == (240 if overlap is OverlapPolicy.QUEUE else 0)  # There the newest takes the others' place.


# Cancel previous


def test_cancel_previous_stops_the_run_and_then_launches() -> None:
    """With `cancel_previous` the run is told to stop; the new launch begins once the worker says so."""
    harness = led(2, overlap=CANCEL)
    assert harness.story() == [(1, "RUNNING"), (2, "WAITING")]
    assert [(stop.attempt, stop.reason) for stop in harness.stops] == [(1, "the launch of 12:00:02Z takes its place")]
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.CANCELLED))
    assert harness.story() == [(1, "CANCELLED"), (2, "COMMITTED")]
    assert begun(harness) == [(1, 1), (2, 1)]


def test_the_newest_wins() -> None:
    """While the old run takes its time to stop, of those that wait only the newest is kept; one runs at a time."""
    harness = led(4, overlap=CANCEL)
    assert harness.story() == [(1, "RUNNING"), (2, "CANCELLED"), (3, "CANCELLED"), (4, "WAITING")]
    assert harness.launch(2).reason == "the launch of 12:00:03Z takes its place"
    assert len(harness.stops) == 1
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    assert begun(harness) == [(1, 1), (4, 1)]


def test_the_next_leader_cancels_what_is_to_be_replaced() -> None:
    """A leader that finds a launch waiting to replace another one tells that one to stop."""
    harness = led(1, overlap=CANCEL)
    harness.hold = True
    harness.advance(1)
    commit = harness.held[0].command
    harness.control = None
    harness.apply(commit)
    harness.hold = False
    assert not harness.launch(1).cancel_reason
    harness.lead()
    assert harness.launch(1).cancel_reason == "the launch of 12:00:02Z takes its place"
    assert len(harness.stops) == 1


# All of them


@pytest.mark.parametrize("overlap", ONE_AT_A_TIME)
def test_one_at_a_time(overlap: OverlapPolicy) -> None:
    """With every policy but `allow` a job never has two attempts at once, through retries and lost workers."""
    harness = led(1, overlap=overlap, retry=RetryPolicy.ON_FAILURE, attempts_max=2)
    for round_number in range(30):
        open_launches = [launch for launch in harness.history() if not launch.state.has_ended]
        running = [launch for launch in open_launches if launch.worker]
        assert len(running) <= 1
        if running and round_number % 3 == 0:
            ends = LaunchState.CANCELLED if running[0].cancel_reason else LaunchState.FAILED
            harness.report(running[0].worker, report_of(running[0], ends))
        harness.advance(0.7)
    assert len(begun(harness)) > 3


def test_a_change_of_the_policy_keeps_what_waits_in_order() -> None:
    """After an edit from `queue` to `skip` what waits still runs, one at a time; later times are skipped meanwhile."""
    harness = led(3, overlap=OverlapPolicy.QUEUE)
    edited = types_pb2.CronJobSpec(
        id="tick", schedule="* * * * * *", command=["true"], overlap=types_pb2.OVERLAP_POLICY_SKIP
    )
    harness.accept(apply_job=command_pb2.ApplyJob(spec=edited))
    harness.advance(1)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    harness.finish(harness.orders[1])
    harness.finish(harness.orders[2])
    assert begun(harness) == [(1, 1), (2, 1), (3, 1)]
    assert harness.story()[3:] == [(4, "SKIPPED")]
    harness.advance(1)
    assert harness.story()[4:] == [(5, "COMMITTED")]


@pytest.mark.parametrize("overlap", OverlapPolicy)
def test_manual_launches_stand_beside_the_policy(overlap: OverlapPolicy) -> None:
    """A launch by hand neither waits for the schedule's, nor keeps it from launching, nor is cancelled by it."""
    harness = CronHarness(every_second(overlap=overlap))
    harness.lead(order_timeout_s=1_000.0)
    manual = command_pb2.CommitLaunch(job_id="tick", worker="w2", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    harness.accept(commit_launch=manual)
    harness.advance(1)
    harness.accept(commit_launch=manual)
    assert [order.node_id for order in harness.orders] == ["w2", "w1", "w2"]
    assert harness.stops == []


def test_a_pause_launches_nothing_that_waits() -> None:
    """What a queue or a catch-up holds is dropped by a pause, and not brought back by the resume."""
    harness = led(3, overlap=OverlapPolicy.QUEUE)
    harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=True))
    assert harness.story() == [(1, "RUNNING"), (2, "CANCELLED"), (3, "CANCELLED")]
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    harness.advance(2)
    harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=False))
    harness.advance(1)
    assert begun(harness) == [(1, 1), (6, 1)]


def test_a_pause_meets_a_begin_that_is_on_its_way() -> None:
    """When the begin of a queued launch is applied after the pause it is refused, and the launch stays cancelled."""
    harness = led(2, overlap=OverlapPolicy.QUEUE)
    harness.hold = True
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    harness.release()
    assert [held.command.WhichOneof("operation") for held in harness.held] == ["assign_launch"]
    harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=True))
    harness.hold = False
    harness.advance(3)
    assert harness.story() == [(1, "SUCCEEDED"), (2, "CANCELLED")]
    assert begun(harness) == [(1, 1)]


# Jitter


def jittered(job_id: str = "tick", **fields: object) -> CronJobSpec:
    """A minutely job that starts up to 30 s late."""
    return CronJobSpec(
        id=job_id,
        schedule="* * * * *",
        command=("true",),
        jitter_s=30.0,
        overlap=OverlapPolicy.ALLOW,
        **fields,  # type: ignore[arg-type]
    )


def test_jitter_is_fixed_and_below_its_bound() -> None:
    """A job's jitter depends on its id alone; many jobs of one schedule fill the range; 0 means none."""
    amounts = [jittered(f"job_{number}").jitter_ms for number in range(300)]
    assert amounts == [jittered(f"job_{number}", description="x").jitter_ms for number in range(300)]
    assert all(0 <= amount < 30_000 for amount in amounts)
    assert len({amount // 3_000 for amount in amounts}) == 10
    assert every_second(jitter_s=0.0).jitter_ms == 0


def test_jitter_moves_the_start_and_not_the_identity() -> None:
    """A launch is committed under its scheduled time when that and the jitter have come, and says when it was due."""
    spec = jittered()
    harness = CronHarness(spec)
    harness.lead()
    harness.advance(60 + (spec.jitter_ms - 1) / 1_000)
    assert harness.history() == []
    harness.advance(0.001)
    assert harness.story() == [(60, "COMMITTED")]
    launch = harness.launch(60)
    assert launch.due_ms == START_MS + 60_000 + spec.jitter_ms == launch.committed_ms
    harness.finish(harness.orders[0])
    assert harness.launch(60).lateness_ms == -spec.jitter_ms  # The test's worker says that it began on the dot.


def test_the_start_deadline_counts_from_when_it_is_due() -> None:
    """A time with jitter waits for a worker until its deadline after the jittered time."""
    spec = jittered(start_deadline_s=20.0, catch_up=CatchUpPolicy.NONE)
    harness = CronHarness(spec, workers=("w1",))
    harness.suspect("w1")
    harness.lead()
    harness.advance(60 + spec.jitter_ms / 1_000 + 20)
    assert harness.history() == []
    harness.advance(0.01)
    assert harness.story() == [(60, "MISSED")]


def test_clock_steps_with_jitter_double_and_lose_nothing() -> None:
    """A step back before the due time waits; one forward over several times is caught up; none is doubled."""
    spec = jittered(catch_up=CatchUpPolicy.NONE, start_deadline_s=10.0)
    harness = CronHarness(spec)
    harness.lead(order_timeout_s=1_000.0)
    harness.advance(60 + spec.jitter_ms / 1_000 - 0.5)
    harness.clock.step_wall(-30)
    harness.advance(30)
    assert harness.history() == []
    harness.advance(0.5)
    assert harness.story() == [(60, "COMMITTED")]
    harness.clock.step_wall(-40)
    harness.advance(60)
    assert harness.story() == [(60, "COMMITTED")]
    harness.clock.step_wall(200)
    harness.advance(60)
    seconds = [second for second, _ in harness.story()]
    assert seconds == list(range(60, 60 * len(seconds) + 1, 60))
    assert harness.launch(120).reason == "the wall clock stepped forward over it"
    assert harness.story()[-1][1] == "COMMITTED"


def test_another_schedule_or_a_resume_within_the_jitter_never_launches_retroactively() -> None:
    """What was scheduled before a change of the schedule or a resume, and due only after it, is recorded as skipped."""
    spec = jittered()
    for change in ("edit", "resume"):
        harness = CronHarness(spec)
        harness.lead()
        harness.advance(60.1)
        if change == "edit":
            edited = replace(spec, schedule="*/1 * * * *")
            harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(edited)))
        else:
            harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=True))
            harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=False))
        harness.advance(59)
        assert harness.story() == [(60, "SKIPPED")]
        assert harness.launch(60).reason == ("the schedule was changed" if change == "edit" else "the job was paused")
        harness.advance(31)
        assert harness.story()[1:] == [(120, "COMMITTED")]


def test_an_edit_that_leaves_the_times_alone_drops_none() -> None:
    """A time that was scheduled before an edit and is decided after it is launched, or recorded, by the new rules."""
    spec = jittered()
    for edited in (replace(spec, description="better"), replace(spec, jitter_s=0.0)):
        harness = CronHarness(spec)
        harness.lead(order_timeout_s=1_000.0)
        harness.advance(60.1)
        harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(edited)))
        harness.advance(30)
        assert harness.story() == [(60, "COMMITTED")]
        assert harness.launch(60).due_ms == START_MS + 60_000 + edited.jitter_ms
    # A master that begins with another cluster.toml applies it before it decides what passed while nobody led.
    harness = CronHarness(spec)
    harness.clock.advance(200)
    harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(replace(spec, catch_up=CatchUpPolicy.NONE))))
    harness.lead()
    harness.advance(0.1)
    assert harness.story()[0] == (60, "MISSED")
    assert harness.launch(60).reason == "no leader"
    # One that waits for a worker goes on to wait.
    spec = replace(spec, catch_up=CatchUpPolicy.NONE)
    harness = CronHarness(spec, workers=())
    harness.lead()
    harness.advance(100)
    harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(replace(spec, description="better"))))
    harness.advance(60)
    assert harness.launch(60).reason == "no worker can run it: it has no owner"


# Labels


def test_the_record_of_a_missed_time_names_the_labels() -> None:
    """A job whose required labels no worker has is recorded as missed with them, with and without an owner."""
    for owners in ((), ("w1",)):
        spec = CronJobSpec(
            id="tick",
            schedule="* * * * *",
            command=("true",),
            required_labels=(("disk", "nvme"), ("gpu", "yes")),
            start_deadline_s=5.0,
            catch_up=CatchUpPolicy.NONE,
        )
        harness = CronHarness(spec)
        harness.assign("tick", *owners)
        harness.lead()
        harness.advance(66)
        [launch] = harness.history()
        assert launch.state is LaunchState.MISSED
        assert launch.reason == "no worker can run it: no worker has the labels disk=nvme, gpu=yes"
        assert harness.orders == []
