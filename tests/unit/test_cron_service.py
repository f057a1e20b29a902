"""CronService over the real state machine; what lies between them in a daemon is Raft."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest

from coordinator.api.v1 import cluster_pb2, command_pb2, cron_pb2, types_pb2
from coordinator.config import ClusterConfig, CronSettings
from coordinator.machine.machine import apply
from coordinator.machine.state import State
from coordinator.model import CronJobSpec, ManualClock, WallMs
from coordinator.model.errors import InvalidRequest, OutcomeUnknown, RefusalReason, Refused
from coordinator.server.context import Call
from coordinator.server.cron import CronService
from tests.cron_harness import START_MS, CronHarness

CALL = cast(Call, None)
"""This servicer hands the call on to its master, which here has no deadline to read from it."""


class OneMaster:
    """A master whose log has one copy."""

    def __init__(self) -> None:
        harness = CronHarness()
        self.clock = ManualClock(wall_ms=START_MS)
        self.config = ClusterConfig()
        self.state: State = harness.state
        self.reads: list[int] = []
        self.commands: list[command_pb2.Command] = []
        self.fails_after: int | None = None
        """After so many commands of the next `submit_all` the leader is lost."""
        self.meanwhile: Callable[[], Awaitable[None]] | None = None
        """What the log gets just before the next `submit_all`."""

    async def read(self, consistency: cluster_pb2.Consistency.ValueType, call: Call) -> State:
        """The state; notes how fresh it had to be."""
        self.reads.append(consistency)
        return self.state

    async def submit(self, command: command_pb2.Command, request_id: str, call: Call) -> command_pb2.Applied:
        """Applies a command under its request id."""
        command.request_id = request_id
        self.commands.append(command)
        transition = apply(self.state, command, self.state.index + 1, self.clock.wall_ms())
        self.state = transition.state
        if transition.result.HasField("refusal"):
            raise Refused(RefusalReason(transition.result.refusal.code), transition.result.refusal.message)
        return transition.result.applied

    async def submit_all(
        self, requests: Sequence[tuple[command_pb2.Command, str]], call: Call
    ) -> list[command_pb2.Applied]:
        """Applies commands one after another, all of them whatever is refused."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            await meanwhile()
        fails_after, self.fails_after = self.fails_after, None
        results: list[command_pb2.Applied] = []
        refused: Refused | None = None
        for number, (command, request_id) in enumerate(requests):
            if number == fails_after:
                raise OutcomeUnknown("the leader changed")
            try:
                results.append(await self.submit(command, request_id, call))
            except Refused as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return results

    async def run(self, **operation: Any) -> None:
        """Applies somebody else's command."""
        await self.submit(command_pb2.Command(**operation), "", CALL)


@pytest.fixture
def master() -> OneMaster:
    """A cluster with three workers and no job."""
    return OneMaster()


@pytest.fixture
def service(master: OneMaster) -> CronService:
    """The servicer under test."""
    return CronService(master)


def spec(job_id: str = "tick", **fields: Any) -> types_pb2.CronJobSpec:
    """A sound definition."""
    return types_pb2.CronJobSpec(**{"id": job_id, "schedule": "* * * * *", "command": ["true"], **fields})


async def apply_jobs(service: CronService, *specs: types_pb2.CronJobSpec, **fields: Any) -> cron_pb2.ApplyJobsResponse:
    """Applies definitions."""
    return await service.ApplyJobs(cron_pb2.ApplyJobsRequest(jobs=specs, **fields), CALL)


async def assign(master: OneMaster, job_id: str, owner: str, *backups: str) -> None:
    """Gives a job its workers."""
    assignment = command_pb2.AssignJobs.Assignment(job_id=job_id, owner=owner, backups=backups)
    await master.run(assign_jobs=command_pb2.AssignJobs(assignments=[assignment]))


async def test_apply_says_what_changed_and_applies_it(service: CronService, master: OneMaster) -> None:
    """New, changed and unchanged jobs are told apart; each change is one command named after request and job."""
    first = await apply_jobs(service, spec("a"), spec("b"), request_id="r1")
    assert (list(first.created), list(first.changed), list(first.unchanged)) == (["a", "b"], [], [])
    second = await apply_jobs(service, spec("a"), spec("b", schedule="0 * * * *"), spec("c"), request_id="r2")
    assert (list(second.created), list(second.changed), list(second.unchanged)) == (["c"], ["b"], ["a"])
    assert [command.request_id for command in master.commands] == ["r1/a", "r1/b", "r2/b", "r2/c"]
    assert master.state.jobs["b"].spec.schedule == "0 * * * *"


