"""The leader's cron controller over the real state machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.control.interface import ProposalEnded, SendLaunch
from coordinator.control.launches import RETRY_S
from coordinator.model import CatchUpPolicy, CronJobSpec, LaunchState, OverlapPolicy, RetryPolicy
from tests.cron_harness import START_MS, CronHarness, every_second, report_of

MINUTELY = CronJobSpec(id="minutely", schedule="* * * * *", command=("true",))


def minutely(**fields: object) -> CronJobSpec:
    """A job that is due every minute, whose launches overlap, so that each stands for itself."""
    return CronJobSpec(
        id="tick",
        schedule="* * * * *",
        command=("true",),
        overlap=OverlapPolicy.ALLOW,
        **fields,  # type: ignore[arg-type]
    )


def started(harness: CronHarness) -> SendLaunch:
    """Leads until the first launch is ordered, and has its worker confirm the start."""
    harness.lead()
    harness.advance(1)
    order = harness.orders[0]
    harness.report(order.node_id, report_of(order.launch, LaunchState.RUNNING))
    assert harness.launch(1).state is LaunchState.RUNNING
    return order


# When and where


def test_commits_before_it_orders() -> None:
    """A due job is first a committed intent with its owner; the order leaves once that is applied."""
    harness = CronHarness(every_second())
    harness.hold = True
    harness.lead()
    harness.advance(1)
    [proposal] = harness.held
    expected = command_pb2.CommitLaunch(
        job_id="tick",
        scheduled_at_unix_ms=START_MS + 1_000,
        worker="w1",
        trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE,
        due_unix_ms=START_MS + 1_000,
        closed_until_unix_ms=START_MS,
    )
    assert proposal.command.commit_launch == expected
    assert proposal.command.cause.startswith("cron/tick/")
    assert harness.orders == []
    harness.release()
    [order] = harness.orders
    assert order == SendLaunch("w1", harness.launch(1), harness.state.jobs["tick"].spec)


def test_wakes_exactly_when_due_and_at_least_every_second() -> None:
    """The next wake is the due moment on the monotonic clock, or a second from now when that is later."""
    harness = CronHarness(MINUTELY)
    harness.lead()
    assert harness.wake == pytest.approx(harness.clock.monotonic() + 1.0)
    harness.clock.advance(59.25)
    harness.tick()
    assert harness.wake == pytest.approx(harness.clock.monotonic() + 0.75)


def test_one_decision_per_job_is_on_its_way() -> None:
    """However often it is called, a job has one proposal in flight, and jobs do not wait for each other."""
    harness = CronHarness(every_second(), every_second(id="tock"))
    harness.hold = True
    harness.lead()
    for _ in range(5):
        harness.advance(1)
    assert sorted(p.command.commit_launch.job_id for p in harness.held) == ["tick", "tock"]


def test_goes_to_a_backup_when_the_owner_does_not_serve() -> None:
    """The first of owner and backups that serves gets the launch."""
    harness = CronHarness(every_second())
    harness.suspect("w1")
    harness.lead()
    harness.advance(1)
    assert harness.launch(1).worker == "w2"


def test_waits_for_a_worker_then_launches_late() -> None:
    """Without a serving worker a due time waits; the first worker that serves gets it."""
    harness = CronHarness(minutely(), workers=("w1",))
    harness.suspect("w1")
    harness.lead()
    harness.advance(70)
    assert harness.history() == []
    harness.accept(activate_node=command_pb2.ActivateNode(node_id="w1", incarnation="1"))
    assert harness.story() == [(60, "COMMITTED")]


def test_records_that_no_worker_could_run_it() -> None:
    """After the start deadline without a worker a time that nobody makes up for is missed, with who was not there."""
    spec = minutely(start_deadline_s=30.0, catch_up=CatchUpPolicy.NONE)
    harness = CronHarness(spec, workers=("w1", "w2"))
    harness.suspect("w1")
    harness.expire("w2")
    harness.lead()
    harness.advance(60 + 30)
    assert harness.history() == []
    harness.advance(0.01)
    [launch] = harness.history()
    assert launch.state is LaunchState.MISSED
    assert launch.reason == "no worker can run it: w1 is not heard, w2 is down"


@pytest.mark.parametrize(
    ("policy", "launched"), [(CatchUpPolicy.LATEST, [540, 600]), (CatchUpPolicy.ALL, [*range(60, 601, 60)])]
)
def test_a_time_without_a_worker_is_caught_up_with_once_one_serves(policy: CatchUpPolicy, launched: list[int]) -> None:
    """While no worker serves, times of a job that catches up stay undecided; then its policy says what is launched."""
    harness = CronHarness(minutely(catch_up=policy), workers=("w1", "w2"))
    harness.lead()
    harness.advance(30)
    harness.expire("w1")
    harness.suspect("w2")
    harness.advance(300)
    harness.expire("w2")
    harness.advance(60)
    harness.lead()  # The next leader leaves them undecided, too.
    harness.advance(240)
    assert harness.history() == []
    harness.add_worker("w2", incarnation="2")
    harness.heartbeat("w2", slots_free=100)
    harness.advance(1)
    story = harness.story()
    assert [second for second, _ in story] == list(range(60, 601, 60))
    assert [second for second, state in story if state == "COMMITTED"] == launched
    reasons = {launch.reason for launch in harness.history() if launch.state is LaunchState.MISSED}
    assert all(reason.startswith("no worker could run it: w1 is down, w2 is down; only") for reason in reasons)
    assert bool(reasons) is (policy is CatchUpPolicy.LATEST)
    times = [launch.not_before_ms for launch in harness.history() if launch.not_before_ms]
    assert len(set(times)) == len(times)


def test_a_catch_up_that_loses_its_workers_goes_on_when_one_is_back() -> None:
    """What of a plan is undecided when the last worker goes belongs to the next plan; what waits for a turn waits."""
    spec = minutely(catch_up=CatchUpPolicy.ALL, start_deadline_s=10.0, overlap_limit=99)
    harness = CronHarness(spec, workers=("w1",))
    harness.clock.advance(630)
    harness.hold = True
    harness.lead()
    harness.heartbeat("w1", slots_free=0)
    for _ in range(2):
        harness.release()
    harness.suspect("w1")
    harness.hold = False
    harness.lead()
    harness.advance(100)
    assert [state for _, state in harness.story()] == ["WAITING", "WAITING"]
    harness.accept(activate_node=command_pb2.ActivateNode(node_id="w1", incarnation="1"))
    harness.heartbeat("w1", slots_free=100)
    harness.advance(3)
    assert harness.story() == [(second, "COMMITTED") for second in range(60, 721, 60)]


def test_the_most_urgent_class_gets_the_free_slots() -> None:
    """Of jobs that are due in one instant the most urgent is decided first, and so has a slot where there are few."""
    classes = {"a": 5, "b": 3, "c": 5, "z": 0}
    specs = [replace(MINUTELY, id=job_id, priority_class=number) for job_id, number in classes.items()]
    for is_new_leader in (False, True):
        harness = CronHarness(*specs, workers=("w1",))
        if is_new_leader:
            harness.clock.advance(61)
        harness.lead()
        harness.open_session("w1")
        harness.heartbeat("w1", slots_free=2)
        harness.advance(0 if is_new_leader else 60)
        assert [command.commit_launch.job_id for command in harness.proposed] == ["z", "b", "a", "c"]
        assert [order.launch.job_id for order in harness.orders[:2]] == ["z", "b"]


# Overlap and pause


def test_skips_while_the_previous_launch_runs() -> None:
    """With `skip`, a time at which an earlier launch has not ended is recorded with what it would have waited for."""
    harness = CronHarness(every_second())
    order = started(harness)
    harness.advance(2)
    assert harness.story() == [(1, "RUNNING"), (2, "SKIPPED"), (3, "SKIPPED")]
    assert harness.launch(2).reason == "previous launch of 12:00:01Z still running on w1"
    harness.report("w1", report_of(order.launch, LaunchState.SUCCEEDED))
    harness.advance(1)
    assert harness.story()[-1] == (4, "COMMITTED")


def test_allows_overlapping_launches() -> None:
    """With `allow`, each time is launched beside what runs."""
    harness = CronHarness(every_second(overlap=OverlapPolicy.ALLOW))
    harness.lead()
    harness.advance(3)
    assert harness.story() == [(1, "COMMITTED"), (2, "COMMITTED"), (3, "COMMITTED")]


@pytest.mark.parametrize("everything", [False, True])
def test_a_pause_launches_nothing_and_says_so(everything: bool) -> None:
    """While a job or all are paused nothing is launched; what passed is recorded after the resume, with the reason."""
    harness = CronHarness(every_second(overlap=OverlapPolicy.ALLOW))
    harness.lead()
    harness.advance(1)

    def pause(paused: bool) -> None:
        if everything:
            settings = types_pb2.Settings(replicas=2, cron_paused=paused)
            harness.accept(change_settings=command_pb2.ChangeSettings(settings=settings))
        else:
            harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=paused))

    pause(True)
    harness.advance(5)
    assert harness.story() == [(1, "COMMITTED")]
    pause(False)
    assert harness.story()[1:] == [(second, "SKIPPED") for second in range(2, 7)]
    assert {launch.reason for launch in harness.history()[1:]} == {
        "all jobs were paused" if everything else "the job was paused"
    }
    harness.advance(1)
    assert harness.story()[6:] == [(7, "COMMITTED")]


def test_an_edit_takes_effect_at_once() -> None:
    """A job whose schedule is edited is due by the new one, and not before the edit."""
    harness = CronHarness(minutely())
    harness.lead()
    harness.advance(10)
    new = command_pb2.ApplyJob(spec=types_pb2.CronJobSpec(id="tick", schedule="* * * * * *", command=["true"]))
    harness.accept(apply_job=new)
    harness.advance(1)
    assert harness.story() == [(11, "COMMITTED")]


# Catch-up


def test_a_leader_gap_within_the_start_deadline_loses_nothing() -> None:
    """Every second of a gap that is shorter than the start deadline is launched, late; what is no later than a failover
    at once, the others in turns."""
    harness = CronHarness(every_second(overlap=OverlapPolicy.ALLOW, overlap_limit=100))
    harness.lead()
    harness.advance(3)
    harness.control = None
    harness.clock.advance(40)
    harness.lead()
    assert [second for second, _ in harness.story()] == list(range(1, 44))
    assert len(harness.orders) == 3 + 3 + 6 + 1  # What was committed is ordered again by the new leader.
    for name in ("w1", "w2", "w3"):
        harness.heartbeat(name, slots_free=100)
    harness.advance(0.95)
    assert len(harness.orders) == 13 + 9
    harness.advance(2.55)
    assert [state for _, state in harness.story()] == ["COMMITTED"] * (43 + 3)
    assert len({order.launch.key for order in harness.orders}) == 43 + 3


@pytest.mark.parametrize(
    ("policy", "window_s", "limit", "launched"),
    [
        (CatchUpPolicy.NONE, 3_600.0, 10, [600]),
        (CatchUpPolicy.LATEST, 3_600.0, 10, [540, 600]),
        (CatchUpPolicy.LATEST, 1.0, 10, [540, 600]),
        (CatchUpPolicy.ALL, 3_600.0, 10, [60, 120, 180, 240, 300, 360, 420, 480, 540, 600]),
        (CatchUpPolicy.ALL, 3_600.0, 3, [420, 480, 540, 600]),
        (CatchUpPolicy.ALL, 250.0, 10, [420, 480, 540, 600]),
    ],
)
def test_catch_up(policy: CatchUpPolicy, window_s: float, limit: int, launched: list[int]) -> None:
    """Of ten minutes without a leader each policy launches its share; the rest are recorded as missed."""
    harness = CronHarness(minutely(catch_up=policy, catch_up_window_s=window_s, catch_up_limit=limit))
    harness.clock.advance(630)
    harness.lead()
    harness.advance(1)
    story = harness.story()
    assert [second for second, _ in story] == list(range(60, 601, 60))
    assert [second for second, state in story if state == "COMMITTED"] == launched
    missed = [launch for launch in harness.history() if launch.state is LaunchState.MISSED]
    assert all(launch.reason.startswith("no leader") for launch in missed)


def test_a_long_gap_is_recorded_in_bounded_form() -> None:
    """Of 1,000 missed seconds the last hundred have a record each, and those before share one."""
    harness = CronHarness(every_second(catch_up=CatchUpPolicy.NONE, start_deadline_s=1.0))
    harness.clock.advance(1_000)
    harness.lead()
    missed = [launch for launch in harness.history() if launch.state is LaunchState.MISSED]
    assert len(missed) == 101
    assert missed[0].reason == "no leader; this record stands for 898 times from 2026-01-01T12:00:01Z on"
    assert harness.launch(899).state is LaunchState.MISSED
    assert harness.launch(999).state is LaunchState.COMMITTED
    assert harness.launch(1_000).state is LaunchState.SKIPPED


def test_a_wall_clock_that_steps_back_launches_nothing_twice() -> None:
    """After a step back nothing is decided until the wall clock is where it was."""
    harness = CronHarness(every_second(overlap=OverlapPolicy.ALLOW))
    harness.lead()
    harness.advance(10)
    harness.clock.step_wall(-5)
    harness.advance(5)
    assert len(harness.history()) == 10
    harness.advance(2)
    assert [second for second, _ in harness.story()] == list(range(1, 13))


def test_a_wall_clock_that_steps_forward_is_caught_up_with() -> None:
    """Times that a step forward passed over are treated by the catch-up policy, and say what happened."""
    harness = CronHarness(minutely(catch_up=CatchUpPolicy.NONE))
    harness.lead()
    harness.advance(30)
    harness.clock.step_wall(200)
    harness.advance(1)
    assert harness.story() == [(60, "MISSED"), (120, "MISSED"), (180, "COMMITTED")]
    assert harness.launch(60).reason == "the wall clock stepped forward over it"


# Proposals that fail


def test_a_failed_proposal_is_decided_again_from_the_state() -> None:
    """A proposal with an unknown outcome is not repeated at once; later the state says what is still to be decided."""
    harness = CronHarness(every_second())
    harness.hold = True
    harness.lead()
    harness.advance(1)
    harness.release(lose=True)
    assert not harness.held
    harness.advance(RETRY_S)
    [proposal] = harness.held
    assert proposal.command.commit_launch.scheduled_at_unix_ms == START_MS + 1_000


def test_a_proposal_that_was_applied_although_it_failed_is_not_repeated() -> None:
    """When the state shows a decision whose outcome was unknown, the next time is decided, not the same."""
    harness = CronHarness(every_second(overlap=OverlapPolicy.ALLOW))
    harness.hold = True
    harness.lead()
    harness.advance(1)
    command = harness.held[0].command
    harness.release(lose=True)
    harness.apply(command)
    harness.advance(1)
    assert [p.command.commit_launch.scheduled_at_unix_ms for p in harness.held] == [START_MS + 2_000]
    assert [order.launch.scheduled_at_ms for order in harness.orders] == [START_MS + 1_000]


def test_a_result_before_its_state_decides_nothing() -> None:
    """A result that comes before the entry's changes does not lead to a decision on the old state."""
    harness = CronHarness(every_second())
    harness.hold = True
    harness.lead()
    harness.advance(1)
    harness.release(result_first=True)
    assert len(harness.proposed) == 1
    assert len(harness.orders) == 1


