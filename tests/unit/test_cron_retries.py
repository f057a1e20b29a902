"""What follows an attempt: retry policies, pauses, cancellation; the leader's cron controller over the real machine."""

from __future__ import annotations

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.control.interface import StopLaunch
from coordinator.control.retries import pause_ms
from coordinator.model import CronJobSpec, Launch, LaunchState, OverlapPolicy, RetryPolicy, WallMs
from tests.cron_harness import START_MS, CronHarness, report_of


def minutely(**fields: object) -> CronJobSpec:
    """A job that is due every minute."""
    return CronJobSpec(id="tick", schedule="* * * * *", command=("true",), **fields)  # type: ignore[arg-type]


def ordered(*, start: bool, **fields: object) -> CronHarness:
    """A cluster in which the first launch was ordered from w1, and has started when asked to."""
    harness = CronHarness(minutely(**fields))
    harness.lead()
    harness.advance(60)
    if start:
        harness.start(harness.orders[0])
    return harness


def attempts(harness: CronHarness, second: int = 60) -> list[tuple[int, str, str]]:
    """Every attempt of a launch: number, worker, state."""
    launch = harness.launch(second)
    earlier = [(it.attempt, it.worker, it.state.name) for it in launch.earlier_attempts]
    return [*earlier, (launch.attempt, launch.worker, launch.state.name)]


# The owner is lost


@pytest.mark.parametrize("retry", RetryPolicy)
def test_an_owner_lost_before_the_start(retry: RetryPolicy) -> None:
    """An attempt that was not confirmed is followed at once; with `never` it is lost with its worker."""
    harness = ordered(start=False, retry=retry)
    harness.suspect("w1")
    if retry is RetryPolicy.NEVER:
        assert attempts(harness) == [(1, "w1", "COMMITTED")]
        harness.expire("w1")
        assert attempts(harness) == [(1, "w1", "LOST")]
        assert harness.launch(60).reason == "w1 is down"
        assert len(harness.orders) == 1
    else:
        assert attempts(harness) == [(1, "w1", "LOST"), (2, "w2", "COMMITTED")]
        assert [order.node_id for order in harness.orders] == ["w1", "w2"]


@pytest.mark.parametrize("retry", RetryPolicy)
def test_an_owner_lost_during_the_run(retry: RetryPolicy) -> None:
    """A run is lost when its worker's lease has ended, not before; the next attempt follows after a pause."""
    harness = ordered(start=True, retry=retry)
    harness.suspect("w1")
    assert attempts(harness) == [(1, "w1", "RUNNING")]
    harness.expire("w1")
    if retry is RetryPolicy.NEVER:
        assert attempts(harness) == [(1, "w1", "LOST")]
        harness.advance(30)
        assert len(harness.orders) == 1
        return
    assert attempts(harness) == [(1, "w1", "LOST"), (1, "", "WAITING")]
    assert 900 <= harness.launch(60).not_before_ms - START_MS - 60_000 <= 1_100
    harness.advance(0.89)
    assert len(harness.orders) == 1
    harness.advance(0.22)
    assert attempts(harness) == [(1, "w1", "LOST"), (2, "w2", "COMMITTED")]
    assert [order.launch.attempt for order in harness.orders] == [1, 2]


@pytest.mark.parametrize("retry", RetryPolicy)
def test_an_owner_lost_after_the_run_and_before_its_report(retry: RetryPolicy) -> None:
    """A result that comes after the run was called lost is refused: what followed it counts, nothing twice."""
    harness = ordered(start=True, retry=retry)
    harness.expire("w1")
    harness.add_worker("w1", incarnation="2")
    result = report_of(harness.orders[0].launch, LaunchState.SUCCEEDED)
    harness.open_session("w1", result, session=2)
    receipt = harness.receipts[-1]
    if retry is RetryPolicy.NEVER:
        assert receipt.refusal == "the launch has ended as LOST"
        assert attempts(harness) == [(1, "w1", "LOST")]
    else:
        assert receipt.refusal == "attempt 1 was given up; attempt 2 counts"
        harness.advance(1.2)
        assert attempts(harness) == [(1, "w1", "LOST"), (2, "w2", "COMMITTED")]