async def test_apply_tells_each_field_that_changes(service: CronService) -> None:
    """Fields have their keys and values as in a file: of a new job what is no default, of a changed one both values."""

    async def told(*specs: types_pb2.CronJobSpec, **fields: Any) -> list[tuple[str, str, str, str]]:
        response = await apply_jobs(service, *specs, **fields)
        return [(change.job_id, change.field, change.before, change.after) for change in response.changes]

    first = spec("a", priority_class=5, environment={"KEPT": "1", "GONE": "2"})
    assert await told(first, dry_run=True) == [
        ("a", "schedule", "", '"* * * * *"'),
        ("a", "command", "", '["true"]'),
        ("a", "environment.GONE", "", '"2"'),
        ("a", "environment.KEPT", "", '"1"'),
    ]
    await apply_jobs(service, first)
    second = spec(
        "a", priority_class=3, command=[], python="m:f", environment={"KEPT": "1", "NEW": ""}, jitter_s=30, overlap=3
    )
    expected = [
        ("a", "priority", '"low"', '"high"'),
        ("a", "command", '["true"]', ""),
        ("a", "python", "", '"m:f"'),
        ("a", "environment.GONE", '"2"', ""),
        ("a", "environment.NEW", "", '""'),
        ("a", "jitter_s", "0.0", "30.0"),
        ("a", "overlap", '"skip"', '"queue"'),
    ]
    assert await told(second, dry_run=True) == expected
    assert await told(second) == expected
    assert await told(second) == []


async def test_prune_forgets_what_was_applied_before_and_nothing_else(
    service: CronService, master: OneMaster
) -> None:
    """With prune the API's jobs that are not named are told and deleted; those of the configuration stay."""
    in_file = CronJobSpec(id="edited", schedule="0 * * * *", command=("true",))
    master.config = ClusterConfig(cron=CronSettings(jobs=(in_file,)))
    await master.run(apply_job=command_pb2.ApplyJob(spec=spec("configured"), source="config"))
    await apply_jobs(service, spec("edited"), spec("kept"), spec("old"), spec("older"))
    dry = await apply_jobs(service, spec("kept"), spec("new"), prune=True, dry_run=True)
    assert (list(dry.created), list(dry.deleted), list(dry.unchanged)) == (["new"], ["old", "older"], ["kept"])
    assert sorted(master.state.jobs) == ["configured", "edited", "kept", "old", "older"]
    assert not (await apply_jobs(service, spec("kept"), spec("new"), dry_run=True)).deleted
    done = await apply_jobs(service, spec("kept"), spec("new"), prune=True, request_id="r")
    assert list(done.deleted) == ["old", "older"]
    assert [command.request_id for command in master.commands[-3:]] == ["r/new", "r/old", "r/older"]
    assert sorted(master.state.jobs) == ["configured", "edited", "kept", "new"]


async def test_lists_what_runs_and_waits(service: CronService, master: OneMaster) -> None:
    """A job's launches on a worker and those that wait are counted; a pause of all schedules is told."""
    await apply_jobs(service, spec())
    for minute, worker in ((1, "w1"), (2, "w2"), (3, ""), (4, "")):
        commit = command_pb2.CommitLaunch(
            job_id="tick",
            scheduled_at_unix_ms=START_MS + minute * 60_000,
            worker=worker,
            trigger=types_pb2.LAUNCH_TRIGGER_MANUAL,
        )
        await master.run(commit_launch=commit)
    answer = await service.ListJobs(cron_pb2.ListJobsRequest(), CALL)
    [view] = answer.jobs
    assert (view.running, view.waiting, answer.cron_paused) == (2, 2, False)
    assert not view.HasField("lateness_ms")
    start = command_pb2.StartLaunch(job_id="tick", attempt=1)
    start.scheduled_at_unix_ms = START_MS + 120_001
    start.started_unix_ms = START_MS + 17  # A launch by hand is due at once.
    await master.run(start_launch=start)
    answer = await service.ListJobs(cron_pb2.ListJobsRequest(), CALL)
    assert answer.jobs[0].lateness_ms == 17
    settings = types_pb2.Settings(replicas=2, cron_paused=True)
    await master.run(change_settings=command_pb2.ChangeSettings(settings=settings))
    answer = await service.ListJobs(cron_pb2.ListJobsRequest(), CALL)
    assert answer.cron_paused
    assert not answer.jobs[0].next_unix_ms


