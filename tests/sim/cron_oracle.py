"""What must hold in the cron world, judged from the log's entries and from what processes really did.

Every scheduled time. The entries decide the times of a job in ascending order; the next decision must be of the very
next time that the calendar (cron_calendar.py, not the schedules under test) gives after the one before, so that none is
left out, doubled or invented. A record that stands for many times must say for how many and from which on, and both
must be true. What is not decided when a pause ends, or when another schedule or zone takes the place of the one before,
is decided next, by the calendar that it belongs to: as skipped, with that as the reason, and never launched.
Nothing is launched before it is due, and later than its start deadline only as the catch-up policy wants it: what takes
a turn because it is late takes one within its deadline. A job that catches up misses a time only by a plan, which is
made while a worker of it serves: what is due while none does is left undecided.

Every start. A token starts once. With NEVER one process at most is started for a scheduled time, over all workers. A
process only starts for an intent that the log had before, on the worker that it names.

Every end. A run whose worker lost its lease while it ran is no success; neither is one that did not end as one.

At once. Of a job whose overlap policy is not ALLOW, two processes never run at the same time while both count. A run
counts from its start to its end or the end of its worker's lease, whichever comes first; and one whose start no leader
knew, only until the entry that gave the attempt up. (What counts no more may be in its grace, belong to an agent that
is paused or dead, or be unheard of behind a partition until its lease ends: who waited for it might wait for ever.)
Launches that somebody triggers by hand stand beside the schedule and are not counted.

Given up. A launch that found no free slot is given up only if no worker of its job was seen to have one.

When it was well. On a cluster where all is well a launch starts within LATE_S_MAX of its time, unless it waited for an
earlier one or for a free slot. LIVE_S_MAX after the last fault no time is missed any more, and in
the end nothing is left that neither ends nor waits for anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from coordinator.api.v1 import command_pb2
from coordinator.machine.state import LaunchChanged, NodeChanged, State, Transition
from coordinator.model import (
    CatchUpPolicy,
    CronJobSpec,
    Launch,
    LaunchState,
    LaunchTrigger,
    OverlapPolicy,
    RetryPolicy,
    WallMs,
)
from tests.sim.cron_calendar import Calendar
from tests.sim.cron_jobs import SLICE_S

if TYPE_CHECKING:
    from tests.sim.cron_worker import Run, Token
    from tests.sim.cron_world import World

LATE_S_MAX = 0.1
FED_S_MAX = 10.0
"""Three heartbeats: so long a worker may have a free slot that the leader does not know of."""
LIVE_S_MAX = 30.0
"""After the last fault: workers find the leader and are admitted, and what waited for them goes on."""
COMMIT_MS_MAX = 2_000
"""So long a decision may be on its way into the log."""
STANDS_FOR = re.compile(r"this record stands for (more than )?(\d+) times from (\S+) on")

Key = tuple[str, int]


@lru_cache(maxsize=512)
def _calendar(expression: str, zone: str, from_ms: int, until_ms: int) -> Calendar:
    return Calendar(expression, zone, from_ms, until_ms)


@dataclass(slots=True)
class Past:
    """What was to be launched up to `until_ms`, and may not be any more."""

    until_ms: int
    calendar: Calendar
    reason: str


@dataclass(slots=True)
class Book:
    """What the log has decided of one job."""

    spec: CronJobSpec
    calendar: Calendar
    decided_until_ms: int
    is_paused: bool = False
    past: list[Past] = field(default_factory=list)
    launched: list[int] = field(default_factory=list)
    recorded: dict[int, LaunchState] = field(default_factory=dict)

    def close(self, time_ms: int, reason: str) -> None:
        """Nothing up to here is launched any more."""
        self.past.append(Past(time_ms, self.calendar, reason))

    def undecided(self, until_ms: int) -> list[tuple[int, str]]:
        """Times after what is decided and up to this one, ascending, each with why it must not be launched, if so."""
        found: list[tuple[int, str]] = []
        after_ms = self.decided_until_ms
        for past in self.past:
            times = past.calendar.between(after_ms, min(past.until_ms, until_ms))
            found += [(time_ms, past.reason) for time_ms in times]
            after_ms = max(after_ms, past.until_ms)
        return found + [(time_ms, "") for time_ms in self.calendar.between(after_ms, until_ms)]

    def next_undecided(self) -> int | None:
        """The first time after what is decided."""
        closed_ms = max((past.until_ms for past in self.past), default=0)
        first = next(iter(self.undecided(closed_ms)), None)
        return first[0] if first is not None else self.calendar.next_after(max(self.decided_until_ms, closed_ms))


class Oracle:
    """Sees every entry and every start."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._from_ms = world.true_ms - 2 * 3_600_000
        self._until_ms = world.true_ms + round(SLICE_S * 1_000) + 4 * 3_600_000
        self.books: dict[str, Book] = {}
        self.launches: dict[Key, Launch] = {}
        """The latest of every launch, also of those that the state has forgotten."""
        self.worker_of: dict[Token, str] = {}
        """Every attempt that the log made."""
        self.given_up_at: dict[Token, float] = {}
        self.runs: dict[Token, Run] = {}
        self._starts: dict[Key, int] = {}
        self._waited: set[Key] = set()
        self._ceased_at: dict[str, float] = {}
        """When each worker was last seen to serve, of those that do not any more."""
        self._is_all_paused = False
        self.late_s: list[float] = []
        self.live_from_ms = 0
        """From here on every time must be launched; 0 before the last fault is over."""

    # Entries

    def take(self, command: command_pb2.Command, before: State, transition: Transition, wall: WallMs) -> None:
        """An entry of the log."""
        operation = command.WhichOneof("operation") or ""
        if not transition.result.HasField("applied"):
            self._world.counts[f"refused {operation}"] += 1
            return
        self._world.counts[operation] += 1
        state = transition.state
        match operation:
            case "apply_job":
                self._on_job(state, command.apply_job.spec.id)
            case "delete_job":
                self._on_deleted(command.delete_job.job_id)
            case "set_job_paused":
                self._on_paused(command.set_job_paused.job_id, command.set_job_paused.paused, state.time_ms)
            case "change_settings":
                self._on_settings(command.change_settings.settings.cron_paused, state.time_ms)
            case "commit_launch":
                self._on_commit(command.commit_launch, wall)
            case "record_no_launch":
                self._on_record(command.record_no_launch, before)
            case "finish_launch":
                self._on_finish(command.finish_launch)
            case _:
                pass
        for change in transition.changes:
            if isinstance(change, LaunchChanged):
                self._on_launch(change)
            elif isinstance(change, NodeChanged) and change.before is not None and change.before.is_serving:
                self._ceased_at[change.before.id] = self._world.time.now

    def _on_job(self, state: State, job_id: str) -> None:
        spec, book = state.jobs[job_id].spec, self.books.get(job_id)
        if book is None:
            self.books[job_id] = Book(spec, self._calendar_of(spec), state.time_ms)
        elif book.spec != spec:
            if (book.spec.schedule, book.spec.time_zone) != (spec.schedule, spec.time_zone):
                why = "all jobs were paused" if self._is_all_paused else "the schedule was changed"
                book.close(state.time_ms, "the job was paused" if book.is_paused else why)
            book.spec, book.calendar = spec, self._calendar_of(spec)

    def _on_deleted(self, job_id: str) -> None:
        """What runs of it goes on to its end, and belongs to nothing any more."""
        del self.books[job_id]
        for token, run in self.runs.items():
            if token[0] == job_id and run.ended_at is None:
                self.given_up_at[token] = self._world.time.now

    def _calendar_of(self, spec: CronJobSpec) -> Calendar:
        return _calendar(spec.schedule, spec.time_zone, self._from_ms, self._until_ms)

    def _on_paused(self, job_id: str, is_paused: bool, time_ms: int) -> None:
        book = self.books[job_id]
        if book.is_paused and not is_paused:
            book.close(time_ms, "the job was paused")
        book.is_paused = is_paused

    def _on_settings(self, is_paused: bool, time_ms: int) -> None:
        if self._is_all_paused and not is_paused:
            for book in self.books.values():
                if not book.is_paused:
                    book.close(time_ms, "all jobs were paused")
        self._is_all_paused = is_paused

    def _on_commit(self, commit: command_pb2.CommitLaunch, wall: WallMs) -> None:
        if commit.trigger == LaunchTrigger.MANUAL.value:
            return
        book = self.books[commit.job_id]
        scheduled_at_ms = commit.scheduled_at_unix_ms
        is_paused = book.is_paused or self._is_all_paused
        assert not is_paused, f"{commit.job_id} is launched and paused"
        why_not = self._decide_next(commit.job_id, book, scheduled_at_ms)
        assert not why_not, f"{_name(commit)} is launched, and {why_not}"
        book.launched.append(scheduled_at_ms)
        due_ms = commit.due_unix_ms or scheduled_at_ms
        is_within_jitter = 0 <= due_ms - scheduled_at_ms <= round(book.spec.jitter_s * 1_000)
        assert is_within_jitter, f"{_name(commit)} is due {due_ms - scheduled_at_ms} ms later"
        assert wall >= due_ms, f"{_name(commit)} is committed {due_ms - wall} ms before its time"
        deadline_ms = due_ms + round(book.spec.start_deadline_s * 1_000)
        if commit.not_before_unix_ms > deadline_ms:
            assert book.spec.catch_up is not CatchUpPolicy.NONE, f"{_name(commit)} is caught up with policy none"
            starved = "no worker could run it" in commit.reason
            self._world.counts["caught up with once a worker served" if starved else "caught up"] += 1
        elif commit.not_before_unix_ms:
            assert wall <= deadline_ms + COMMIT_MS_MAX, f"{_name(commit)} was old when it was given a turn in time"
            self._world.counts["late, in turn"] += 1
        else:
            late_s = (wall - due_ms) / 1_000
            assert late_s <= book.spec.start_deadline_s, f"{_name(commit)} is committed {late_s:.3f} s late"

    def _decide_next(self, job_id: str, book: Book, scheduled_at_ms: int) -> str:
        """Why it must not be launched; empty when it may be."""
        expected, times = book.next_undecided(), book.undecided(scheduled_at_ms)
        assert scheduled_at_ms == expected, (
            f"{job_id}: {show(scheduled_at_ms)} is decided, due next is {show(expected)}"
            f" after {show(book.decided_until_ms)}"
        )
        self._has_decided(book, scheduled_at_ms)
        return times[0][1]

    def _has_decided(self, book: Book, scheduled_at_ms: int) -> None:
        book.decided_until_ms = scheduled_at_ms
        book.past = [past for past in book.past if past.until_ms > scheduled_at_ms]

    def _on_record(self, record: command_pb2.RecordNoLaunch, before: State) -> None:
        book, scheduled_at_ms = self.books[record.job_id], record.scheduled_at_unix_ms
        assert record.reason, f"{_name(record)} is not launched and nobody says why"
        if record.state == LaunchState.MISSED.value and book.spec.catch_up is not CatchUpPolicy.NONE:
            self._check_planned(record, before)
        shared = STANDS_FOR.search(record.reason)
        if shared is None:
            for time_ms in (*record.earlier_unix_ms, scheduled_at_ms):
                self._check_reasons(record, {self._decide_next(record.job_id, book, time_ms)})
                book.recorded[time_ms] = LaunchState(record.state)
            return
        assert not record.earlier_unix_ms, f"{_name(record)} stands for many times, and so do others"
        undecided = book.undecided(scheduled_at_ms)
        self._check_reasons(record, {why_not for _, why_not in undecided})
        times = [time_ms for time_ms, _ in undecided]
        assert times, f"{_name(record)} stands for times that are none: {record.reason}"
        assert times[-1] == scheduled_at_ms, f"{_name(record)} is no scheduled time"
        first_ms = round(datetime.fromisoformat(shared[3]).timestamp() * 1_000)
        assert first_ms == times[0], f"{_name(record)} leaves out {show(times[0])}: {record.reason}"
        count = int(shared[2])
        is_counted = len(times) > count if shared[1] else len(times) == count
        assert is_counted, f"{_name(record)} stands for {len(times)} times: {record.reason}"
        self._world.counts["shared records"] += 1
        self._has_decided(book, scheduled_at_ms)

    def _check_planned(self, record: command_pb2.RecordNoLaunch, before: State) -> None:
        """A job that catches up loses no time for want of a worker."""
        assert "of the missed times" in record.reason, f"{_name(record)} is missed without a plan: {record.reason}"
        job, now = before.jobs[record.job_id], self._world.time.now
        served_at = [
            now if name in before.nodes and before.nodes[name].is_serving else self._ceased_at.get(name, 0.0)
            for name in (job.owner, *job.backups)
        ]
        is_lately = now - max(served_at) <= COMMIT_MS_MAX / 1_000
        assert is_lately, f"{_name(record)} is missed while no worker serves: {record.reason}"

    def _check_reasons(self, record: command_pb2.RecordNoLaunch, why_not: set[str]) -> None:
        """All the times of a record are of one kind, and it says which."""
        assert len(why_not) <= 1, f"{_name(record)} stands for times that were left out for {sorted(why_not)}"
        reason = next(iter(why_not), "")
        if reason:
            assert record.reason.startswith(reason), f"{_name(record)}: {reason}, recorded is {record.reason}"
            assert record.state == LaunchState.SKIPPED.value, f"{_name(record)} is no mishap: {record.reason}"
            self._world.counts[f"recorded: {reason}"] += 1

    def _on_finish(self, finish: command_pb2.FinishLaunch) -> None:
        if finish.state != LaunchState.SUCCEEDED.value:
            return
        run = self.runs.get((finish.job_id, finish.scheduled_at_unix_ms, finish.attempt))
        assert run is not None, f"{_name(finish)} succeeded and was never started"
        assert run.ended_at is not None, f"{_name(finish)} succeeded and still runs"
        assert run.state == finish.state, f"{_name(finish)} succeeded and did not"
        is_leased = run.lease_lost_at is None or run.lease_lost_at >= run.ended_at
        assert is_leased, f"{_name(finish)} is a success after its lease"

    def _on_launch(self, change: LaunchChanged) -> None:
        before, after = change.before, change.after
        key: Key = (after.job_id, int(after.scheduled_at_ms))
        self.launches[key] = after
        job_id, scheduled_at_ms = key
        if after.state is LaunchState.WAITING:
            self._waited.add(key)
        if after.attempt and after.worker:
            self.worker_of[(job_id, scheduled_at_ms, after.attempt)] = after.worker
        if before is not None and before.state is LaunchState.COMMITTED and after.state is not LaunchState.RUNNING:
            self.given_up_at[(job_id, scheduled_at_ms, before.attempt)] = self._world.time.now
        if after.state.has_ended and after.state not in (LaunchState.SUCCEEDED, LaunchState.FAILED):
            assert after.reason, f"{job_id} at {show(scheduled_at_ms)} ended as {after.state.name} without a reason"
        if before is not None and after.state is LaunchState.MISSED and "has no free slot" in after.reason:
            self._check_starved(job_id, scheduled_at_ms)
        if after.state.has_ended:
            self._world.counts[f"ended {after.state.name}"] += 1
        book = self.books.get(job_id)
        is_next = before is not None and before.attempt != after.attempt
        if book is not None and is_next and after.attempt > 1:
            limit = 1 if book.spec.retry is RetryPolicy.NEVER else book.spec.attempts_max
            count = after.attempts_counted
            assert count <= limit, f"{job_id} at {show(scheduled_at_ms)}: attempt {count} of {limit}"

    def _check_starved(self, job_id: str, scheduled_at_ms: int) -> None:
        world, job = self._world, self._world.state.jobs[job_id]
        for name in (job.owner, *job.backups):
            process = world.workers[name].process if name in world.workers else None
            is_there = process is not None and process.is_well() and not process.is_paused and name not in world.net.cut
            if process is None or not is_there or process.free_since is None or not world.state.nodes[name].is_serving:
                continue
            since = max(process.free_since, world.led_since)
            assert world.time.now - since <= FED_S_MAX, (
                f"{job_id} at {show(scheduled_at_ms)} is given up, and {name} had a free slot for"
                f" {world.time.now - since:.1f} s"
            )
        world.counts["starved"] += 1

    # Starts

    def started(self, run: Run) -> None:
        """A process was started."""
        token, key = run.token, run.token[:2]
        first = self.runs.get(token)
        assert first is None, f"{_run_name(run)} starts twice, on {first and first.worker} and on {run.worker}"
        worker = self.worker_of.get(token)
        assert worker is not None, f"{_run_name(run)} starts on {run.worker} and was never committed"
        assert worker == run.worker, f"{_run_name(run)} starts on {run.worker}, not on {worker}"
        launch = self.launches[key]
        is_cancelled = launch.state is LaunchState.CANCELLED and launch.attempt == token[2]
        assert not is_cancelled, f"{_run_name(run)} starts after the log has it as cancelled"
        self.runs[token] = run
        self._starts[key] = self._starts.get(key, 0) + 1
        if run.spec.retry == RetryPolicy.NEVER.value:
            assert self._starts[key] == 1, f"{_run_name(run)}: {self._starts[key]} starts with policy never"
        self._look_at_lateness(run)

    def _look_at_lateness(self, run: Run) -> None:
        world, launch = self._world, self.launches[run.token[:2]]
        if world.leader is None or launch.trigger is not LaunchTrigger.SCHEDULE:
            return
        late_s = (world.leader.master.wall - launch.due_ms) / 1_000
        was_well = world.well_since <= world.time.now - late_s - 0.5
        has_waited = run.token[:2] in self._waited
        if was_well and run.token[2] == 1 and not has_waited:
            assert late_s <= LATE_S_MAX, f"{_run_name(run)} starts {late_s:.3f} s late, and all was well"
            self.late_s.append(late_s)

    # The end

    def calm(self) -> None:
        """The last fault is over now: every clock is right, everybody is there."""
        self.live_from_ms = self._world.true_ms + round(LIVE_S_MAX * 1_000)

    def check_end(self) -> None:
        """After the quiet time at the end."""
        world = self._world
        assert world.leader is not None, "there is no leader"
        now_ms = world.leader.master.wall
        for job_id, book in self.books.items():
            jitter_ms = round(book.spec.jitter_s * 1_000)
            due = book.next_undecided()
            assert due is None or due > now_ms - jitter_ms - 1_000, f"{job_id}: {show(due)} is not decided"
            missed = [
                time_ms
                for time_ms, state in book.recorded.items()
                if state is LaunchState.MISSED and time_ms > self.live_from_ms
            ]
            assert not missed, f"{job_id}: {show(missed[0])} is missed and all is well"
        for key, launch in self.launches.items():
            if not launch.state.has_ended and (key[0], WallMs(key[1])) in world.state.launches:
                self._check_open(key, launch)
        self._check_overlaps()

    def _check_open(self, key: Key, launch: Launch) -> None:
        spec, now = self.books[key[0]].spec, self._world.time.now
        run = self.runs.get((*key, launch.attempt))
        if launch.state is LaunchState.WAITING:
            others = (it for it in self.launches.values() if it.job_id == key[0] and it.key != launch.key)
            waits_for_other = any(not it.state.has_ended for it in others) or self._world.is_starved
            is_time = launch.not_before_ms < self._world.true_ms - 60_000
            assert waits_for_other or not is_time, f"{key[0]} at {show(key[1])} waits for nothing"
            return
        since = now - (run.started_at if run is not None else now - 60.0)
        is_late = run is None and self._world.true_ms - launch.committed_ms > 60_000
        is_long = run is not None and since > max(spec.timeout_s, run.spec.timeout_s) + LIVE_S_MAX
        is_stuck = is_late or is_long
        assert not is_stuck, f"{key[0]} at {show(key[1])} is {launch.state.name} for good on {launch.worker}"

    def _check_overlaps(self) -> None:
        now = self._world.time.now
        by_job: dict[str, list[tuple[float, float, Run]]] = {}
        for token, run in self.runs.items():
            launch = self.launches[token[:2]]
            if run.spec.overlap == OverlapPolicy.ALLOW.value or launch.trigger is LaunchTrigger.MANUAL:
                continue
            ends = (run.ended_at, run.lease_lost_at, self.given_up_at.get(token), now)
            end = min(moment for moment in ends if moment is not None)
            if end > run.started_at:
                by_job.setdefault(token[0], []).append((run.started_at, end, run))
        for job_id, spans in by_job.items():
            spans.sort(key=lambda span: span[0])
            for (_, first_end, first), (second_start, _, second) in pairwise(spans):
                assert second_start >= first_end, (
                    f"{job_id}: {show(first.token[1])}/{first.token[2]} on {first.worker} still runs when"
                    f" {show(second.token[1])}/{second.token[2]} starts on {second.worker}"
                )
                if first.ended_at is None or second_start < first.ended_at:
                    self._world.counts["beside a run that counts no more"] += 1


def show(time_ms: int | None) -> str:
    """A wall time for people."""
    return "never" if time_ms is None else f"{datetime.fromtimestamp(time_ms / 1_000, UTC):%m-%dT%H:%M:%S}Z"


def _run_name(run: Run) -> str:
    return f"{run.token[0]} at {show(run.token[1])}, attempt {run.token[2]},"


def _name(message: command_pb2.CommitLaunch | command_pb2.RecordNoLaunch | command_pb2.FinishLaunch) -> str:
    return f"{message.job_id} at {show(message.scheduled_at_unix_ms)}"
