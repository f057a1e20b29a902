"""Cron launches under random faults of leaders, workers, proposals and clocks."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.v1 import command_pb2
from coordinator.machine.codec import job_spec_to_proto, settings_to_proto
from coordinator.machine.state import Change, LaunchChanged
from coordinator.model import CatchUpPolicy, CronJobSpec, Launch, LaunchState, OverlapPolicy, RetryPolicy, WallMs
from tests.cron_harness import START_MS, CronHarness, every_second, report_of

SCHEDULES = ("* * * * * *", "*/1 * * * * *", "0-59 * * * * *", "@every 1s")
"""All with the same times."""
STANDS_FOR = re.compile(r"this record stands for (\d+) times")
ENDS = (LaunchState.SUCCEEDED, LaunchState.SUCCEEDED, LaunchState.FAILED, LaunchState.TIMED_OUT)


def _leader_gap(harness: CronHarness, rng: random.Random, longest_s: float) -> None:
    """The leader dies: what it had proposed is applied or lost; another one leads after a while."""
    for propose in list(harness.held):
        if rng.random() < 0.5:
            harness.control = None
            harness.apply(propose.command)
    harness.control = None
    harness.clock.advance(rng.uniform(0, longest_s))
    harness.lead()


def _worker_fault(harness: CronHarness, rng: random.Random, incarnations: dict[str, int]) -> None:
    """A worker is not heard, expires, or is back as another process."""
    worker = rng.choice(("w1", "w2", "w3"))
    incarnation = str(incarnations[worker])
    node = harness.state.nodes[worker]
    if node.is_serving:
        harness.suspect(worker, incarnation)
    elif node.is_suspect and rng.random() < 0.5:
        harness.expire(worker, incarnation)
    else:
        incarnations[worker] += 1
        harness.open_session(worker)
        harness.add_worker(worker, incarnation=str(incarnations[worker]))


def _work(harness: CronHarness, rng: random.Random) -> None:
    """Workers start and end some of what was ordered, at times twice, late or badly; they stop what they shall stop."""
    for order in harness.orders[-20:]:
        if rng.random() < 0.5:
            harness.report(order.node_id, report_of(order.launch, LaunchState.RUNNING))
        if rng.random() < 0.3:
            harness.report(order.node_id, report_of(order.launch, rng.choice(ENDS)))
    for stop in harness.stops[-5:]:
        launch = harness.state.launches.get((stop.job_id, stop.scheduled_at_ms))
        if launch is not None and rng.random() < 0.4:
            told = report_of(replace(launch, attempt=stop.attempt), LaunchState.CANCELLED)
            harness.report(stop.node_id, told)
    for worker in ("w1", "w2", "w3"):
        if harness.state.nodes[worker].is_serving and rng.random() < 0.5:
            mine = [launch for launch in _open(harness) if launch.worker == worker]
            harness.heartbeat(worker, *(launch for launch in mine if rng.random() < 0.95))


def _open(harness: CronHarness) -> list[Launch]:
    return [launch for launch in harness.history() if not launch.state.has_ended]


def _check_overlap(harness: CronHarness, spec: CronJobSpec) -> None:
    """So many launches have begun and not ended as the policy allows, and so many wait in the queue."""
    launches = _open(harness)
    begun = [launch for launch in launches if launch.attempt > 0]
    queued = [launch for launch in launches if launch.attempt == 0 and not launch.not_before_ms]
    limit = spec.overlap_limit if spec.overlap is OverlapPolicy.ALLOW else 1
    assert len(begun) <= limit, begun
    if spec.overlap in (OverlapPolicy.ALLOW, OverlapPolicy.SKIP):
        assert queued == []
    elif spec.overlap is OverlapPolicy.QUEUE:
        assert len(queued) <= spec.overlap_limit


def _bring_back(harness: CronHarness, incarnations: dict[str, int]) -> None:
    """All workers start anew."""
    for worker in ("w1", "w2", "w3"):
        incarnations[worker] += 1
        harness.open_session(worker)
        harness.add_worker(worker, incarnation=str(incarnations[worker]))


def _end_everything(harness: CronHarness, incarnations: dict[str, int]) -> None:
    """Once all workers are there and end what they are given, every launch but the latest comes to its end."""
    harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=True))
    _bring_back(harness, incarnations)
    for _ in range(40):
        for launch in _open(harness):
            if launch.worker:
                harness.report(launch.worker, report_of(launch, LaunchState.SUCCEEDED))
        harness.advance(1)
    assert _open(harness) == []


def _operate(harness: CronHarness, spec: CronJobSpec, rng: random.Random) -> CronJobSpec:
    """Somebody pauses or resumes the job or all jobs, changes a note, or the schedule to one with the same times."""
    job, settings = harness.state.jobs["tick"], harness.state.settings
    change = rng.choice(("job", "job", "all", "all", "schedule", "note"))
    if change == "job":
        harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=not job.paused))
    elif change == "all":
        changed = settings_to_proto(replace(settings, cron_paused=not settings.cron_paused))
        harness.accept(change_settings=command_pb2.ChangeSettings(settings=changed))
    else:
        schedule = rng.choice(SCHEDULES) if change == "schedule" else spec.schedule
        spec = replace(spec, description=f"edited {rng.random()}", schedule=schedule)
        harness.accept(apply_job=command_pb2.ApplyJob(spec=job_spec_to_proto(spec)))
    return spec


def _resume(harness: CronHarness) -> None:
    harness.accept(set_job_paused=command_pb2.SetJobPaused(job_id="tick", paused=False))
    settings = settings_to_proto(replace(harness.state.settings, cron_paused=False))
    harness.accept(change_settings=command_pb2.ChangeSettings(settings=settings))


def _times_of(record: Launch) -> list[WallMs]:
    """The scheduled seconds that a new launch or record stands for."""
    shared = STANDS_FOR.search(record.reason)
    count = int(shared[1]) if shared else 1
    return [WallMs(record.scheduled_at_ms - 1_000 * back) for back in reversed(range(count))]


def _settle(harness: CronHarness) -> None:
    harness.hold = False
    while harness.held:
        harness.release()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    overlap=st.sampled_from(OverlapPolicy),
    catch_up=st.sampled_from(CatchUpPolicy),
    retry=st.sampled_from(RetryPolicy),
    gap_s=st.sampled_from((2.0, 40.0)),
    start_deadline_s=st.sampled_from((5.0, 60.0)),
    overlap_limit=st.sampled_from((1, 3)),
    jitter_s=st.sampled_from((0.0, 0.9, 4.0)),
)
def test_every_second_has_exactly_one_record(
    seed: int,
    overlap: OverlapPolicy,
    catch_up: CatchUpPolicy,
    retry: RetryPolicy,
    gap_s: float,
    start_deadline_s: float,
    overlap_limit: int,
    jitter_s: float,
) -> None:
    """Whatever dies, is paused or edited, each scheduled second is decided once and in order, begins as the overlap
    policy allows, and ends; with `never` it is started at most once."""
    rng = random.Random(seed)
    spec = every_second(
        overlap=overlap,
        overlap_limit=overlap_limit,
        catch_up=catch_up,
        retry=retry,
        start_deadline_s=start_deadline_s,
        jitter_s=jitter_s,
    )
    harness = CronHarness(spec)
    incarnations = {"w1": 1, "w2": 1, "w3": 1}
    decided: list[WallMs] = []

    def on_changes(changes: tuple[Change, ...]) -> None:
        made = [change for change in changes if isinstance(change, LaunchChanged) and change.before is None]
        for change in made:
            decided.extend(_times_of(change.after))
            is_skipped = change.after.state is LaunchState.SKIPPED
            held = harness.state.jobs["tick"].paused or harness.state.settings.cron_paused
            assert is_skipped or not held or change.after.state is LaunchState.MISSED, change.after
        _check_overlap(harness, spec)

    harness.on_changes = on_changes
    harness.lead()
    for _ in range(60):
        harness.hold = rng.random() < 0.3
        harness.advance(rng.uniform(0, 1.5))
        fault = rng.random()
        if fault < 0.08:
            _leader_gap(harness, rng, gap_s)
        elif fault < 0.2:
            _worker_fault(harness, rng, incarnations)
        elif fault < 0.25:
            harness.clock.step_wall(rng.uniform(-3, 3))
        elif fault < 0.3 and (launches := _open(harness)):
            at_ms = rng.choice(launches).scheduled_at_ms
            harness.accept(cancel_launch=command_pb2.CancelLaunch(job_id="tick", scheduled_at_unix_ms=at_ms))
        elif fault < 0.44:
            spec = _operate(harness, spec, rng)
        if harness.held and rng.random() < 0.1:
            harness.release(lose=True)
        _settle(harness)
        _work(harness, rng)
    _resume(harness)
    # Without any worker what is due may stay undecided, where it is made up for.
    _bring_back(harness, incarnations)
    harness.advance(start_deadline_s + 2)
    _settle(harness)

    assert decided == [START_MS + 1_000 * second for second in range(1, len(decided) + 1)]
    assert harness.clock.wall_ms() - decided[-1] <= 5_000 + (start_deadline_s + jitter_s) * 1_000
    tokens = {(order.launch.key, order.launch.attempt): order.node_id for order in harness.orders}
    assert all(tokens[(order.launch.key, order.launch.attempt)] == order.node_id for order in harness.orders)
    _end_everything(harness, incarnations)
    if retry is RetryPolicy.NEVER:
        assert all(order.launch.attempt == 1 for order in harness.orders)