async def test_cancelled_before_the_first_attempt_did_not_run(service: CronService, master: OneMaster) -> None:
    """A launch that waited and was cancelled is among those that did not run; one that was told to stop is not."""
    await apply_jobs(service, spec())
    for minute, worker in ((1, "w1"), (2, "")):
        commit = command_pb2.CommitLaunch(
            job_id="tick",
            scheduled_at_unix_ms=START_MS + minute * 60_000,
            worker=worker,
            trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE,
        )
        await master.run(commit_launch=commit)
    cancelled = await service.CancelLaunches(cron_pb2.CancelLaunchesRequest(job_id="tick", reason="no need"), CALL)
    assert [(launch.state, launch.cancel_reason) for launch in cancelled.launches] == [
        (types_pb2.LAUNCH_STATE_COMMITTED, "no need"),
        (types_pb2.LAUNCH_STATE_CANCELLED, "no need"),
    ]
    missed = await service.ListLaunches(cron_pb2.ListLaunchesRequest(missed=True), CALL)
    assert [launch.scheduled_at_unix_ms for launch in missed.launches] == [START_MS + 120_000]


async def test_what_was_declined_and_never_started_did_not_run(service: CronService, master: OneMaster) -> None:
    """A launch that its worker declined and that was then missed or cancelled is among those that did not run."""
    await apply_jobs(service, spec())
    times = [START_MS + minute * 60_000 for minute in (1, 2, 3, 4)]
    for at in times:
        commit = command_pb2.CommitLaunch(
            job_id="tick", scheduled_at_unix_ms=at, worker="w1", trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE
        )
        await master.run(commit_launch=commit)
    fields: list[dict[str, Any]] = [
        {"job_id": "tick", "scheduled_at_unix_ms": at, "reason": "why"} for at in times
    ]
    await master.run(cancel_launch=command_pb2.CancelLaunch(**fields[2]))  # It is told to stop before it declines.
    for of_launch in fields[:3]:
        await master.run(decline_launch=command_pb2.DeclineLaunch(**of_launch, attempt=1))
    await master.run(lose_launch=command_pb2.LoseLaunch(**fields[0], attempt=1))
    await master.run(cancel_launch=command_pb2.CancelLaunch(**fields[1]))
    await master.run(lose_launch=command_pb2.LoseLaunch(**fields[3], attempt=1))  # It may have started.
    launches = [master.state.launches[("tick", WallMs(at))] for at in times]
    assert [(launch.state.name, launch.attempts_counted) for launch in launches] == [
        ("MISSED", 0),
        ("CANCELLED", 0),
        ("CANCELLED", 0),
        ("LOST", 1),
    ]
    missed = await service.ListLaunches(cron_pb2.ListLaunchesRequest(missed=True), CALL)
    assert [launch.scheduled_at_unix_ms for launch in missed.launches] == times[2::-1]


async def test_tells_what_waits_for_a_worker(service: CronService, master: OneMaster) -> None:
    """A job that is due while no worker serves says since when and why, until one does or it is paused."""
    await apply_jobs(service, spec(schedule="* * * * *"))

    async def view() -> cron_pb2.CronJobView:
        return (await service.ListJobs(cron_pb2.ListJobsRequest(), CALL)).jobs[0]

    assert not (await view()).HasField("starved_since_unix_ms")
    master.clock.advance(150)
    starved = await view()
    assert starved.starved_since_unix_ms == START_MS + 60_000
    assert starved.starved_reason == "it has no owner"
    await service.SetJobPaused(cron_pb2.SetJobPausedRequest(job_id="tick", paused=True), CALL)
    assert not (await view()).HasField("starved_since_unix_ms")
    await apply_jobs(service, spec("other", schedule="* * * * *"))
    await assign(master, "other", "w1")
    master.clock.advance(100)
    assert not (await view()).HasField("starved_since_unix_ms")


