"""The leader's cron controller: when a job is due, what is decided, and on which worker it runs. A passive machine.

Invariant, kept by the state machine: the scheduled times of one job are decided in ascending order, each exactly once;
`decided_until` is the watermark. So whatever this controller proposes twice, late or after another leader did, is
refused; it only has to see to it that every time *is* decided, with a launch or with a record that says why not.

- At most one decision per job is on its way; different jobs do not wait for each other. What is decided for many jobs
  in one instant leaves as one log entry (server/leader.py).
- A time is *due* at the scheduled time and the job's jitter. The scheduled time stays the identity and the watermark.
- A time is on time while `wall - due <= start_deadline_s`: launched, though late. An every-second job loses no
  second to a change of leader. Older times belong to the catch-up policy (catch_up.py).
- What an earlier launch that has not ended means for a time that is due is overlap.py's.
- What workers report gathers for a moment (REPORT_GATHER_S), and any proposal takes along what has gathered.
- While no worker of the job serves, its due time waits for one until the deadline; then it is recorded as missed.
- A wall clock that steps back launches nothing twice: the watermark is ahead of it. One that steps forward makes old
  times, which the catch-up policy treats. The wall clock is read again every WALL_CHECK_S at the latest.
- A paused job (or all, by the settings) launches nothing. What passed until it goes on, or until another schedule took
  the place of the one before, is recorded as skipped first of all (passed.py), also while the job is paused (again).

What follows the commit (waits, orders, reports, stops, lost workers) is launches.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.api.v1 import command_pb2, types_pb2
from coordinator.config import CronSettings
from coordinator.control.catch_up import CatchUpPlan, Slots, make_plan
from coordinator.control.in_flight import InFlight
from coordinator.control.interface import (
    Action,
    Applied,
    Event,
    HeartbeatReceived,
    LaunchReported,
    ProposalEnded,
    Propose,
    SessionOpened,
    Step,
    Tokens,
)
from coordinator.control.job_workers import serving_workers, why_none_serves
from coordinator.control.launch_reports import Report
from coordinator.control.launches import RETRY_S, LaunchTracker
from coordinator.control.overlap import Verdict, judge
from coordinator.control.passed import TURN_S, PassedRecorder
from coordinator.control.schedule import Schedule, compile_schedule
from coordinator.control.timers import Gathered, Moment
from coordinator.machine.state import JobChanged, LaunchChanged, LaunchKey, NodeChanged, SettingsChanged, State
from coordinator.model import CronJob, CronJobSpec, LaunchState, Monotonic, WallMs
from coordinator.model.errors import InvalidRequest

REPORT_GATHER_S = 0.02
"""How long a worker's report waits for others, or for a decision, to share a log entry; a run that ends meanwhile needs
one command for both. The due time of a launch never waits."""
WALL_CHECK_S = 1.0
"""A step of the wall clock is noticed within this time."""
STEP_MS_MIN = 1_000
"""The wall clock counts as stepped when it gained so much on the monotonic clock between two looks."""


@dataclass(slots=True)
class JobWatch:
    """Soft state of one job."""

    spec: CronJobSpec
    schedule: Schedule | None
    """None for a schedule that cannot be read: checks before the proposal keep those out; it is never due."""
    jitter_ms: int
    wake_ms: WallMs | None = None
    """Wall time of the next look; the heap's entry that equals it is the valid one."""
    closed_ms: WallMs | None = None
    """The job's `closed_until_ms` for which `scheduled_ms` was computed."""
    scheduled_ms: WallMs | None = None
    """The next time to decide once all that passed is recorded; due `jitter_ms` later."""
    plan: CatchUpPlan | None = None
    starved_ms: WallMs | None = None
    """The first due time since when no worker of the job served."""
    backoff_until: Monotonic | None = None
    is_held_up: bool = False
    """True while a time is due, and a launch of the job is just beginning, or one in its way is just ending."""