def test_a_refused_decision_does_not_spin() -> None:
    """A refusal is followed by a pause, not by the same proposal at once."""
    harness = CronHarness(every_second())
    harness.hold = True
    harness.lead()
    harness.advance(1)
    token = harness.held.popleft().token
    refusal = command_pb2.Refusal(code=command_pb2.REFUSAL_CODE_PRECONDITION, message="no")
    harness.feed(ProposalEnded(token, command_pb2.CommandResult(refusal=refusal), None))
    assert not harness.held
    harness.advance(RETRY_S)
    assert len(harness.held) == 1


# Launches on their way


def test_a_start_that_is_not_confirmed_goes_to_a_backup() -> None:
    """After the order timeout the next attempt is committed on another worker, and ordered there."""
    harness = CronHarness(every_second())
    harness.lead(order_timeout_s=5.0)
    harness.advance(1 + 4.9)
    assert harness.launch(1).attempt == 1
    harness.advance(0.2)
    launch = harness.launch(1)
    assert (launch.attempt, launch.worker, launch.state) == (2, "w2", LaunchState.COMMITTED)
    assert launch.reason == "w1 did not confirm the start within 5 s"
    assert [(order.node_id, order.launch.attempt) for order in harness.orders] == [("w1", 1), ("w2", 2)]