@pytest.mark.parametrize("retry", RetryPolicy)
def test_an_owner_that_is_back_in_time_tells_its_result(retry: RetryPolicy) -> None:
    """A result that comes while the worker is only suspected counts, whatever the policy; nothing is tried again."""
    harness = ordered(start=True, retry=retry)
    harness.suspect("w1")
    harness.open_session("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED), session=2)
    harness.advance(30)
    assert attempts(harness) == [(1, "w1", "SUCCEEDED")]
    assert [(receipt.state, receipt.refusal) for receipt in harness.receipts[1:]] == [
        (types_pb2.LAUNCH_STATE_SUCCEEDED, "")
    ]
    assert len(harness.orders) == 1


@pytest.mark.parametrize("retry", RetryPolicy)
def test_a_run_that_a_heartbeat_does_not_name_is_lost(retry: RetryPolicy) -> None:
    """A running launch that its worker no longer names is lost; one that it names, or has not confirmed, is not."""
    harness = ordered(start=False, retry=retry)
    harness.heartbeat("w1")
    assert attempts(harness) == [(1, "w1", "COMMITTED")]
    harness.start(harness.orders[0])
    harness.heartbeat("w1", harness.launch(60))
    harness.heartbeat("w2")
    assert attempts(harness) == [(1, "w1", "RUNNING")]
    harness.heartbeat("w1")
    assert attempts(harness)[0] == (1, "w1", "LOST")
    assert harness.launch(60).state is (LaunchState.LOST if retry is RetryPolicy.NEVER else LaunchState.WAITING)
    told = harness.launch(60).reason if retry is RetryPolicy.NEVER else harness.launch(60).earlier_attempts[0].reason
    assert told == "w1 no longer knows the run"


@pytest.mark.parametrize("retry", RetryPolicy)
def test_an_order_that_waits_at_its_worker_is_not_given_up(retry: RetryPolicy) -> None:
    """While heartbeats name an order, nobody else gets the launch; once they do not, it goes on after the timeout."""
    harness = ordered(start=False, retry=retry)
    for _ in range(40):
        harness.heartbeat("w1", harness.launch(60))
        harness.advance(0.5)
    assert attempts(harness) == [(1, "w1", "COMMITTED")]
    for _ in range(8):
        harness.heartbeat("w1")
        harness.advance(0.5)
    assert attempts(harness) == [(1, "w1", "COMMITTED")]
    harness.advance(0.5)
    assert attempts(harness)[0] == (1, "w1", "LOST")
    assert len(harness.orders) == (1 if retry is RetryPolicy.NEVER else 2)


def test_a_result_on_its_way_is_not_lost_by_a_heartbeat() -> None:
    """While a result waits to be committed, a heartbeat without the run changes nothing."""
    harness = ordered(start=True)
    harness.hold = True
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    harness.heartbeat("w1")
    harness.release()
    assert attempts(harness) == [(1, "w1", "SUCCEEDED")]
    assert not harness.held


# The run fails


@pytest.mark.parametrize("state", [LaunchState.FAILED, LaunchState.TIMED_OUT])
@pytest.mark.parametrize("retry", RetryPolicy)
def test_a_run_that_fails(retry: RetryPolicy, state: LaunchState) -> None:
    """Only `on_failure` tries a failed run again, after a pause; the report has its receipt at once."""
    harness = ordered(start=True, retry=retry)
    harness.report("w1", report_of(harness.orders[0].launch, state))
    assert [(receipt.state, receipt.refusal) for receipt in harness.receipts[1:]] == [(state.value, "")]
    if retry is not RetryPolicy.ON_FAILURE:
        assert attempts(harness) == [(1, "w1", state.name)]
        harness.advance(30)
        assert len(harness.orders) == 1
        return
    assert attempts(harness) == [(1, "w1", state.name), (1, "", "WAITING")]
    harness.report("w1", report_of(harness.orders[0].launch, state))  # Its receipt was lost: it is confirmed again.
    assert harness.receipts[-1].refusal == ""
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.SUCCEEDED))
    assert harness.receipts[-1].refusal == f"attempt 1 has ended as {state.name}"
    harness.advance(1.2)
    assert attempts(harness) == [(1, "w1", state.name), (2, "w1", "COMMITTED")]  # The owner is still the first choice.


def test_pauses_double_up_to_the_cap_and_attempts_end() -> None:
    """Four attempts: pauses of about 2, 4 and 5 seconds, by the token's hash; the last failure is the launch's."""
    harness = ordered(
        start=True, retry=RetryPolicy.ON_FAILURE, attempts_max=4, retry_backoff_s=2.0, retry_backoff_s_max=5.0
    )
    waits = []
    for number in range(4):
        harness.finish(harness.orders[number], LaunchState.FAILED)
        launch = harness.launch(60)
        waits.append(launch.not_before_ms - harness.clock.wall_ms() if launch.not_before_ms else 0)
        harness.advance(6)
    assert waits[3] == 0
    for wait_ms, nominal_ms in zip(waits, (2_000, 4_000, 5_000), strict=False):
        assert 0.9 * nominal_ms <= wait_ms <= 1.1 * nominal_ms
    assert [state for _, _, state in attempts(harness)] == ["FAILED"] * 4
    assert len(harness.orders) == 4


