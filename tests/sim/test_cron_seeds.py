"""A year of the fifteen loops, in slices of 43.8 hours, with a fault about every hour; each slice decided by one seed.

The world is cron_world.py's; what must hold is in cron_oracle.py; what goes wrong is in cron_faults.py. The 200 seeds
of the suite together play every hour of one year once, with the changes of clocks of three zones. One seed, with its
story when it fails: `SIM_SEED=4711 tools/test tests/sim/test_cron_seeds.py -k test_seed`. As many as said, from
SIM_FIRST on: `SIM_SEEDS=2000 tools/test -m campaign -k cron`.

`WITHOUT` shows that the oracle sees: without each of these protections some seed of a short list fails, in the way that
it is for, and with it the same seed passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest

from coordinator.control import interface, launches
from coordinator.machine import cron as machine_cron
from coordinator.machine import ranges
from coordinator.machine.draft import Draft
from coordinator.model import CatchUpPolicy, CronJob, CronJobSpec, Launch, LaunchState, OverlapPolicy, RetryPolicy
from tests.sim import cron_worker
from tests.sim.cron_faults import LEADER_MOMENTS, WORKER_MOMENTS, Plan, run_seed
from tests.sim.cron_leader import Leader
from tests.sim.cron_oracle import LATE_S_MAX
from tests.sim.cron_worker import Promises
from tests.sim.seeds import SeedFailed, assert_decides_everything, digest, of_the_suite, play_campaign


@pytest.mark.parametrize("seed", of_the_suite())
def test_seed(seed: int) -> None:
    """One 200th of a year: every scheduled time has one launch or one reason, every token one start."""
    run_seed(seed)


@pytest.mark.campaign
@pytest.mark.timeout(0)
def test_cron_campaign(capsys: pytest.CaptureFixture[str]) -> None:
    """As many seeds as SIM_SEEDS says, beyond those of the suite."""
    play_campaign(run_seed, 2_000, capsys)


def test_the_seeds_reach_what_they_are_for() -> None:
    """Among a few seeds are kills at every moment, every kind of fault, every way for a launch to end."""
    worlds = [run_seed(seed, Plan(seconds=6 * 3_600.0, fault_every_s=120.0)) for seed in range(20)]
    counts = sum((world.counts for world in worlds), Counter[str]())
    wanted = [f"leader killed at {moment}" for moment in LEADER_MOMENTS]
    wanted += [f"worker killed at {moment}" for moment in WORKER_MOMENTS]
    faults = ("partition", "leader_alone", "paused_worker", "clock", "masters_gone", "workers_gone", "lossy_log")
    wanted += [f"fault {name}" for name in faults]
    ends = ("SUCCEEDED", "FAILED", "TIMED_OUT", "LOST", "MISSED", "SKIPPED", "CANCELLED")
    wanted += [f"ended {state}" for state in ends]
    wanted += ["drain_node", "change_settings", "set_job_paused", "delete_job", "assign_launch", "cancel_launch"]
    wanted += [
        "stops",
        "declined",
        "starved",
        "refused commit_launch",
        "refused finish_launch",
        "caught up",
        "caught up with once a worker served",
        "late, in turn",
        "beside a run that counts no more",
        "recorded: the job was paused",
        "recorded: all jobs were paused",
    ]
    missing = [name for name in wanted if not counts[name]]
    assert not missing, (missing, counts)
    late_s = sorted(late_s for world in worlds for late_s in world.oracle.late_s)
    assert len(late_s) > 500
    assert late_s[-1] <= LATE_S_MAX


@pytest.mark.parametrize("seed", range(6))
def test_a_long_outage_of_a_frequent_job_is_accounted_for(seed: int) -> None:
    """While all masters are gone a job misses hundreds of times: records say of each of them why, one for many."""

    def every_five_seconds(spec: CronJobSpec) -> CronJobSpec | None:
        catch_up = tuple(CatchUpPolicy)[seed % 3]
        often = replace(spec, schedule="*/5 * * * * *", overlap=OverlapPolicy.QUEUE, catch_up=catch_up, timeout_s=4.0)
        return replace(often, start_deadline_s=10.0) if spec.id == "loop_01" else None

    kinds = ("masters_gone", "clock")
    plan = Plan(seconds=5 * 3_600.0, fault_every_s=600.0, quiet_s=600.0, kinds=kinds, jobs=every_five_seconds)
    assert run_seed(seed, plan).counts["shared records"]


def test_long_pauses_of_frequent_jobs_are_accounted_for() -> None:
    """Jobs that are due hundreds of times in a pause, edited and deleted beside it, have few records that say all."""

    def every_five_seconds(spec: CronJobSpec) -> CronJobSpec | None:
        often = replace(spec, schedule="*/5 * * * * *", overlap=OverlapPolicy.QUEUE, timeout_s=4.0)
        return often if spec.id in ("loop_01", "loop_02") else None

    kinds = ("operator", "leader", "leader_moment", "clock", "lossy_log")
    plan = Plan(seconds=5 * 3_600.0, fault_every_s=120.0, quiet_s=600.0, kinds=kinds, jobs=every_five_seconds)
    counts = sum((run_seed(seed, plan).counts for seed in range(4)), Counter[str]())
    for wanted in ("the job was paused", "all jobs were paused", "the schedule was changed"):
        assert counts[f"recorded: {wanted}"], counts
    assert counts["shared records"] > 4, counts


def fingerprint(seed: int) -> str:
    """Everything that a run did, in one line."""
    world = run_seed(seed, Plan(seconds=8 * 3_600.0, fault_every_s=600.0))
    runs = [str((run.token, run.worker, run.started_at, run.ended_at)) for run in world.oracle.runs.values()]
    log = [str(launch) for _, launch in sorted(world.oracle.launches.items())]
    story = [*world.trace, *runs, *log, str(sorted(world.counts.items()))]
    return digest(story)


def test_a_seed_decides_everything() -> None:
    """Two processes with other hash seeds, so with other orders of every set, play the same seed to the last event."""
    assert_decides_everything(5, fingerprint)


def _every_minute(spec: CronJobSpec) -> CronJobSpec:
    """Often enough for a few hours to show something."""
    often = replace(spec, schedule="* * * * *", overlap=OverlapPolicy.SKIP, jitter_s=0.0, timeout_s=300.0)
    return replace(often, retry=RetryPolicy.ON_LOST, attempts_max=3, catch_up=CatchUpPolicy.LATEST)


def _never(spec: CronJobSpec) -> CronJobSpec:
    return replace(_every_minute(spec), retry=RetryPolicy.NEVER)


@dataclass(frozen=True, slots=True)
class Row:
    """A protection less, the faults that this does not stand, and how many seeds it may stand them."""

    findings: tuple[str, ...]
    """What a failure says, one of them."""
    kinds: tuple[str, ...]
    jobs: Callable[[CronJobSpec], CronJobSpec | None] = _every_minute
    promises: Promises = Promises()  # noqa: RUF009 - frozen
    switch_off: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    """For what is not the worker's."""
    change: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    """What is so with the protection and without it."""
    seeds: int = 12

    @property
    def plan(self) -> Plan:
        """An hour and a half with a fault every two minutes."""
        return Plan(seconds=5_400.0, fault_every_s=120.0, quiet_s=600.0, kinds=self.kinds, jobs=self.jobs)


