"""The replicated state machine's launches: waiting, retries, cancellation, pauses."""

from __future__ import annotations

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.machine import BATCH_COMMANDS_MAX
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.model import Launch, LaunchState, WallMs
from tests.machine_driver import MachineDriver

FAILED = types_pb2.LAUNCH_STATE_FAILED


def cluster() -> tuple[MachineDriver, int]:
    """Workers a and b, the job j, and a scheduled time that is still to come."""
    driver = MachineDriver()
    driver.bootstrap()
    driver.add_worker("a")
    driver.add_worker("b")
    spec = types_pb2.CronJobSpec(id="j", schedule="* * * * *", command=["true"])
    driver.accept(apply_job=command_pb2.ApplyJob(spec=spec, source="api"))
    return driver, driver.time_ms + 60_000


def commit(driver: MachineDriver, at: int, worker: str = "", **fields: object) -> Launch:
    """Commits a launch; the launch."""
    command = command_pb2.CommitLaunch(
        job_id="j",
        scheduled_at_unix_ms=at,
        worker=worker,
        **fields,  # type: ignore[arg-type]
    )
    driver.accept(commit_launch=command)
    return launch_at(driver, at)


def launch_at(driver: MachineDriver, at: int) -> Launch:
    """The launch at a scheduled time."""
    return driver.state.launches[("j", WallMs(at))]


def assign(at: int, attempt: int, worker: str) -> command_pb2.AssignLaunch:
    """The next attempt of a launch that waits."""
    return command_pb2.AssignLaunch(job_id="j", scheduled_at_unix_ms=at, attempt=attempt, worker=worker)


def finish(
    at: int, attempt: int, state: types_pb2.LaunchState.ValueType, retry_at: int = 0
) -> command_pb2.FinishLaunch:
    """The end of an attempt."""
    return command_pb2.FinishLaunch(
        job_id="j", scheduled_at_unix_ms=at, attempt=attempt, state=state, exit_status=1, retry_at_unix_ms=retry_at
    )


def lose(at: int, attempt: int, worker: str = "", retry_at: int = 0) -> command_pb2.LoseLaunch:
    """The loss of an attempt."""
    return command_pb2.LoseLaunch(
        job_id="j",
        scheduled_at_unix_ms=at,
        attempt=attempt,
        next_worker=worker,
        retry_at_unix_ms=retry_at,
        reason="gone",
    )


def cancel(at: int) -> command_pb2.CancelLaunch:
    """A cancellation."""
    return command_pb2.CancelLaunch(job_id="j", scheduled_at_unix_ms=at, reason="enough")


def test_a_launch_waits_until_it_is_assigned() -> None:
    """Shows that a launch without a worker waits, cannot start or end, and begins attempt 1 once, where it is told."""
    driver, at = cluster()
    launch = commit(driver, at, due_unix_ms=at + 7, not_before_unix_ms=at + 9, reason="its turn")
    assert (launch.state, launch.attempt, launch.worker) == (LaunchState.WAITING, 0, "")
    assert (launch.due_ms, launch.not_before_ms, launch.reason) == (at + 7, at + 9, "its turn")
    start = command_pb2.StartLaunch(job_id="j", scheduled_at_unix_ms=at)
    assert driver.refuse(start_launch=start).code == command_pb2.REFUSAL_CODE_STALE
    assert driver.refuse(finish_launch=finish(at, 0, FAILED)).code == command_pb2.REFUSAL_CODE_STALE
    driver.accept(assign_launch=assign(at, 0, "b"))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt, launch.worker) == (LaunchState.COMMITTED, 1, "b")
    assert (launch.not_before_ms, launch.reason) == (0, "")
    for attempt in (0, 1):
        assert driver.refuse(assign_launch=assign(at, attempt, "a")).code == command_pb2.REFUSAL_CODE_STALE