def test_pauses_differ_between_tokens_and_never_between_leaders() -> None:
    """The spread of the pauses comes from the token alone and fills its range."""
    spec = minutely(retry_backoff_s=10.0)
    pauses = [pause_ms(spec, Launch(f"job_{number}", WallMs(START_MS))) for number in range(200)]
    assert pauses == [pause_ms(spec, Launch(f"job_{number}", WallMs(START_MS))) for number in range(200)]
    assert all(9_000 <= pause <= 11_000 for pause in pauses)
    assert len(set(pauses)) > 150


def test_a_pause_goes_on_under_the_next_leader() -> None:
    """A retry that waits begins when its time has come, although the leader has changed meanwhile."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE, retry_backoff_s=10.0)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    wait_ms = harness.launch(60).not_before_ms - harness.clock.wall_ms()
    harness.advance(3)
    harness.lead()
    harness.advance(wait_ms / 1_000 - 3 - 0.01)
    assert len(harness.orders) == 1
    harness.advance(0.02)
    assert [order.launch.attempt for order in harness.orders] == [1, 2]


def test_a_pause_is_not_stretched_by_a_step_of_the_wall_clock() -> None:
    """Neither a step back by an hour nor one forward changes when a retry begins under the same leader."""
    for step_s in (-3_600, 3_600):
        harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE, retry_backoff_s=10.0, start_deadline_s=9_000.0)
        harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
        harness.clock.step_wall(step_s)
        harness.advance(8.9)
        assert harness.launch(60).state is LaunchState.WAITING
        harness.advance(2.2)
        assert harness.launch(60).attempt == 2


def test_a_step_of_all_wall_clocks_does_not_stretch_a_pause_under_the_next_leader() -> None:
    """The log has the wall clock's time of a retry; a leader that finds it far ahead waits one whole pause at most."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE, retry_backoff_s=10.0)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    harness.clock.step_wall(-3_600)
    harness.lead()
    harness.advance(8.9)
    assert harness.launch(60).state is LaunchState.WAITING
    harness.advance(2.2)
    assert harness.launch(60).attempt == 2


def test_a_retry_goes_to_the_worker_that_is_there_then() -> None:
    """The worker of the next attempt is chosen when it begins, not when the pause does."""
    harness = ordered(start=True)
    harness.expire("w1")
    harness.suspect("w2")
    harness.advance(1.2)
    assert attempts(harness)[-1] == (2, "w3", "COMMITTED")


def test_a_pause_or_an_edit_leaves_retries_alone() -> None:
    """A retry of a paused and edited job goes on, with the new definition; a paused job launches nothing else."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=True))
    edited = types_pb2.CronJobSpec(id="tick", schedule="* * * * *", command=["better"])
    harness.accept(apply_job=command_pb2.ApplyJob(spec=edited))
    harness.advance(1.2)
    harness.finish(harness.orders[1])
    harness.advance(100)
    ordered_as = [(order.launch.attempt, order.spec.command) for order in harness.orders]
    assert ordered_as == [(1, ("true",)), (2, ("better",))]
    assert len(harness.history()) == 1


# Cancellation


def test_a_cancelled_run_is_stopped() -> None:
    """The worker is told to stop, once per session, until it reports; its report ends the launch."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE)
    harness.cancel(60)
    stop = StopLaunch("w1", "tick", WallMs(START_MS + 60_000), 1, "enough")
    assert harness.stops == [stop]
    harness.advance(10)
    harness.heartbeat("w1", harness.launch(60))
    assert harness.stops == [stop]
    harness.open_session("w1", report_of(harness.launch(60), LaunchState.RUNNING), session=2)
    assert harness.stops == [stop, stop]
    harness.report("w1", report_of(harness.launch(60), LaunchState.CANCELLED), session=2)
    assert attempts(harness) == [(1, "w1", "CANCELLED")]
    assert harness.receipts[-1].refusal == ""
    harness.open_session("w1", session=3)
    harness.advance(10)
    assert len(harness.stops) == 2


def test_a_new_leader_stops_what_was_cancelled_before() -> None:
    """The stop follows from the state: a leader that was not there when it was asked for sends it."""
    harness = ordered(start=True)
    harness.control = None
    harness.cancel(60)
    harness.lead()
    assert [stop.reason for stop in harness.stops] == ["enough"]
    assert len(harness.orders) == 1


def test_a_cancelled_order_is_stopped_and_never_ordered_again() -> None:
    """What was cancelled before its start is not ordered in a new session, and its timeout makes no attempt."""
    harness = ordered(start=False)
    harness.cancel(60)
    harness.open_session("w1", session=2)
    assert len(harness.stops) == 2
    harness.advance(20)
    assert len(harness.orders) == 1
    assert attempts(harness) == [(1, "w1", "COMMITTED")]
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.CANCELLED), session=2)
    assert attempts(harness) == [(1, "w1", "CANCELLED")]