def test_attempts_end() -> None:
    """After the last attempt the launch is lost, and says so."""
    harness = CronHarness(every_second(attempts_max=2))
    harness.lead(order_timeout_s=5.0)
    harness.advance(1 + 5 + 5 + 0.1)
    launch = harness.launch(1)
    assert (launch.attempt, launch.state) == (2, LaunchState.LOST)
    assert launch.reason == "w2 did not confirm the start within 5 s; attempt 2 was the last"


def test_never_retried_is_never_given_to_another_worker() -> None:
    """With `never` a launch that may have started stays with its worker, and is lost with it."""
    harness = CronHarness(every_second(retry=RetryPolicy.NEVER))
    harness.lead()
    harness.advance(1)
    harness.suspect("w1")
    harness.advance(20)
    assert harness.launch(1).state is LaunchState.COMMITTED  # It may still tell.
    harness.expire("w1")
    launch = harness.launch(1)
    assert (launch.state, launch.attempt, launch.reason) == (LaunchState.LOST, 1, "w1 is down")
    assert {order.node_id for order in harness.orders if order.launch.scheduled_at_ms == START_MS + 1_000} == {"w1"}


def test_a_suspect_worker_loses_what_it_did_not_start() -> None:
    """A committed launch leaves a worker that is not heard; a running one waits for the end of its lease."""
    harness = CronHarness(every_second(overlap=OverlapPolicy.ALLOW))
    order = started(harness)
    harness.advance(1)
    harness.suspect("w1")
    assert (harness.launch(1).worker, harness.launch(1).state) == ("w1", LaunchState.RUNNING)
    assert (harness.launch(2).worker, harness.launch(2).attempt) == ("w2", 2)
    harness.expire("w1")
    assert (harness.launch(1).state, harness.launch(1).attempt) == (LaunchState.WAITING, 1)
    harness.report("w1", report_of(order.launch, LaunchState.SUCCEEDED))
    assert harness.receipts[-1].refusal == "attempt 1 was given up; attempt 2 counts"
    harness.advance(1.1)
    assert (harness.launch(1).worker, harness.launch(1).attempt) == ("w2", 2)
    harness.report("w1", report_of(order.launch, LaunchState.SUCCEEDED))
    assert harness.receipts[-1].refusal == "attempt 1 was given up; attempt 2 counts"
    assert harness.launch(1).state is LaunchState.COMMITTED


