"""The leader's cron controller: when a job is due, what is decided, and on which worker it runs. A passive machine.

Invariant, kept by the state machine: the scheduled times of one job are decided in ascending order, each exactly once;
`decided_until` is the watermark. So whatever this controller proposes twice, late or after another leader did, is
refused; it only has to see to it that every time *is* decided, with a launch or with a record that says why not.

- At most one decision per job is on its way; different jobs do not wait for each other. What is decided for many jobs
  in one instant leaves as one log entry (server/leader.py).
- A time is *due* at the scheduled time and the job's jitter. The scheduled time stays the identity and the watermark.
- A time is on time while `wall - due <= start_deadline_s`: launched, though late. An every-second job loses no
  second to a change of leader. Older times belong to the catch-up policy (catch_up.py). Those, and what is late by more
  than a failover takes, take turns (slots.py). Of what is due in one instant the most urgent class is decided first.
- What an earlier launch that has not ended means for a time that is due is overlap.py's.
- What workers report gathers for a moment (REPORT_GATHER_S), and any proposal takes along what has gathered.
- While no worker of the job serves, its due time waits for one. Beyond the deadline it is recorded as missed if the
  catch-up policy is `none`; else it stays undecided for as long as none serves, and is caught up with then.
- A wall clock that steps back launches nothing twice: the watermark is ahead of it. One that steps forward makes old
  times, which the catch-up policy treats. The wall clock is read again every WALL_CHECK_S at the latest.
- A paused job (or all, by the settings) launches nothing. What passed until it goes on, or until another schedule took
  the place of the one before, is recorded as skipped first of all (passed.py), also while the job is paused (again).

What follows the commit (waits, orders, reports, stops, lost workers) is launches.py.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from coordinator.api.v1 import command_pb2
from coordinator.config import CronSettings
from coordinator.control import cron_commands
from coordinator.control.catch_up import CatchUpPlan
from coordinator.control.catch_up_plans import CatchUpPlanner
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
from coordinator.control.job_watch import JobWatch
from coordinator.control.job_workers import serving_workers, waits_without_deadline, why_none_serves
from coordinator.control.launch_reports import Report
from coordinator.control.launches import RETRY_S, LaunchTracker
from coordinator.control.overlap import Verdict, judge
from coordinator.control.passed import TURN_S, PassedRecorder
from coordinator.control.schedule import Schedule, compile_schedule
from coordinator.control.slots import ON_TIME_MS, Slots, split_late
from coordinator.control.timers import Gathered, Moment
from coordinator.machine.state import JobChanged, LaunchChanged, LaunchKey, NodeChanged, SettingsChanged, State
from coordinator.model import CronJob, LaunchState, Monotonic, WallMs
from coordinator.model.errors import InvalidRequest

REPORT_GATHER_S = 0.02
"""How long a worker's report waits for others, or for a decision, to share a log entry; a run that ends meanwhile needs
one command for both. The due time of a launch never waits."""
WALL_CHECK_S = 1.0
"""A step of the wall clock is noticed within this time."""
STEP_MS_MIN = 1_000
"""The wall clock counts as stepped when it gained so much on the monotonic clock between two looks."""


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
        late, old = split_late(state)
        self._catch_up_slots = Slots(old, settings.catch_up_per_s, now, wall)
        self._late_slots = Slots(late, settings.catch_up_per_s, now, wall)
        self._jobs: dict[str, JobWatch] = {}
        self._due: list[tuple[WallMs, str]] = []
        self._reported: Gathered[LaunchKey] = Gathered(REPORT_GATHER_S)
        self._backing_off: set[str] = set()
        self._passed = PassedRecorder()
        self._planner = CatchUpPlanner()
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
            actions += self._review_jobs(at, self._state.jobs)
        due = (*self._reported.take_due(at.now), *self._launches.timers.take_due(at.now))
        actions += self._review_launches(at, due)
        actions += self._review_jobs(at, [*self._take_due(at.wall), *self._backing_off])
        for job_id in self._passed.turns():
            actions += self._review(at, job_id)
        for job_id in self._planner.turns(at.now):
            actions += self._review(at, job_id)
        if any(isinstance(action, Propose) for action in actions):
            actions += self._review_launches(at, self._reported.take())
        return Step(tuple(actions), self._next_wake(at))

    def _take_due(self, wall: WallMs) -> list[str]:
        """The jobs at which it is time to look."""
        due: list[str] = []
        while self._due and self._due[0][0] <= wall:
            wake_ms, job_id = heapq.heappop(self._due)
            watch = self._jobs.get(job_id)
            if watch is not None and watch.wake_ms == wake_ms:
                watch.wake_ms = None
                due.append(job_id)
        return due

    def _review_jobs(self, at: Moment, job_ids: Iterable[str]) -> list[Action]:
        """Looks at jobs, the most urgent class first: it gets the free slots of the workers."""

        def urgency(job_id: str) -> tuple[int, str]:
            job = self._state.jobs.get(job_id)
            return (job.spec.priority_class if job is not None else 0, job_id)

        actions: list[Action] = []
        for job_id in sorted(set(job_ids), key=urgency):
            actions += self._review(at, job_id)
        return actions

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
        moments = (launches_at, self._reported.due_at, self._planner.next_turn)
        times += [moment for moment in moments if moment is not None]
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
        return actions + self._review_jobs(at, self._state.jobs if review_all else touched)

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
            skipped = LaunchState.SKIPPED
            at_ms, reason = record.scheduled_at_ms, record.reason
            return self._propose(job, cron_commands.no_launch(job, at_ms, skipped, reason, record.earlier))
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
        """The command for a time that is due; None while it waits for a worker, a plan, or a result to be committed."""
        due_ms = WallMs(scheduled_ms + watch.jitter_ms)
        deadline_ms = WallMs(due_ms + round(job.spec.start_deadline_s * 1_000))
        if watch.plan is not None and scheduled_ms > watch.plan.until_ms:
            watch.plan = None
        workers = serving_workers(self._state, job)
        if at.wall > deadline_ms or watch.plan is not None:
            if waits_without_deadline(self._state, job):
                watch.plan = None
                self._starve(job, watch, due_ms)
                return None
            is_starved = watch.starved_ms is not None and due_ms >= watch.starved_ms
            if watch.plan is None and (workers or not is_starved):
                reason = watch.starved_reason if is_starved else self._absence(due_ms, deadline_ms)
                watch.plan = self._planner.plan(at, job, schedule, reason)
                if watch.plan is None:
                    return None
        if workers:
            watch.starved_ms = None
        if watch.plan is not None:
            return self._by_plan(at, job, watch.plan, scheduled_ms)
        judgement = judge(job.spec, self._launches.open_launches(job.id))
        if judgement.verdict is not Verdict.LAUNCH and self._launches.is_ending(job.id):
            watch.is_held_up = True
            return None
        if judgement.verdict is Verdict.SKIP:
            return cron_commands.no_launch(job, scheduled_ms, LaunchState.SKIPPED, judgement.reason)
        if judgement.verdict is Verdict.WAIT:
            return cron_commands.commit_waiting(job, scheduled_ms, judgement.reason)
        if workers:
            return self._launch(at, job, scheduled_ms, due_ms, deadline_ms, workers)
        if at.wall > deadline_ms:
            reason = f"no worker can run it: {why_none_serves(self._state, job)}"
            return cron_commands.no_launch(job, scheduled_ms, LaunchState.MISSED, reason)
        self._wake(job.id, watch, WallMs(deadline_ms + 1))
        self._starve(job, watch, due_ms)
        return None

    def _by_plan(self, at: Moment, job: CronJob, plan: CatchUpPlan, scheduled_ms: WallMs) -> command_pb2.Command:
        """What the catch-up plan says of a time."""
        if scheduled_ms in plan.launch:
            slot_ms = self._catch_up_slots.take(at.now, at.wall)
            why = f"waits for its turn after an outage: {plan.cause}"
            return cron_commands.commit_waiting(job, scheduled_ms, why, slot_ms)
        if plan.shared_until_ms is not None and scheduled_ms <= plan.shared_until_ms:
            return cron_commands.no_launch(job, plan.shared_until_ms, LaunchState.MISSED, plan.shared_reason)
        return cron_commands.no_launch(job, scheduled_ms, LaunchState.MISSED, plan.reason)

    def _launch(
        self, at: Moment, job: CronJob, scheduled_ms: WallMs, due_ms: WallMs, deadline_ms: WallMs, workers: list[str]
    ) -> command_pb2.Command:
        """On a worker now, or in its turn when it is late."""
        if at.wall - due_ms > ON_TIME_MS:
            slot_ms = self._late_slots.take_before(at.now, at.wall, deadline_ms)
            if slot_ms > at.wall:
                return cron_commands.commit_waiting(job, scheduled_ms, "is late and waits for its turn", slot_ms)
        return cron_commands.commit(job, scheduled_ms, self._launches.choose_worker(workers))

    def _starve(self, job: CronJob, watch: JobWatch, due_ms: WallMs) -> None:
        """Leaves a time undecided while no worker serves; whatever may change that has the job looked at again."""
        if watch.starved_ms is None:
            watch.starved_ms = due_ms
            watch.starved_reason = f"no worker could run it: {why_none_serves(self._state, job)}"

    def _absence(self, due_ms: WallMs, deadline_ms: WallMs) -> str:
        """Why nobody launched at a time that is older than its deadline."""
        if deadline_ms < self._since_ms:
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