async def test_the_last_run_is_not_hidden_by_what_came_after_it(service: CronService, master: OneMaster) -> None:
    """Beside the latest launch stands the latest that ran and ended, whatever was missed, runs or waits since."""
    await apply_jobs(service, spec())
    for minute, state in ((1, types_pb2.LAUNCH_STATE_SUCCEEDED), (2, types_pb2.LAUNCH_STATE_FAILED)):
        at = START_MS + minute * 60_000
        commit = command_pb2.CommitLaunch(
            job_id="tick", scheduled_at_unix_ms=at, worker="w1", trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE
        )
        await master.run(commit_launch=commit)
        finish = command_pb2.FinishLaunch(job_id="tick", scheduled_at_unix_ms=at, attempt=1, state=state)
        await master.run(finish_launch=finish)
    record = command_pb2.RecordNoLaunch(job_id="tick", scheduled_at_unix_ms=START_MS + 180_000, reason="no leader")
    record.state = types_pb2.LAUNCH_STATE_MISSED
    await master.run(record_no_launch=record)
    [view] = (await service.ListJobs(cron_pb2.ListJobsRequest(), CALL)).jobs
    assert view.latest.state == types_pb2.LAUNCH_STATE_MISSED
    assert view.last_ended.state == types_pb2.LAUNCH_STATE_FAILED
    assert view.last_ended.scheduled_at_unix_ms == START_MS + 120_000


async def test_a_repeated_cancellation_goes_on_where_it_was_cut(service: CronService, master: OneMaster) -> None:
    """With the same request id the launches that the first try did not reach are told, and none counts for another."""
    await apply_jobs(service, spec())
    for minute, worker in ((1, ""), (2, "w1")):
        commit = command_pb2.CommitLaunch(
            job_id="tick",
            scheduled_at_unix_ms=START_MS + minute * 60_000,
            worker=worker,
            trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE,
        )
        await master.run(commit_launch=commit)
    request = cron_pb2.CancelLaunchesRequest(job_id="tick", request_id="again")
    master.fails_after = 1
    with pytest.raises(OutcomeUnknown):
        await service.CancelLaunches(request, CALL)
    assert [launch.cancel_reason for launch in master.state.launches.values()].count("cancelled by hand") == 1
    await service.CancelLaunches(request, CALL)
    assert {launch.cancel_reason for launch in master.state.launches.values()} == {"cancelled by hand"}


async def test_a_launch_that_ends_while_it_is_cancelled_is_no_error(service: CronService, master: OneMaster) -> None:
    """The answer says how it ended."""
    await apply_jobs(service, spec())
    key = ("tick", WallMs(START_MS + 60_000))
    await master.run(
        commit_launch=command_pb2.CommitLaunch(
            job_id="tick", scheduled_at_unix_ms=key[1], worker="w1", trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE
        )
    )

    async def finish() -> None:
        await master.run(
            finish_launch=command_pb2.FinishLaunch(
                job_id="tick", scheduled_at_unix_ms=key[1], attempt=1, state=types_pb2.LAUNCH_STATE_SUCCEEDED
            )
        )

    master.meanwhile = finish
    answer = await service.CancelLaunches(cron_pb2.CancelLaunchesRequest(job_id="tick"), CALL)
    assert [launch.state for launch in answer.launches] == [types_pb2.LAUNCH_STATE_SUCCEEDED]


async def test_a_dry_run_changes_nothing(service: CronService, master: OneMaster) -> None:
    """With dry_run the answer is the same and no command is proposed."""
    response = await apply_jobs(service, spec("a"), dry_run=True)
    assert list(response.created) == ["a"]
    assert master.commands == []


async def test_one_bad_job_stops_all_and_every_fault_is_named(service: CronService, master: OneMaster) -> None:
    """All definitions are checked before the first is applied, and the message names each job and field."""
    with pytest.raises(InvalidRequest) as refused:
        await apply_jobs(
            service,
            spec("good"),
            spec("bad", schedule="* * * *", time_zone="Mars/Olympus", timeout_s=-1),
            spec("worse", command=["true"], python="no target"),
            spec("good"),
        )
    text = str(refused.value)
    for words in (
        'job \'bad\': time_zone = "Mars/Olympus" is not an IANA time zone',
        "job 'bad': timeout_s = -1",
        'job \'worse\': the job "worse" has both command and python',
        'job \'bad\': schedule = "* * * *" is not a cron expression',
        "job 'good': it is defined twice",
    ):
        assert words in text
    assert "\n" not in text
    assert master.commands == []