def test_a_lost_run_waits_for_a_worker_for_its_start_deadline() -> None:
    """While nobody can take the next attempt it is waited for; then the launch is lost."""
    harness = CronHarness(minutely(start_deadline_s=20.0), workers=("w1",))
    harness.lead()
    harness.advance(60)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.RUNNING))
    harness.expire("w1")
    harness.advance(20.8)  # The pause of about a second comes first.
    assert harness.launch(60).state is LaunchState.WAITING
    harness.advance(0.4)
    assert harness.launch(60).state is LaunchState.LOST
    assert harness.launch(60).reason == "w1 is down; no worker could take the next attempt: w1 is down"


def test_a_lost_run_goes_to_the_first_worker_that_appears() -> None:
    """A worker that is admitted while a lost run waits takes the next attempt at once."""
    harness = CronHarness(minutely(), workers=("w1",))
    harness.lead()
    harness.advance(60)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.RUNNING))
    harness.expire("w1")
    harness.advance(5)
    harness.open_session("w1")
    harness.add_worker("w1", incarnation="2")
    launch = harness.launch(60)
    assert (launch.attempt, launch.worker, launch.state) == (2, "w1", LaunchState.COMMITTED)


def test_reports_are_committed_before_they_are_receipted() -> None:
    """Start and result become commands; each receipt follows the entry that holds what was reported."""
    harness = CronHarness(every_second())
    harness.lead()
    harness.advance(1)
    harness.hold = True
    [order] = harness.orders
    harness.report("w1", report_of(order.launch, LaunchState.RUNNING))
    harness.report("w1", report_of(order.launch, LaunchState.SUCCEEDED))
    assert harness.receipts == []
    assert [p.command.WhichOneof("operation") for p in harness.held] == ["start_launch"]
    harness.release()
    assert [receipt.state for receipt in harness.receipts] == [types_pb2.LAUNCH_STATE_RUNNING]
    assert [p.command.WhichOneof("operation") for p in harness.held] == ["finish_launch"]
    harness.release()
    assert [(r.state, r.refusal) for r in harness.receipts[1:]] == [(types_pb2.LAUNCH_STATE_SUCCEEDED, "")]
    assert harness.launch(1).state is LaunchState.SUCCEEDED