def test_a_launch_that_nobody_can_begin_is_missed() -> None:
    """Shows that a launch that is given up before its first attempt is MISSED with the reason."""
    driver, at = cluster()
    commit(driver, at)
    driver.accept(lose_launch=lose(at, 0))
    launch = launch_at(driver, at)
    assert (launch.state, launch.reason) == (LaunchState.MISSED, "gone")


def test_a_failed_attempt_waits_for_the_next() -> None:
    """Shows that an end with a retry is kept among the attempts, and that the last attempt's end is the launch's."""
    driver, at = cluster()
    commit(driver, at, "a")
    driver.accept(finish_launch=finish(at, 1, FAILED, retry_at=at + 5_000))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt, launch.not_before_ms) == (LaunchState.WAITING, 1, at + 5_000)
    assert [(it.attempt, it.worker, it.state) for it in launch.earlier_attempts] == [(1, "a", LaunchState.FAILED)]
    driver.accept(assign_launch=assign(at, 1, "b"))
    driver.accept(finish_launch=finish(at, 2, FAILED))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt, launch.worker) == (LaunchState.FAILED, 2, "b")
    assert len(launch.earlier_attempts) == 1


def test_only_failures_are_retried_by_a_finish() -> None:
    """Shows that a success and a cancelled run cannot be followed by another attempt."""
    driver, at = cluster()
    commit(driver, at, "a")
    for state in (types_pb2.LAUNCH_STATE_SUCCEEDED, types_pb2.LAUNCH_STATE_CANCELLED):
        refusal = driver.refuse(finish_launch=finish(at, 1, state, retry_at=at + 5_000))
        assert "nothing to try again" in refusal.message


def test_a_retry_that_nobody_takes_ends_as_its_last_attempt() -> None:
    """Shows that a launch that waits after a loss ends as LOST, with both reasons."""
    driver, at = cluster()
    commit(driver, at, "a")
    driver.accept(lose_launch=lose(at, 1, retry_at=at + 5_000))
    assert launch_at(driver, at).state is LaunchState.WAITING
    driver.accept(lose_launch=lose(at, 1))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt, launch.worker) == (LaunchState.LOST, 1, "a")
    assert (launch.reason, launch.earlier_attempts) == ("gone; gone", ())


@pytest.mark.parametrize("attempts", [0, 1])
def test_cancelling_what_waits_ends_it_at_once(attempts: int) -> None:
    """Shows that a launch that waits, for its first or its next attempt, is CANCELLED by the command alone."""
    driver, at = cluster()
    commit(driver, at, "a" if attempts else "")
    if attempts:
        driver.accept(lose_launch=lose(at, 1, retry_at=at + 5_000))
    driver.accept(cancel_launch=cancel(at))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt) == (LaunchState.CANCELLED, attempts)
    assert "enough" in launch.reason
    assert driver.refuse(assign_launch=assign(at, attempts, "b")).code == command_pb2.REFUSAL_CODE_STALE
    assert driver.refuse(cancel_launch=cancel(at)).code == command_pb2.REFUSAL_CODE_STALE


@pytest.mark.parametrize("end", ["finish", "lose to a worker", "lose for later"])
def test_a_cancelled_launch_makes_no_further_attempt(end: str) -> None:
    """Shows that what was told to stop ends with its attempt, whatever the leader wished to follow."""
    driver, at = cluster()
    commit(driver, at, "a")
    driver.accept(cancel_launch=cancel(at))
    launch = launch_at(driver, at)
    assert (launch.state, launch.cancel_reason) == (LaunchState.COMMITTED, "enough")
    if end == "finish":
        driver.accept(finish_launch=finish(at, 1, FAILED, retry_at=at + 5_000))
    else:
        driver.accept(lose_launch=lose(at, 1, *(("b", 0) if end == "lose to a worker" else ("", at + 5_000))))
    state = launch_at(driver, at).state
    assert state is (LaunchState.FAILED if end == "finish" else LaunchState.LOST)