async def test_lists_jobs_with_their_next_times_and_latest_launch(service: CronService, master: OneMaster) -> None:
    """Jobs come sorted, with as many next times as asked for; a paused one has none."""
    await apply_jobs(service, spec("b"), spec("a", schedule="0 3 * * *", time_zone="Europe/Berlin"))
    await assign(master, "b", "w1", "w2")
    await service.SetJobPaused(cron_pb2.SetJobPausedRequest(job_id="b", paused=True), CALL)
    triggered = await service.TriggerJob(cron_pb2.TriggerJobRequest(job_id="b"), CALL)
    master.reads.clear()
    response = await service.ListJobs(
        cron_pb2.ListJobsRequest(next=2, consistency=cluster_pb2.CONSISTENCY_STALE), CALL
    )
    assert master.reads == [cluster_pb2.CONSISTENCY_STALE]
    first, second = response.jobs
    assert [first.job.spec.id, second.job.spec.id] == ["a", "b"]
    assert list(first.next_unix_ms) == [START_MS + 14 * 3_600_000, START_MS + 38 * 3_600_000]
    assert not first.HasField("latest")
    assert list(second.next_unix_ms) == []
    assert second.latest.scheduled_at_unix_ms == triggered.scheduled_at_unix_ms


async def test_a_time_that_waits_for_its_jitter_is_the_next(service: CronService, master: OneMaster) -> None:
    """The next time is the first that is not decided, also when it has come and its start has not."""
    await apply_jobs(service, spec(jitter_s=50.0))
    jitter_ms = master.state.jobs["tick"].spec.jitter_ms
    assert jitter_ms > 1_000
    master.clock.advance(60 + jitter_ms / 1_000 - 0.5)
    response = await service.ListJobs(cron_pb2.ListJobsRequest(next=2), CALL)
    assert list(response.jobs[0].next_unix_ms) == [START_MS + 60_000, START_MS + 120_000]
    master.clock.advance(1.0)
    response = await service.ListJobs(cron_pb2.ListJobsRequest(next=1), CALL)
    assert list(response.jobs[0].next_unix_ms) == [START_MS + 120_000]


async def test_a_time_that_passed_in_a_pause_is_not_the_next(service: CronService, master: OneMaster) -> None:
    """After a resume the next time is one that will be launched, also while what passed is not recorded yet."""
    await apply_jobs(service, spec(jitter_s=50.0))
    await service.SetJobPaused(cron_pb2.SetJobPausedRequest(job_id="tick", paused=True), CALL)
    master.clock.advance(61)
    await service.SetJobPaused(cron_pb2.SetJobPausedRequest(job_id="tick", paused=False), CALL)
    assert master.state.jobs["tick"].spec.jitter_ms > 1_000
    response = await service.ListJobs(cron_pb2.ListJobsRequest(next=1), CALL)
    assert list(response.jobs[0].next_unix_ms) == [START_MS + 120_000]


async def test_a_trigger_goes_to_the_first_worker_that_serves(service: CronService, master: OneMaster) -> None:
    """A manual launch is committed for a backup when the owner is not heard, and once per request id."""
    await apply_jobs(service, spec())
    await assign(master, "tick", "w1", "w2")
    await master.run(suspect_node=command_pb2.SuspectNode(node_id="w1", incarnation="1"))
    request = cron_pb2.TriggerJobRequest(job_id="tick", request_id="once")
    first = await service.TriggerJob(request, CALL)
    second = await service.TriggerJob(request, CALL)
    assert first == second
    [launch] = master.state.launches.values()
    assert (launch.worker, launch.scheduled_at_ms) == ("w2", first.scheduled_at_unix_ms)


async def test_a_trigger_without_a_worker_is_refused(service: CronService) -> None:
    """Without a serving worker the refusal says whom it looked at."""
    await apply_jobs(service, spec())
    with pytest.raises(Refused, match="now: it has no owner") as refused:
        await service.TriggerJob(cron_pb2.TriggerJobRequest(job_id="tick"), CALL)
    assert refused.value.reason is RefusalReason.PRECONDITION


