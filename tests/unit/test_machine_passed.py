"""The state machine on what passed in a pause or under another schedule: noted, never launched, recorded in order."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.machine.codec import job_spec_from_proto, job_to_proto
from coordinator.machine.launches import RECORDS_MAX
from coordinator.machine.passed import PASSED_MAX
from coordinator.machine.snapshot import decode_snapshot, encode_snapshot
from coordinator.model import CronJob, LaunchState, PassedTimes, WallMs
from tests.machine_driver import MachineDriver

MINUTELY, OTHER = "* * * * *", "*/2 * * * *"
STALE = command_pb2.REFUSAL_CODE_STALE


def cluster(*jobs: str) -> MachineDriver:
    """Two workers, and minutely jobs."""
    driver = MachineDriver()
    driver.bootstrap()
    driver.add_worker("a")
    driver.add_worker("b")
    for job_id in jobs or ("j",):
        apply_job(driver, job_id)
    return driver


def apply_job(driver: MachineDriver, job_id: str = "j", **fields: Any) -> None:
    """Makes or edits a job."""
    spec = types_pb2.CronJobSpec(**{"id": job_id, "schedule": MINUTELY, "command": ["true"], **fields})
    driver.accept(apply_job=command_pb2.ApplyJob(spec=spec))


def pause(driver: MachineDriver, paused: bool = True, job_id: str = "j") -> None:
    """Pauses or resumes a job."""
    driver.accept(set_job_paused=command_pb2.SetJobPaused(job_id=job_id, paused=paused))


def pause_all(driver: MachineDriver, paused: bool = True) -> None:
    """Pauses or resumes all jobs."""
    settings = types_pb2.Settings(replicas=2, cron_paused=paused)
    driver.accept(change_settings=command_pb2.ChangeSettings(settings=settings))


def job(driver: MachineDriver, job_id: str = "j") -> CronJob:
    """The job as it stands."""
    return driver.state.jobs[job_id]


def skip(at_ms: int, **fields: Any) -> command_pb2.RecordNoLaunch:
    """A record that nothing was launched."""
    skipped = types_pb2.LAUNCH_STATE_SKIPPED
    return command_pb2.RecordNoLaunch(
        job_id="j", scheduled_at_unix_ms=at_ms, state=skipped, reason="the job was paused", **fields
    )


def launch(at_ms: int, **fields: Any) -> command_pb2.CommitLaunch:
    """A launch by the schedule."""
    return command_pb2.CommitLaunch(job_id="j", scheduled_at_unix_ms=at_ms, worker="a", **fields)


def test_what_passed_in_a_pause_is_recorded_in_order_and_never_launched() -> None:
    """Shows that a resume keeps the watermark for the records, refuses every launch up to it, and then goes on."""
    driver = cluster()
    before = job(driver).decided_until_ms
    pause(driver)
    driver.time_ms = WallMs(driver.time_ms + 600_000)
    pause(driver, False)
    resumed = driver.time_ms
    assert job(driver).passed == (PassedTimes(resumed, MINUTELY, "UTC", "the job was paused"),)
    assert (job(driver).decided_until_ms, job(driver).closed_until_ms) == (before, resumed)
    for at_ms in (before + 60_000, resumed):
        refusal = driver.refuse(commit_launch=launch(at_ms))
        assert (refusal.code, "is not launched: the job was paused" in refusal.message) == (STALE, True)
    driver.accept(record_no_launch=skip(before + 60_000))
    assert driver.refuse(record_no_launch=skip(before + 60_000)).code == STALE
    assert job(driver).closed_until_ms == resumed
    driver.accept(record_no_launch=skip(resumed))
    assert job(driver).passed == ()
    driver.accept(commit_launch=launch(resumed + 1_000))
    states = [driver.state.launches[("j", at_ms)].state for at_ms in driver.state.launch_times["j"]]
    assert states == [LaunchState.SKIPPED, LaunchState.SKIPPED, LaunchState.COMMITTED]


def test_one_command_records_many_times_or_none() -> None:
    """Shows that earlier times get records of their own, and that a list that is none, or late, changes nothing."""
    driver = cluster()
    pause(driver)
    driver.time_ms = WallMs(driver.time_ms + 600_000)
    pause(driver, False)
    first = job(driver).decided_until_ms + 1_000
    for wrong in ([first, first], [first + 9_000], list(range(first, first + RECORDS_MAX + 1))):
        refusal = driver.refuse(record_no_launch=skip(first + 9_000, earlier_unix_ms=wrong))
        assert refusal.code == command_pb2.REFUSAL_CODE_INVALID
    transition = driver.accept(record_no_launch=skip(first + 9_000, earlier_unix_ms=[first, first + 5_000]))
    assert driver.state.launch_times["j"] == (first, first + 5_000, first + 9_000)
    assert "and 2 times before, from" in transition.records[-1].message
    late = skip(first + 60_000, earlier_unix_ms=[first + 9_000])
    assert driver.refuse(record_no_launch=late).code == STALE


def test_a_later_launch_forgets_what_had_no_times() -> None:
    """Shows that a stretch in which nothing was scheduled ends with the next decision."""
    driver = cluster()
    pause(driver)
    pause(driver, False)
    assert job(driver).passed != ()
    driver.accept(commit_launch=launch(driver.time_ms + 30_000))
    assert job(driver).passed == ()


def test_an_edit_leaves_times_of_the_schedule_before_it() -> None:
    """Shows that each stretch keeps its own schedule and zone, and says of a paused job that it was paused."""
    driver = cluster()
    apply_job(driver, schedule=OTHER)
    pause(driver)
    apply_job(driver, schedule=OTHER, time_zone="Europe/Berlin")
    apply_job(driver, schedule=OTHER, time_zone="Europe/Berlin", description="the same times")
    pause_all(driver)
    pause(driver, False)
    pause_all(driver, False)
    assert [(past.schedule, past.time_zone, past.reason) for past in job(driver).passed] == [
        (MINUTELY, "UTC", "the schedule was changed"),
        (OTHER, "UTC", "the job was paused"),
        (OTHER, "Europe/Berlin", "the job was paused"),
        (OTHER, "Europe/Berlin", "all jobs were paused"),
    ]


def test_a_resume_of_all_leaves_paused_jobs_to_their_own() -> None:
    """Shows that jobs paused by themselves are closed by their own resume, so that they say so."""
    driver = cluster("j", "k")
    pause(driver)
    pause_all(driver)
    pause_all(driver, False)
    assert job(driver).passed == ()
    assert [past.reason for past in job(driver, "k").passed] == ["all jobs were paused"]
    pause(driver, False)
    assert [past.reason for past in job(driver).passed] == ["the job was paused"]


def test_pauses_in_a_row_are_one() -> None:
    """Shows that nothing piles up when a job is paused and resumed again and again."""
    driver = cluster()
    for _ in range(3 * PASSED_MAX):
        pause(driver)
        pause(driver, False)
    assert job(driver).passed == (PassedTimes(driver.time_ms, MINUTELY, "UTC", "the job was paused"),)


def test_edits_within_a_second_are_one() -> None:
    """Shows that a stretch without a whole second adds none, and still closes the times up to it."""
    driver = cluster()
    for number in range(3 * PASSED_MAX):
        driver.time_ms = WallMs(driver.time_ms - 999)
        apply_job(driver, schedule=OTHER if number % 2 else "@hourly")
        assert job(driver).closed_until_ms == driver.time_ms
        assert len(job(driver).passed) <= 1


def test_edits_beyond_count_forget_the_first_and_say_so() -> None:
    """Shows that the state stays bounded whatever is edited, and that the story tells what has no record."""
    driver = cluster()
    for number in range(PASSED_MAX):
        apply_job(driver, schedule=OTHER if number % 2 else "@hourly")
    first, second = job(driver).passed[:2]
    transition = driver.accept(
        apply_job=command_pb2.ApplyJob(
            spec=types_pb2.CronJobSpec(id="j", schedule=MINUTELY, command=["true"], time_zone="Asia/Tokyo")
        )
    )
    assert len(job(driver).passed) == PASSED_MAX
    assert (job(driver).decided_until_ms, job(driver).passed[0]) == (first.until_ms, second)
    assert any("may have no record" in record.message for record in transition.records)


@pytest.mark.parametrize("command", ["launch", "record"])
def test_what_was_decided_before_an_edit_is_refused_after_it(command: str) -> None:
    """Shows that a decision by the old schedule, or one that leaves out what closed meanwhile, does not count."""
    driver = cluster()
    seen_ms = job(driver).closed_until_ms
    at_ms = driver.time_ms + 60_000  # The leader's clock was ahead of the edit's log time.
    apply_job(driver, schedule=OTHER)
    make: Any = {"launch": launch, "record": skip}[command]
    operation = {"launch": "commit_launch", "record": "record_no_launch"}[command]
    refusal = driver.refuse(**{operation: make(at_ms, closed_until_unix_ms=seen_ms)})
    assert (refusal.code, "before the job's times changed" in refusal.message) == (STALE, True)
    driver.accept(**{operation: make(at_ms, closed_until_unix_ms=job(driver).closed_until_ms)})


def test_a_record_of_what_was_closed_already_counts_after_another_pause() -> None:
    """Shows that records on their way are not lost to the next pause; a log without the field replays as ever."""
    driver = cluster()
    pause(driver)
    driver.time_ms = WallMs(driver.time_ms + 600_000)
    pause(driver, False)
    seen_ms = job(driver).closed_until_ms
    pause(driver)
    pause(driver, False)
    driver.accept(record_no_launch=skip(seen_ms - 60_000, closed_until_unix_ms=seen_ms))
    driver.accept(commit_launch=launch(driver.time_ms + 60_000))


def test_what_passed_is_in_the_snapshot() -> None:
    """Shows that the next leader finds it after a restart, and that a job of an older version has none."""
    driver = cluster()
    apply_job(driver, schedule=OTHER, time_zone="Europe/Berlin")
    pause(driver)
    pause(driver, False)
    assert decode_snapshot(encode_snapshot(driver.state)).jobs["j"] == job(driver)
    message = job_to_proto(job(driver))
    message.ClearField("passed")
    older = types_pb2.CronJob.FromString(message.SerializeToString())
    assert job_spec_from_proto(older.spec) == job(driver).spec
    assert not older.passed