@pytest.mark.parametrize("everything", [False, True])
def test_a_pause_drops_what_the_schedule_committed_and_nobody_began(everything: bool) -> None:
    """Shows that a pause cancels launches that wait for their first attempt, and leaves retries and manual ones."""
    driver, at = cluster()
    commit(driver, at, "a")
    driver.accept(lose_launch=lose(at, 1, retry_at=at + 5_000))
    commit(driver, at + 1_000)
    manual = command_pb2.CommitLaunch(job_id="j", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    by_hand = driver.accept(commit_launch=manual).result.applied.scheduled_at_unix_ms
    if everything:
        settings = types_pb2.Settings(replicas=2, cron_paused=True)
        driver.accept(change_settings=command_pb2.ChangeSettings(settings=settings))
    else:
        driver.accept(set_job_paused=command_pb2.SetJobPaused(job_id="j", paused=True))
    assert launch_at(driver, at).state is LaunchState.WAITING
    assert launch_at(driver, by_hand).state is LaunchState.WAITING
    assert launch_at(driver, at + 1_000).state is LaunchState.CANCELLED


def test_a_manual_launch_is_due_when_it_is_committed() -> None:
    """Shows that lateness of a manual launch counts from its log entry, not from its made-up scheduled time."""
    driver, _ = cluster()
    manual = command_pb2.CommitLaunch(job_id="j", worker="a", trigger=types_pb2.LAUNCH_TRIGGER_MANUAL)
    at = driver.accept(commit_launch=manual).result.applied.scheduled_at_unix_ms
    launch = launch_at(driver, at)
    assert launch.due_ms == launch.committed_ms == driver.time_ms
    start = command_pb2.StartLaunch(
        job_id="j", scheduled_at_unix_ms=at, attempt=1, started_unix_ms=driver.time_ms + 30
    )
    assert launch.lateness_ms is None
    driver.accept(start_launch=start)
    assert launch_at(driver, at).lateness_ms == 30


def test_lateness_is_that_of_the_first_start() -> None:
    """Shows that a retry does not make a launch later than it was."""
    driver, at = cluster()
    commit(driver, at, "a", due_unix_ms=at + 500)
    end = finish(at, 1, FAILED, retry_at=at + 5_000)
    end.started_unix_ms = at + 750
    driver.accept(finish_launch=end)
    assert launch_at(driver, at).lateness_ms == 250
    driver.accept(assign_launch=assign(at, 1, "b"))
    driver.accept(
        start_launch=command_pb2.StartLaunch(
            job_id="j", scheduled_at_unix_ms=at, attempt=2, started_unix_ms=at + 6_000
        )
    )
    assert launch_at(driver, at).lateness_ms == 250


def test_launches_that_wait_survive_a_snapshot() -> None:
    """Shows that slots, earlier attempts and cancellations are in the snapshot."""
    driver, at = cluster()
    commit(driver, at, "a")
    driver.accept(lose_launch=lose(at, 1, retry_at=at + 5_000))
    commit(driver, at + 1_000, not_before_unix_ms=at + 9_000, reason="its turn")
    commit(driver, at + 2_000, "b")
    driver.accept(cancel_launch=cancel(at + 2_000))
    assert decode_snapshot(encode_snapshot(driver.state)).launches == driver.state.launches


def test_many_due_launches_are_one_entry() -> None:
    """Shows that what is due for many jobs in one instant can be committed by one batch, each with its own result."""
    driver, at = cluster()
    commits = [
        command_pb2.Command(
            commit_launch=command_pb2.CommitLaunch(job_id="j", scheduled_at_unix_ms=at + number, worker="a")
        )
        for number in range(BATCH_COMMANDS_MAX)
    ]
    index = driver.state.index
    transition = driver.accept(batch=command_pb2.Batch(commands=commits))
    assert driver.state.index == index + 1
    assert all(result.HasField("applied") for result in transition.result.applied.results)
    assert len(driver.state.launches) == BATCH_COMMANDS_MAX


def decline(at: int, attempt: int, worker: str = "") -> command_pb2.DeclineLaunch:
    """A worker's word that it never starts an attempt."""
    return command_pb2.DeclineLaunch(
        job_id="j", scheduled_at_unix_ms=at, attempt=attempt, next_worker=worker, reason="a declined"
    )


def test_a_declined_attempt_uses_up_its_number_and_nothing_else() -> None:
    """Shows that the next attempt follows on another worker, or waits, and that the declined one is filed nowhere."""
    driver, at = cluster()
    commit(driver, at, "a")
    driver.accept(decline_launch=decline(at, 1, "b"))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt, launch.worker, launch.reason) == (LaunchState.COMMITTED, 2, "b", "a declined")
    assert (launch.earlier_attempts, launch.attempts_counted) == ((), 1)
    start = command_pb2.StartLaunch(job_id="j", scheduled_at_unix_ms=at, attempt=1)
    assert driver.refuse(start_launch=start).code == command_pb2.REFUSAL_CODE_STALE
    assert driver.refuse(decline_launch=decline(at, 1, "b")).code == command_pb2.REFUSAL_CODE_STALE
    driver.accept(decline_launch=decline(at, 2))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt, launch.worker, launch.attempts_counted) == (LaunchState.WAITING, 2, "", 0)
    driver.accept(assign_launch=assign(at, 2, "a"))
    driver.accept(lose_launch=lose(at, 3, retry_at=at + 5_000))
    driver.accept(assign_launch=assign(at, 3, "b"))
    driver.accept(decline_launch=decline(at, 4))
    assert [it.attempt for it in launch_at(driver, at).earlier_attempts] == [3]
    assert launch_at(driver, at).attempts_counted == 1
    driver.accept(lose_launch=lose(at, 4))
    launch = launch_at(driver, at)
    assert (launch.state, launch.attempt, launch.reason) == (LaunchState.LOST, 3, "gone; gone")