def test_a_stop_that_nobody_answers_is_sent_again() -> None:
    """A worker that could not note the stop, as on a full disk, hears it again in the same session until it answers."""
    harness = ordered(start=False)
    harness.cancel(60)
    assert len(harness.stops) == 1
    harness.advance(4.9)
    assert len(harness.stops) == 1
    harness.advance(0.2)
    assert len(harness.stops) == 2
    harness.advance(5)
    assert harness.stops == [harness.stops[0]] * 3
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.CANCELLED))
    harness.advance(20)
    assert len(harness.stops) == 3
    assert attempts(harness) == [(1, "w1", "CANCELLED")]


@pytest.mark.parametrize("state", [LaunchState.SUCCEEDED, LaunchState.FAILED])
def test_a_run_that_ended_before_its_stop_tells_how(state: LaunchState) -> None:
    """A cancelled launch whose run had ended keeps that end, and is not tried again."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE)
    harness.cancel(60)
    harness.report("w1", report_of(harness.orders[0].launch, state))
    harness.advance(20)
    assert attempts(harness) == [(1, "w1", state.name)]


@pytest.mark.parametrize("start", [False, True])
def test_a_cancelled_launch_whose_worker_is_lost_is_lost(start: bool) -> None:
    """No further attempt is made, and the record says that it had been told to stop."""
    harness = ordered(start=start)
    harness.cancel(60)
    harness.suspect("w1")
    assert not harness.launch(60).state.has_ended
    harness.expire("w1")
    assert attempts(harness) == [(1, "w1", "LOST")]
    assert harness.launch(60).reason == "w1 is down; it had been told to stop: enough"
    assert len(harness.orders) == 1


def test_a_retry_that_waits_is_cancelled_at_once() -> None:
    """A launch between two attempts ends with the command; nothing begins afterwards."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    harness.cancel(60)
    harness.advance(20)
    assert attempts(harness) == [(1, "w1", "CANCELLED")]
    assert len(harness.orders) == 1
    assert harness.stops == []


def test_a_cancellation_meets_a_begin_that_is_on_its_way() -> None:
    """When the begin of an attempt is applied after the cancellation it is refused, and nothing is ordered."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE)
    harness.report("w1", report_of(harness.orders[0].launch, LaunchState.FAILED))
    harness.hold = True
    harness.advance(1.2)
    assert [held.command.WhichOneof("operation") for held in harness.held] == ["assign_launch"]
    harness.cancel(60)
    harness.release()
    harness.advance(1)
    assert attempts(harness) == [(1, "w1", "CANCELLED")]
    assert (len(harness.orders), len(harness.held)) == (1, 0)


def test_what_was_given_up_is_told_to_stop() -> None:
    """A worker whose heartbeat names an attempt that was given up is told to stop it, once per session."""
    harness = ordered(start=False)
    harness.advance(5.1)
    assert attempts(harness) == [(1, "w1", "LOST"), (2, "w2", "COMMITTED")]
    first = harness.orders[0].launch
    harness.heartbeat("w1", first)
    harness.heartbeat("w1", first)
    assert [(stop.node_id, stop.attempt, stop.reason) for stop in harness.stops] == [
        ("w1", 1, "attempt 1 was given up")
    ]
    harness.heartbeat("w1", first, session=2)
    assert len(harness.stops) == 2
    harness.heartbeat("w2", harness.launch(60))
    assert len(harness.stops) == 2


def test_what_was_given_up_is_told_to_stop_beside_its_next_attempt() -> None:
    """A worker that was given the next attempt too, for want of another one, stops the first and keeps the second."""
    harness = ordered(start=False)
    harness.suspect("w2")
    harness.suspect("w3")
    harness.advance(5.1)
    assert attempts(harness) == [(1, "w1", "LOST"), (2, "w1", "COMMITTED")]
    first, second = (order.launch for order in harness.orders)
    harness.start(harness.orders[1])
    harness.heartbeat("w1", first, second)
    harness.heartbeat("w1", second, first)
    assert [(stop.node_id, stop.attempt) for stop in harness.stops] == [("w1", 1)]
    assert harness.launch(60).state is LaunchState.RUNNING


def test_what_ended_is_not_told_to_stop() -> None:
    """A heartbeat that names a failed attempt or an ended launch, whose receipt is under way, stops nothing."""
    harness = ordered(start=True, retry=RetryPolicy.ON_FAILURE, overlap=OverlapPolicy.ALLOW)
    first = harness.orders[0].launch
    harness.report("w1", report_of(first, LaunchState.FAILED))
    harness.heartbeat("w1", first)
    harness.advance(1.2)
    harness.finish(harness.orders[1])
    harness.heartbeat("w1", first, harness.orders[1].launch)
    assert harness.stops == []