def test_what_needs_no_command_is_receipted_at_once() -> None:
    """Repeated reports are confirmed, and those of unknown, foreign or ended launches refused, without a proposal."""
    harness = CronHarness(every_second())
    order = started(harness)
    harness.receipts.clear()
    proposals = len(harness.proposed)
    harness.report("w1", report_of(order.launch, LaunchState.RUNNING))
    harness.report("w2", report_of(order.launch, LaunchState.SUCCEEDED))
    unknown = report_of(order.launch, LaunchState.SUCCEEDED)
    unknown.scheduled_at_unix_ms += 1
    harness.report("w1", unknown)
    assert len(harness.proposed) == proposals
    harness.report("w1", report_of(order.launch, LaunchState.FAILED))
    harness.report("w1", report_of(order.launch, LaunchState.FAILED))
    harness.report("w1", report_of(order.launch, LaunchState.SUCCEEDED))
    assert [receipt.refusal for receipt in harness.receipts] == [
        "",
        "this attempt belongs to w1",
        "this launch is not known; it was deleted, or is too old to be kept",
        "",
        "",
        "the launch has ended as FAILED",
    ]


def test_a_lost_report_proposal_is_proposed_again() -> None:
    """A result whose proposal failed is proposed again after a pause, without a second report of the worker."""
    harness = CronHarness(minutely())
    harness.lead()
    harness.advance(60)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.RUNNING))
    harness.hold = True
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    harness.release(lose=True)
    assert harness.launch(60).state is LaunchState.RUNNING
    harness.hold = False
    harness.advance(RETRY_S)
    assert harness.launch(60).state is LaunchState.SUCCEEDED
    assert harness.receipts[-1].state == types_pb2.LAUNCH_STATE_SUCCEEDED