def test_what_runs_cannot_be_declined_and_what_shall_stop_ends() -> None:
    """Shows that a decline of a run is refused, and that one of a cancelled launch cancels it."""
    driver, at = cluster()
    commit(driver, at, "a")
    driver.accept(start_launch=command_pb2.StartLaunch(job_id="j", scheduled_at_unix_ms=at, attempt=1))
    assert driver.refuse(decline_launch=decline(at, 1, "b")).code == command_pb2.REFUSAL_CODE_STALE
    commit(driver, at + 60_000, "a")
    driver.accept(cancel_launch=cancel(at + 60_000))
    driver.accept(decline_launch=decline(at + 60_000, 1, "b"))
    launch = launch_at(driver, at + 60_000)
    assert (launch.state, launch.attempt, launch.worker, launch.reason) == (LaunchState.CANCELLED, 1, "", "enough")


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("is_offered", [False, True])
def test_a_pause_ends_what_is_declined_after_it(everything: bool, is_offered: bool) -> None:
    """Shows that nothing of the schedule begins in a pause because its first worker declined it; a retry goes on."""
    driver, at = cluster()
    commit(driver, at, "a")
    commit(driver, at + 60_000, "a")
    driver.accept(lose_launch=lose(at + 60_000, 1, retry_at=at + 61_000))
    driver.accept(assign_launch=assign(at + 60_000, 1, "b"))
    if everything:
        settings = types_pb2.Settings(replicas=2, cron_paused=True)
        driver.accept(change_settings=command_pb2.ChangeSettings(settings=settings))
    else:
        driver.accept(set_job_paused=command_pb2.SetJobPaused(job_id="j", paused=True))
    driver.accept(decline_launch=decline(at, 1, "b" if is_offered else ""))
    launch = launch_at(driver, at)
    assert launch.state is LaunchState.CANCELLED
    assert launch.reason == ("all jobs were paused" if everything else "the job was paused")
    driver.accept(decline_launch=decline(at + 60_000, 2))
    assert launch_at(driver, at + 60_000).state is LaunchState.WAITING