def _order_before_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader orders what it proposes, before any majority has it."""
    real = Leader._propose

    def propose(self: Leader, action: interface.Propose) -> None:
        commit = action.command.commit_launch
        if action.command.HasField("commit_launch") and commit.worker:
            spec = self.world.state.jobs[commit.job_id].spec
            launch = Launch(commit.job_id, commit.scheduled_at_unix_ms)  # type: ignore[arg-type]
            self._act(interface.SendLaunch(commit.worker, launch, spec))
        real(self, action)

    monkeypatch.setattr(Leader, "_propose", propose)


def _retry_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lost attempt is followed by another one, whatever the policy says."""
    monkeypatch.setattr(launches, "may_follow_loss", lambda spec, launch: launch.attempt < spec.attempts_max)


def _decide_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decisions do not move the watermark in the state."""
    real = Draft.put_job

    def put_job(self: Draft, job: object) -> None:
        known = self.jobs.get(job.id)  # type: ignore[attr-defined]
        if known is not None and replace(job, decided_until_ms=known.decided_until_ms) == known:  # type: ignore[type-var]
            return
        real(self, job)  # type: ignore[arg-type]

    monkeypatch.setattr(Draft, "put_job", put_job)


def _lose_by_suspicion(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is not heard for a moment has lost its runs, whether its lease has ended or not."""
    real = launches.LaunchTracker._lost_reason

    def lost_reason(self, now, launch, watch, job):  # type: ignore[no-untyped-def]
        node = self._state.nodes.get(launch.worker)
        return "it is suspect" if node is not None and node.is_suspect else real(self, now, launch, watch, job)

    monkeypatch.setattr(launches.LaunchTracker, "_lost_reason", lost_reason)