async def test_long_lists_leave_the_loop_its_turns(service: CronService, master: OneMaster) -> None:
    """A thousand jobs with their histories are looked through a few at a time: the leader's heartbeats go on."""
    await apply_jobs(service, *(spec(f"job_{number}") for number in range(100)))
    for number in range(100):
        for minute in range(1, 21):
            record = command_pb2.RecordNoLaunch(
                job_id=f"job_{number}",
                scheduled_at_unix_ms=START_MS + minute * 60_000,
                state=types_pb2.LAUNCH_STATE_SKIPPED,
                reason="previous still running",
            )
            await master.run(record_no_launch=record)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    jobs = await service.ListJobs(cron_pb2.ListJobsRequest(), CALL)
    assert (len(jobs.jobs), turns >= 10) == (100, True)
    turns = 0
    launches = await service.ListLaunches(cron_pb2.ListLaunchesRequest(latest=5_000, missed=True), CALL)
    assert (len(launches.launches), turns >= 10) == (2_000, True)
    counter.cancel()


async def test_unknown_jobs_are_not_found(service: CronService) -> None:
    """Every call that names a job refuses one that is not there; an empty name is an invalid request."""
    for call in (
        service.ListJobs(cron_pb2.ListJobsRequest(job_id="x"), CALL),
        service.DeleteJob(cron_pb2.DeleteJobRequest(job_id="x"), CALL),
        service.SetJobPaused(cron_pb2.SetJobPausedRequest(job_id="x"), CALL),
        service.TriggerJob(cron_pb2.TriggerJobRequest(job_id="x"), CALL),
        service.ListLaunches(cron_pb2.ListLaunchesRequest(job_id="x"), CALL),
    ):
        with pytest.raises(Refused) as refused:
            await call
        assert refused.value.reason is RefusalReason.NOT_FOUND
    with pytest.raises(InvalidRequest):
        await service.DeleteJob(cron_pb2.DeleteJobRequest(), CALL)


async def test_lists_launches_latest_first_across_jobs(service: CronService, master: OneMaster) -> None:
    """The history is merged over jobs, bounded, and can show only what did not run."""
    await apply_jobs(service, spec("a"), spec("b"))
    for minute, job_id in ((1, "a"), (1, "b"), (2, "a"), (3, "b")):
        at = START_MS + minute * 60_000
        if minute == 2:
            record = command_pb2.RecordNoLaunch(
                job_id=job_id, scheduled_at_unix_ms=at, state=types_pb2.LAUNCH_STATE_MISSED, reason="no leader"
            )
            await master.run(record_no_launch=record)
        else:
            commit = command_pb2.CommitLaunch(
                job_id=job_id, scheduled_at_unix_ms=at, worker="w1", trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE
            )
            await master.run(commit_launch=commit)

    async def listed(**fields: Any) -> list[tuple[str, int]]:
        response = await service.ListLaunches(cron_pb2.ListLaunchesRequest(**fields), CALL)
        return [(launch.job_id, (launch.scheduled_at_unix_ms - START_MS) // 60_000) for launch in response.launches]

    assert await listed() == [("b", 3), ("a", 2), ("a", 1), ("b", 1)]
    assert await listed(latest=2) == [("b", 3), ("a", 2)]
    assert await listed(job_id="a") == [("a", 2), ("a", 1)]
    assert await listed(missed=True) == [("a", 2)]
    assert await listed(since_unix_ms=START_MS + 120_000) == [("b", 3), ("a", 2)]
    assert await listed(since_unix_ms=START_MS + 120_001) == [("b", 3)]


async def test_a_deleted_job_is_gone_with_its_history(service: CronService, master: OneMaster) -> None:
    """After DeleteJob neither the job nor its launches are listed."""
    await apply_jobs(service, spec())
    await assign(master, "tick", "w1")
    await service.TriggerJob(cron_pb2.TriggerJobRequest(job_id="tick"), CALL)
    await service.DeleteJob(cron_pb2.DeleteJobRequest(job_id="tick"), CALL)
    assert (await service.ListJobs(cron_pb2.ListJobsRequest(), CALL)).jobs == []
    assert (await service.ListLaunches(cron_pb2.ListLaunchesRequest(), CALL)).launches == []