class CronControl:
    """Implements `Controller`. `now` and `wall` of the constructor are the moment at which this master leads."""

    def __init__(self, state: State, settings: CronSettings, tokens: Tokens, now: Monotonic, wall: WallMs) -> None:
        self._state = state
        self._since_ms = wall
        self._last = Moment(now, wall)
        self._stepped: tuple[WallMs, WallMs] | None = None
        """From where to where the wall clock last stepped forward."""
        self._in_flight: InFlight[str] = InFlight(tokens)
        self._launches = LaunchTracker(
            state, settings.order_timeout_s, tokens, self._last, lambda job_id: job_id in self._in_flight
        )
        self._slots = Slots(state.launches.values(), settings.catch_up_per_s, now, wall)
        self._jobs: dict[str, JobWatch] = {}
        self._due: list[tuple[WallMs, str]] = []
        self._reported: Gathered[LaunchKey] = Gathered(REPORT_GATHER_S)
        self._backing_off: set[str] = set()
        self._passed = PassedRecorder()
        self._started = False

    @property
    def waits_for_workers(self) -> bool:
        """True while a launch waits for nothing but a worker that takes it."""
        return self._launches.is_starved

    def on_event(self, now: Monotonic, wall: WallMs, event: Event) -> Step:
        """Takes an event in."""
        actions: list[Action] = []
        at = self._look_at_clocks(now, wall)
        match event:
            case Applied():
                actions += self._on_applied(at, event)
            case SessionOpened(session, hello):
                actions += self._launches.on_session(at, session, hello)
            case HeartbeatReceived(session, node_id, heartbeat):
                actions += self._launches.on_heartbeat(at, session, node_id, heartbeat)
            case LaunchReported(session, node_id, message):
                report = Report(session, node_id, message)
                actions += self._launches.on_report(at, report)
                self._reported.add(at.now, report.key)
            case ProposalEnded():
                actions += self._on_proposal_ended(at, event)
            case _:
                pass  # Closed sessions and the like are the membership controller's.
        return self._step(at, actions)

    def on_advance(self, now: Monotonic, wall: WallMs) -> Step:
        """Takes the passing of time in."""
        return self._step(self._look_at_clocks(now, wall), [])

    def _step(self, at: Moment, actions: list[Action]) -> Step:
        """Does what is due, and says when to come again."""
        if not self._started:
            self._started = True
            actions += self._launches.review_all(at)
            for job_id in sorted(self._state.jobs):
                actions += self._review(at, job_id)
        due = (*self._reported.take_due(at.now), *self._launches.timers.take_due(at.now))
        actions += self._review_launches(at, due)
        while self._due and self._due[0][0] <= at.wall:
            wake_ms, job_id = heapq.heappop(self._due)
            watch = self._jobs.get(job_id)
            if watch is not None and watch.wake_ms == wake_ms:
                watch.wake_ms = None
                actions += self._review(at, job_id)
        for job_id in sorted(self._backing_off):
            actions += self._review(at, job_id)
        for job_id in self._passed.turns():
            actions += self._review(at, job_id)
        if any(isinstance(action, Propose) for action in actions):
            actions += self._review_launches(at, self._reported.take())
        return Step(tuple(actions), self._next_wake(at))

    def _review_launches(self, at: Moment, keys: Sequence[LaunchKey]) -> list[Action]:
        """Looks at launches for which it is time, then at jobs that wait for what becomes of those."""
        actions = self._launches.review(at, keys)
        for job_id in dict.fromkeys(key[0] for key in keys):
            watch = self._jobs.get(job_id)
            if watch is not None and watch.is_held_up:
                actions += self._review(at, job_id)
        return actions

    def _next_wake(self, at: Moment) -> Monotonic:
        times = [at.now + WALL_CHECK_S]
        if self._due:
            times.append(at.now + (self._due[0][0] - at.wall) / 1_000)
        launches_at = self._launches.timers.next_wake()
        times += [moment for moment in (launches_at, self._reported.due_at) if moment is not None]
        if self._passed.is_waiting:
            times.append(Monotonic(at.now + TURN_S))
        for job_id in self._backing_off:
            until = self._jobs[job_id].backoff_until
            times.append(at.now if until is None else until)
        return Monotonic(max(at.now, min(times)))

    def _on_applied(self, at: Moment, event: Applied) -> list[Action]:
        self._state = event.state
        touched: dict[str, None] = dict.fromkeys(self._in_flight.on_state(event.state.index))
        freed = list(touched)
        launch_changes: list[LaunchChanged] = []
        review_all = review_launches = False
        for change in event.changes:
            match change:
                case LaunchChanged():
                    launch_changes.append(change)
                    watch = self._jobs.get(change.after.job_id)
                    if watch is not None and watch.is_held_up:
                        touched[change.after.job_id] = None
                case JobChanged(before, after):
                    job = after or before
                    if job is not None:
                        touched[job.id] = None
                    if before is not None and after is None:
                        self._launches.forget_job(before.id)
                    elif before is not None and after is not None and _has_moved_on(before, after):
                        freed.append(after.id)
                case NodeChanged():
                    review_launches = True
                case SettingsChanged():
                    review_all = True
                case _:
                    pass  # Shards and moves.
        actions = self._launches.on_applied(at, event.state, launch_changes)
        if review_launches:
            actions += self._launches.review_all(at)
            touched.update(dict.fromkeys(id for id, watch in self._jobs.items() if watch.starved_ms is not None))
        else:
            for job_id in freed:
                actions += self._launches.review_job(at, job_id)
        for job_id in sorted(self._state.jobs) if review_all else touched:
            actions += self._review(at, job_id)
        return actions

    def _on_proposal_ended(self, at: Moment, event: ProposalEnded) -> list[Action]:
        ended = self._in_flight.on_ended(event, self._state.index)
        if ended is not None:
            watch = self._jobs.get(ended.subject)
            if watch is not None and not ended.applied:
                watch.backoff_until = Monotonic(at.now + RETRY_S)
            return [*self._launches.review_waiting(at, ended.subject), *self._review(at, ended.subject)]
        launch_ended = self._launches.in_flight.on_ended(event, self._state.index)
        if launch_ended is None:
            return []
        actions = self._launches.on_ended(at, launch_ended)
        watch = self._jobs.get(launch_ended.subject[0])
        if watch is not None and watch.is_held_up:
            actions += self._review(at, launch_ended.subject[0])
        return actions

    def _review(self, at: Moment, job_id: str) -> list[Action]:
        """Looks at one job: proposes the next decision, or notes when to look again."""
        job = self._state.jobs.get(job_id)
        if job is None:
            self._jobs.pop(job_id, None)
            self._backing_off.discard(job_id)
            self._passed.forget(job_id)
            return []
        watch = self._job_watch(job)
        if job_id in self._in_flight or self._is_backing_off(at.now, job_id, watch):
            return []
        if not self._passed.is_prepared(job):
            return []
        record = self._passed.next_of(job)
        if record is not None:
            command = _no_launch(job.id, record.scheduled_at_ms, LaunchState.SKIPPED, record.reason)
            command.record_no_launch.earlier_unix_ms.extend(record.earlier)
            return self._propose(job, command)
        if job.paused or self._state.settings.cron_paused or watch.schedule is None:
            watch.plan = watch.starved_ms = watch.wake_ms = None
            return []
        if watch.closed_ms != job.closed_until_ms:
            watch.closed_ms = job.closed_until_ms
            watch.scheduled_ms = watch.schedule.next_after(job.closed_until_ms)
            if job.passed:
                watch.plan = watch.starved_ms = None
        scheduled_ms = watch.scheduled_ms
        due_ms = None if scheduled_ms is None else WallMs(scheduled_ms + watch.jitter_ms)
        if scheduled_ms is None or due_ms is None or due_ms > at.wall:
            watch.plan = watch.starved_ms = None
            self._wake(job_id, watch, due_ms)
            return []
        watch.is_held_up = self._launches.is_beginning(job_id)
        if watch.is_held_up:
            return []
        decision = self._decide(at, job, watch, watch.schedule, scheduled_ms)
        return [] if decision is None else self._propose(job, decision)

    def _propose(self, job: CronJob, command: command_pb2.Command) -> list[Action]:
        """Proposes a decision, which holds as long as nothing else of the job is closed."""
        command.cause = f"cron/{job.id}/{self._state.index}"
        if command.HasField("commit_launch"):
            command.commit_launch.closed_until_unix_ms = job.closed_until_ms
        else:
            command.record_no_launch.closed_until_unix_ms = job.closed_until_ms
        return [self._in_flight.propose(job.id, command)]

    def _decide(
        self, at: Moment, job: CronJob, watch: JobWatch, schedule: Schedule, scheduled_ms: WallMs
    ) -> command_pb2.Command | None:
        """The command for a time that is due; None while it waits for a worker, or for a result to be committed."""
        wall, due_ms = at.wall, WallMs(scheduled_ms + watch.jitter_ms)
        deadline_ms = round(job.spec.start_deadline_s * 1_000)
        if watch.plan is not None and scheduled_ms > watch.plan.until_ms:
            watch.plan = None
        workers = serving_workers(self._state, job)
        if workers:
            watch.starved_ms = None
        is_starved = watch.starved_ms is not None and due_ms >= watch.starved_ms
        if watch.plan is None and wall - due_ms > deadline_ms and not is_starved:
            watch.plan = make_plan(schedule, job.spec, job.closed_until_ms, wall, self._absence(due_ms, deadline_ms))
        plan = watch.plan
        if plan is not None and scheduled_ms in plan.launch:
            slot_ms = self._slots.take(at.now, wall)
            return _commit_waiting(job, scheduled_ms, "waits for its turn after an outage", slot_ms)
        if plan is not None:
            if plan.shared_until_ms is not None and scheduled_ms <= plan.shared_until_ms:
                return _no_launch(job.id, plan.shared_until_ms, LaunchState.MISSED, plan.shared_reason)
            return _no_launch(job.id, scheduled_ms, LaunchState.MISSED, plan.reason)
        judgement = judge(job.spec, self._launches.open_launches(job.id))
        if judgement.verdict is not Verdict.LAUNCH and self._launches.is_ending(job.id):
            watch.is_held_up = True
            return None
        if judgement.verdict is Verdict.SKIP:
            return _no_launch(job.id, scheduled_ms, LaunchState.SKIPPED, judgement.reason)
        if judgement.verdict is Verdict.WAIT:
            return _commit_waiting(job, scheduled_ms, judgement.reason)
        if workers:
            return _commit(job, scheduled_ms, self._launches.choose_worker(workers))
        waits_until_ms = WallMs(due_ms + deadline_ms)
        if wall > waits_until_ms:
            reason = f"no worker can run it: {why_none_serves(self._state, job)}"
            return _no_launch(job.id, scheduled_ms, LaunchState.MISSED, reason)
        if watch.starved_ms is None:
            watch.starved_ms = due_ms
        self._wake(job.id, watch, WallMs(waits_until_ms + 1))
        return None

    def _absence(self, due_ms: WallMs, deadline_ms: int) -> str:
        """Why nobody launched at a time that is older than its deadline."""
        if due_ms + deadline_ms < self._since_ms:
            return "no leader"
        if self._stepped is not None and self._stepped[0] <= due_ms <= self._stepped[1]:
            return "the wall clock stepped forward over it"
        return "the leader did not come to it in time"

    def _job_watch(self, job: CronJob) -> JobWatch:
        """The job's soft state, made anew when its definition is another one."""
        before = self._jobs.get(job.id)
        if before is not None and (before.spec is job.spec or before.spec == job.spec):
            return before
        try:
            schedule = compile_schedule(job.spec.schedule, job.spec.time_zone)
        except InvalidRequest:
            schedule = None
        watch = self._jobs[job.id] = JobWatch(job.spec, schedule, job.spec.jitter_ms)
        if before is not None and before.schedule is schedule:
            watch.closed_ms, watch.scheduled_ms = before.closed_ms, before.scheduled_ms
        return watch

    def _is_backing_off(self, now: Monotonic, job_id: str, watch: JobWatch) -> bool:
        if watch.backoff_until is not None and now < watch.backoff_until:
            self._backing_off.add(job_id)
            return True
        watch.backoff_until = None
        self._backing_off.discard(job_id)
        return False

    def _wake(self, job_id: str, watch: JobWatch, wake_ms: WallMs | None) -> None:
        if watch.wake_ms == wake_ms:
            return
        watch.wake_ms = wake_ms
        if wake_ms is not None:
            heapq.heappush(self._due, (wake_ms, job_id))

    def _look_at_clocks(self, now: Monotonic, wall: WallMs) -> Moment:
        gained_ms = (wall - self._last.wall) - (now - self._last.now) * 1_000
        if gained_ms >= STEP_MS_MIN:
            self._stepped = (self._last.wall, wall)
        self._last = Moment(now, wall)
        return self._last