def _begin_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever waits begins, beside what runs."""

    def may_begin(spec: CronJobSpec, open_launches: Sequence[Launch]) -> list[Launch]:
        return [launch for launch in open_launches if launch.state is LaunchState.WAITING]

    monkeypatch.setattr(launches, "may_begin", may_begin)


def _leave_pauses_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume and an edit close nothing: what passed looks as if nobody had come to it in time."""
    for module in (machine_cron, ranges):
        monkeypatch.setattr(module, "pass_over", lambda draft, job, reason: job)


def _forget_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume and an edit count all as decided, and nobody says why it was not launched."""

    def pass_over(draft: Draft, job: CronJob, reason: str) -> CronJob:
        return replace(job, decided_until_ms=max(job.decided_until_ms, draft.time_ms))

    for module in (machine_cron, ranges):
        monkeypatch.setattr(module, "pass_over", pass_over)


def _ignore_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader does not look at the launches that heartbeats name."""
    monkeypatch.setattr(launches.LaunchTracker, "on_heartbeat", lambda *arguments: [])


def _feed_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader does not look who waits when a slot is free again."""
    monkeypatch.setattr(launches.LaunchTracker, "_feed", lambda *arguments: [])


def _one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every seed has workers that decline."""
    monkeypatch.setattr(cron_worker, "LAUNCHES_MAX", cron_worker.LAUNCHES_FEW)


WITHOUT = {
    "watermark": Row(
        findings=("is decided, due next is",),
        kinds=("leader_moment", "lossy_log"),
        switch_off=_decide_twice,
    ),
    "token_in_the_journal_first": Row(
        findings=("starts twice", "starts with policy never"),
        kinds=("worker_moment",),
        promises=Promises(journals_before_start=False),
    ),
    "stop_at_the_end_of_the_lease": Row(
        findings=("is a success after its lease",),
        kinds=("partition", "paused_worker"),
        promises=Promises(stops_without_lease=False),
    ),
    "never_means_never": Row(
        findings=("starts with policy never", "attempt 2 of 1"),
        kinds=("worker", "partition"),
        jobs=_never,
        switch_off=_retry_never,
    ),
    "intent_before_order": Row(
        findings=("was never committed",),
        kinds=("leader_moment", "lossy_log"),
        switch_off=_order_before_commit,
    ),
    "kill_of_what_outlived_its_agent": Row(
        findings=("still runs when",),
        kinds=("worker", "worker_moment"),
        promises=Promises(kills_what_outlived=False),
    ),
    "queue_one_at_a_time": Row(
        findings=("still runs when",),
        kinds=("worker",),
        jobs=lambda spec: replace(_every_minute(spec), overlap=OverlapPolicy.QUEUE),
        switch_off=_begin_all,
    ),
    "pauses_that_close": Row(
        findings=("is launched, and", "is no mishap", "recorded is"),
        kinds=("operator",),
        switch_off=_leave_pauses_open,
    ),
    "pauses_that_are_recorded": Row(
        findings=("is decided, due next is",),
        kinds=("operator",),
        switch_off=_forget_pauses,
    ),
    "free_slots_are_given_to_who_waits": Row(
        findings=("had a free slot for",),
        kinds=("worker",),
        change=_one_slot,
        switch_off=_feed_nobody,
    ),
    "heartbeats_that_name_launches": Row(
        findings=("is RUNNING for good",),
        kinds=("partition", "paused_worker"),
        switch_off=_ignore_heartbeats,
    ),
    "lost_only_without_lease": Row(
        findings=("still runs when",),
        kinds=("partition", "paused_worker"),
        switch_off=_lose_by_suspicion,
    ),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_without_it_a_seed_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each protection is needed: one of a few seeds fails without it, in the way that it is for, and passes with it."""
    row = WITHOUT[name]
    row.change(monkeypatch)
    for seed in range(row.seeds):
        with monkeypatch.context() as switched:
            row.switch_off(switched)
            try:
                run_seed(seed, row.plan, row.promises)
                continue
            except SeedFailed as failure:
                first = str(failure).partition("\n")[0]
        if any(finding in first for finding in row.findings):
            run_seed(seed, row.plan)
            return
    raise AssertionError(f"{row.seeds} seeds do without {name}")