# Sessions and leaders


def test_a_new_session_gets_the_orders_again() -> None:
    """A committed launch that the Hello does not name is ordered again, and its timeout starts anew."""
    harness = CronHarness(minutely())
    harness.lead(order_timeout_s=5.0)
    harness.advance(60 + 4)
    harness.open_session("w1")
    assert [order.node_id for order in harness.orders] == ["w1", "w1"]
    harness.advance(4)
    assert harness.launch(60).attempt == 1


def test_what_a_hello_names_counts_as_reported() -> None:
    """A Hello with a result commits it, and nothing is ordered again."""
    harness = CronHarness(minutely())
    harness.lead()
    harness.advance(60)
    harness.open_session("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED), session=7)
    assert harness.launch(60).state is LaunchState.SUCCEEDED
    assert len(harness.orders) == 1
    assert len(harness.receipts) == 1


def test_a_worker_that_comes_back_without_the_run_has_lost_it() -> None:
    """A running launch that its worker's Hello does not name goes to its next attempt."""
    harness = CronHarness(minutely())
    harness.lead()
    harness.advance(60)
    running = report_of(harness.orders[0].launch, LaunchState.RUNNING)
    harness.report("w1", running)
    harness.open_session("w1", running)
    assert harness.launch(60).attempt == 1
    harness.open_session("w1")
    assert harness.launch(60).state is LaunchState.WAITING
    harness.advance(1.1)
    launch = harness.launch(60)
    assert (launch.attempt, launch.worker) == (2, "w2")
    assert launch.earlier_attempts[0].reason == "w1 came back without the run"


def test_a_new_leader_orders_what_is_committed_and_finds_what_was_lost() -> None:
    """What an earlier leader committed but may not have sent is sent; what ran on a worker that is down goes on."""
    harness = CronHarness(every_second(overlap=OverlapPolicy.ALLOW))
    started(harness)
    harness.advance(1)
    harness.control = None
    harness.expire("w1")
    harness.orders.clear()
    harness.lead()
    assert [(o.node_id, o.launch.attempt) for o in harness.orders] == [("w2", 2)]  # It had not begun: at once.
    harness.advance(1.1)
    tokens = [(o.node_id, o.launch.scheduled_at_ms - START_MS, o.launch.attempt) for o in harness.orders]
    assert tokens == [("w2", 2_000, 2), ("w2", 3_000, 1), ("w2", 1_000, 2)]


def test_a_deleted_job_is_forgotten() -> None:
    """After a job is deleted nothing of it is launched, and the reports of its runs are refused."""
    harness = CronHarness(every_second())
    order = started(harness)
    harness.accept(delete_job=command_pb2.DeleteJob(job_id="tick"))
    harness.advance(3)
    harness.report("w1", report_of(order.launch, LaunchState.SUCCEEDED))
    assert len(harness.orders) == 1
    assert harness.receipts[-1].refusal.startswith("this launch is not known")


def test_a_manual_launch_is_ordered_like_any_other() -> None:
    """A launch that the API committed beside the schedule is ordered by the same path."""
    harness = CronHarness(MINUTELY)
    harness.lead()
    manual = command_pb2.CommitLaunch(job_id="minutely", worker="w2", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    harness.accept(commit_launch=manual)
    [order] = harness.orders
    assert order.node_id == "w2"
    harness.finish(order)
    assert harness.history("minutely")[0].state is LaunchState.SUCCEEDED