def _has_moved_on(before: CronJob, after: CronJob) -> bool:
    """True when something changed that launches on their way depend on: what the job is, and who runs it."""
    return (before.spec, before.owner, before.backups) != (after.spec, after.owner, after.backups)


def _commit(job: CronJob, scheduled_at_ms: WallMs, worker: str) -> command_pb2.Command:
    commit = command_pb2.CommitLaunch(
        job_id=job.id,
        scheduled_at_unix_ms=scheduled_at_ms,
        worker=worker,
        trigger=types_pb2.LAUNCH_TRIGGER_SCHEDULE,
        due_unix_ms=scheduled_at_ms + job.spec.jitter_ms,
    )
    return command_pb2.Command(commit_launch=commit)


def _commit_waiting(
    job: CronJob, scheduled_at_ms: WallMs, reason: str, not_before_ms: int = 0
) -> command_pb2.Command:
    command = _commit(job, scheduled_at_ms, "")
    command.commit_launch.reason = reason
    command.commit_launch.not_before_unix_ms = not_before_ms
    return command


def _no_launch(job_id: str, scheduled_at_ms: WallMs, state: LaunchState, reason: str) -> command_pb2.Command:
    record = command_pb2.RecordNoLaunch(job_id=job_id, scheduled_at_unix_ms=scheduled_at_ms, reason=reason)
    record.state = types_pb2.LAUNCH_STATE_MISSED if state is LaunchState.MISSED else types_pb2.LAUNCH_STATE_SKIPPED
    return command_pb2.Command(record_no_launch=record)
