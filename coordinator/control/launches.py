"""Launches that have not ended: begun, ordered, confirmed, ended, stopped, lost. A passive machine of CronControl.

The intent is in the replicated state before anything leaves this master, so a launch is *ordered* any number of times
and the worker starts a token `(job, scheduled time, attempt)` once. What the worker reports is committed before it gets
a receipt; without a receipt it reports again. The order rules:

- At most one proposal per launch is on its way; its end is followed by a fresh look at the state. The begin of a
  WAITING launch and a decision of its job are never on their way at once: both rely on what has not ended (overlap.py).
- A COMMITTED attempt is lost when its worker is not heard (and another one has a slot), or neither confirms the start
  nor names the order in a heartbeat for `order_timeout_s`: an order that waits for a disk is not lost. A RUNNING one
  only when it surely ended: the worker is DOWN or gone (its lease ended), or it no longer names the run, in a Hello (a
  worker kills, at its start, what outlived it) or a heartbeat. What follows is for retries.py to say; an attempt
  without a next one is not called lost while its worker may still tell: for that, suspicion is not enough.
- An attempt that its worker declines never starts. The next one, which counts for no policy, goes at once to a worker
  that has a free slot (worker_slots.py) and has not said that it cannot run the job; while there is none it waits.
- A WAITING launch begins once its time has come, the overlap policy lets it, and a worker serves: on the worker that
  is the first choice then and has a slot; a free slot goes to the most urgent class. Once only a worker or a slot is
  missing, it is given up after the job's start deadline: the time before, as in a queue, does not count. One that
  never started is not given up while no worker of the job serves, if the job catches up.
- A launch with a `cancel_reason` is never ordered. Its worker is told to stop it, in each of its sessions and every
  `order_timeout_s` while no start is confirmed, until it reports; so for attempts that were given up and are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coordinator.api.v1 import command_pb2, session_pb2
from coordinator.control import launch_commands
from coordinator.control.given_up import GivenUp
from coordinator.control.in_flight import Ended, InFlight
from coordinator.control.interface import Action, SendLaunch, StopLaunch, Tokens
from coordinator.control.job_workers import serving_workers, waits_without_deadline, why_none_serves
from coordinator.control.launch_reports import Report, judge, receipt
from coordinator.control.launch_watch import Watch, answer_all, step_of
from coordinator.control.open_launches import OpenLaunches, StarvedLaunches, most_urgent_first
from coordinator.control.overlap import may_begin, superseded
from coordinator.control.retries import is_last, may_follow_end, may_follow_loss, retry_at_ms, wait_left_ms
from coordinator.control.timers import Moment, Timers
from coordinator.control.worker_slots import WorkerSlots
from coordinator.machine.state import LaunchChanged, LaunchKey, State
from coordinator.model import CronJob, Launch, LaunchState, LaunchTrigger, Monotonic, NodeState, WallMs

RETRY_S = 0.5
"""How long a launch or a job waits after a proposal that failed or was refused before it is decided again."""


class LaunchTracker:
    """Follows the launches that have not ended; the owner reviews those whose time has come.

    `is_deciding` is true for a job that has a decision on its way.
    """

    def __init__(
        self, state: State, order_timeout_s: float, tokens: Tokens, at: Moment, is_deciding: Callable[[str], bool]
    ) -> None:
        self._state = state
        self._order_timeout_s = order_timeout_s
        self._is_deciding = is_deciding
        self.in_flight: InFlight[LaunchKey] = InFlight(tokens)
        """Its proposals, for the owner to sort ProposalEnded events."""
        self._watches: dict[LaunchKey, Watch] = {}
        self._open = OpenLaunches()
        self.timers: Timers[LaunchKey] = Timers()
        """When a launch is to be reviewed at the latest."""
        self._given_up = GivenUp()
        self._slots = WorkerSlots()
        self._starved = StarvedLaunches()
        for launch in state.launches.values():
            if not launch.state.has_ended:
                self._watch(at, launch)

    # What the owner asks

    def open_launches(self, job_id: str) -> list[Launch]:
        """The launches of a job that its schedule made and that have not ended, by scheduled time."""
        return self._open.scheduled(self._state, job_id)

    def is_beginning(self, job_id: str) -> bool:
        """True while something about a WAITING launch of the job is on its way."""
        return any(key in self.in_flight for key in self._open.waiting_of_job(job_id))

    def is_ending(self, job_id: str) -> bool:
        """True while a worker has said how a launch of the job ended, and that is not committed yet."""
        return any(self._watches[launch.key].has_end for launch in self.open_launches(job_id))

    @property
    def is_starved(self) -> bool:
        """True while a WAITING launch only lacks a worker that takes it."""
        return bool(self._starved)

    def choose_worker(self, workers: list[str]) -> str:
        """Who gets a launch that is due now: the first with a free slot, else the first, which may decline it."""
        worker = self._slots.choose(workers) or workers[0]
        self._slots.take(worker)
        return worker

    # Events

    def on_applied(self, at: Moment, state: State, changes: Iterable[LaunchChanged]) -> list[Action]:
        """Takes in a new state with what it did to launches."""
        self._state = state
        actions: list[Action] = []
        touched: dict[LaunchKey, None] = dict.fromkeys(self.in_flight.on_state(state.index))
        for change in changes:
            before, after = change.before, change.after
            touched[after.key] = None
            if after.state.has_ended:
                continue
            if before is not None and step_of(before) != step_of(after):
                watch = self._drop(after.key)
                actions += answer_all(watch, after)
                if watch is not None:
                    watch.hand_on(at.now, self._watch(at, after), before, after)
            self._watch(at, after)
        return actions + self.review(at, touched)

    def on_ended(self, at: Moment, ended: Ended[LaunchKey]) -> list[Action]:
        """The outcome of one of its proposals is known."""
        watch = self._watches.get(ended.subject)
        actions: list[Action] = []
        if watch is not None:
            proposed, watch.proposed = watch.proposed, None
            if proposed is not None and (ended.applied or ended.refusal):
                actions.append(receipt(proposed, ended.refusal))
            elif proposed is not None and watch.report is None:
                watch.report = proposed
            if not ended.applied:
                watch.backoff_until = Monotonic(at.now + RETRY_S)
        return actions + self.review(at, (ended.subject,))

    def on_report(self, at: Moment, report: Report) -> list[Action]:
        """A worker says what became of a launch; the next `review` of it proposes that."""
        launch = self._state.launches.get(report.key)
        verdict = judge(launch, report)
        if verdict is not None or launch is None:
            return [receipt(report, verdict or "")]
        watch = self._watch(at, launch)
        if report.message.decline == session_pb2.LAUNCH_DECLINE_UNFIT:
            watch.unfit[report.node_id] = report.message.reason
        elif report.is_decline:
            self._slots.put(report.node_id, 0)
        elif report.is_final and not watch.has_end:
            self._slots.give_back(report.node_id)
        if watch.report is None or not watch.report.is_final or report.is_final:
            watch.report = report
        # Another worker shall have what this one declines, at once; what it did can wait for company.
        return self.review(at, (report.key,) if report.is_decline else ()) + self._feed(at, report.node_id)

    def on_session(self, at: Moment, session: int, hello: session_pb2.Hello) -> list[Action]:
        """A worker is here: its reports count, what it was not told it is told, what it forgot is lost."""
        node_id = hello.node.id
        known = {(m.job_id, WallMs(m.scheduled_at_unix_ms), m.attempt) for m in hello.launches}
        actions: list[Action] = []
        self._slots.forget(node_id)
        for message in hello.launches:
            actions += self.on_report(at, Report(session, node_id, message))
        keys = self._open.of_worker(node_id)
        for key in keys:
            launch, watch = self._state.launches[key], self._watches[key]
            watch.stop_sent_at = None
            if (*key, launch.attempt) in known:
                continue
            if launch.state is LaunchState.COMMITTED:
                watch.ordered_at = None
            elif key not in self.in_flight and watch.report is None:
                watch.gone = f"{node_id} came back without the run"
        for watch in self._watches.values():
            watch.unfit.pop(node_id, None)
        return actions + self.review(at, keys)

    def on_heartbeat(self, at: Moment, session: int, node_id: str, heartbeat: session_pb2.Heartbeat) -> list[Action]:
        """A worker names what it has: a run that it does not name is lost, what was given up shall stop."""
        named = dict.fromkeys(((t.job_id, WallMs(t.scheduled_at_unix_ms)), t.attempt) for t in heartbeat.launches)
        gone = []
        unseen = 0
        for key in self._open.of_worker(node_id):
            launch, watch = self._state.launches[key], self._watches[key]
            is_named = (key, launch.attempt) in named
            if is_named and launch.state is LaunchState.COMMITTED and watch.ordered_at is not None:
                watch.ordered_at = at.now
            unseen += launch.state is LaunchState.COMMITTED and not is_named and not watch.has_end
            is_gone = launch.state is LaunchState.RUNNING and not is_named
            if is_gone and key not in self.in_flight and watch.report is None:
                watch.gone = f"{node_id} no longer knows the run"
                gone.append(key)
        if heartbeat.HasField("launch_slots_free"):
            self._slots.put(node_id, heartbeat.launch_slots_free - unseen)
        stops = self._given_up.stops(self._state, session, node_id, named)
        return stops + self.review(at, gone) + self._feed(at, node_id)

    def review_all(self, at: Moment) -> list[Action]:
        """Looks at every launch again, as at the start and after a change of a worker."""
        self._slots.keep(self._state.nodes)
        return self.review(at, most_urgent_first(self._state, self._watches))

    def review_job(self, at: Moment, job_id: str) -> list[Action]:
        """Looks at a job's launches again: what the job is, or who runs it, has changed."""
        keys = self._open.of_job(job_id)
        for key in keys:
            self._watches[key].unfit.clear()
        return self.review(at, keys)

    def review_waiting(self, at: Moment, job_id: str) -> list[Action]:
        """Begins those of a job's WAITING launches that may; tells those to stop that a later one replaces."""
        keys = self._open.waiting_of_job(job_id)
        job = self._state.jobs.get(job_id)
        if not keys or job is None:
            return []
        open_launches = self.open_launches(job_id)
        replaced, why = superseded(job.spec, open_launches)
        actions: list[Action] = [self._cancel(launch, why) for launch in replaced if self._is_free(at, launch.key)]
        if self._is_deciding(job_id):
            return actions
        manual = [launch for key in keys if (launch := self._state.launches[key]).trigger is LaunchTrigger.MANUAL]
        for launch in (*may_begin(job.spec, open_launches), *manual):
            if self._is_free(at, launch.key):
                actions += self._begin(at, job, launch)
        return actions

    def forget_job(self, job_id: str) -> None:
        """The job was deleted, and its launches with it."""
        for key in self._open.of_job(job_id):
            self._drop(key)

    # Decisions

    def review(self, at: Moment, keys: Iterable[LaunchKey]) -> list[Action]:
        """Decides from the state what each of these needs now, then what the waiting ones of their jobs do."""
        actions: list[Action] = []
        job_ids: dict[str, None] = {}
        for key in keys:
            job_ids[key[0]] = None
            actions += self._review_one(at, key)
        for job_id in job_ids:
            actions += self.review_waiting(at, job_id)
        return actions

    def _review_one(self, at: Moment, key: LaunchKey) -> list[Action]:
        watch = self._watches.get(key)
        if watch is None:
            return []
        launch = self._state.launches.get(key)
        job = self._state.jobs.get(key[0])
        if launch is None or job is None or launch.state.has_ended:
            # Reports that wait are answered from the state that ended the launch.
            return answer_all(self._drop(key), launch)
        if launch.state is LaunchState.WAITING or not self._is_free(at, key):
            return []
        self.timers.set(key, None)
        if watch.report is not None:
            return self._propose_report(at, job, launch, watch, watch.report)
        reason = self._lost_reason(at.now, launch, watch, job)
        if reason is not None:
            return [self._lose(at, launch, job, reason)]
        if launch.cancel_reason:
            return self._stop(at, launch, watch)
        if launch.state is not LaunchState.COMMITTED:
            return []
        actions: list[Action] = []
        if watch.ordered_at is None:
            watch.ordered_at = at.now
            actions.append(SendLaunch(launch.worker, launch, job.spec))
        deadline = Monotonic(watch.ordered_at + self._order_timeout_s)
        self.timers.set(key, deadline if deadline > at.now else None)
        return actions

    def _stop(self, at: Moment, launch: Launch, watch: Watch) -> list[Action]:
        """Tells the worker, once while heartbeats show whether the run goes on, else again until it answers."""
        again_at = None if watch.stop_sent_at is None else Monotonic(watch.stop_sent_at + self._order_timeout_s)
        is_due = again_at is None or (launch.state is LaunchState.COMMITTED and at.now >= again_at)
        if is_due:
            watch.stop_sent_at, again_at = at.now, Monotonic(at.now + self._order_timeout_s)
        if launch.state is LaunchState.COMMITTED:
            self.timers.set(launch.key, again_at)
        return [StopLaunch(launch.worker, *launch.key, launch.attempt, launch.cancel_reason)] if is_due else []

    def _is_free(self, at: Moment, key: LaunchKey) -> bool:
        """True when something may be proposed for the launch now; sees to a later look when only time is missing."""
        if key in self.in_flight:
            return False
        watch = self._watches[key]
        if watch.backoff_until is not None and at.now < watch.backoff_until:
            self.timers.set(key, watch.backoff_until)
            return False
        watch.backoff_until = None
        return True

    def _propose_report(self, at: Moment, job: CronJob, launch: Launch, watch: Watch, report: Report) -> list[Action]:
        watch.report = None
        verdict = judge(launch, report)
        if verdict is not None:
            return [receipt(report, verdict), *self._review_one(at, launch.key)]
        watch.proposed = report
        if report.is_decline:
            next_worker = "" if launch.cancel_reason else self._next_worker(launch, job)
            self._slots.take(next_worker)
            return [self._propose(launch, launch_commands.decline(report, next_worker))]
        follows = may_follow_end(job.spec, launch, LaunchState(report.message.state))
        at_ms = retry_at_ms(job.spec, launch, at.wall) if follows else 0
        return [self._propose(launch, launch_commands.report(report, at_ms))]

    def _lost_reason(self, now: Monotonic, launch: Launch, watch: Watch, job: CronJob) -> str | None:
        """Why the current attempt counts as lost; None while it does not."""
        node = self._state.nodes.get(launch.worker)
        if node is None or node.state in (NodeState.DOWN, NodeState.LEFT):
            return f"{launch.worker} is {'gone' if node is None else node.state.name.lower()}"
        if launch.state is LaunchState.RUNNING:
            return watch.gone or None
        if launch.cancel_reason:
            return None
        if node.is_suspect:
            may_go_on = may_follow_loss(job.spec, launch) and self._next_worker(launch, job) not in ("", launch.worker)
            return f"{launch.worker} is not heard and had not confirmed the start" if may_go_on else None
        if watch.ordered_at is not None and now >= watch.ordered_at + self._order_timeout_s:
            return f"{launch.worker} did not confirm the start within {self._order_timeout_s:g} s"
        return None

    def _lose(self, at: Moment, launch: Launch, job: CronJob, reason: str) -> Action:
        next_worker, at_ms = "", 0
        if launch.cancel_reason:
            reason += f"; it had been told to stop: {launch.cancel_reason}"
        elif may_follow_loss(job.spec, launch):
            if launch.state is LaunchState.RUNNING:
                at_ms = retry_at_ms(job.spec, launch, at.wall)
            else:
                next_worker = self._next_worker(launch, job)
                self._slots.take(next_worker)
                at_ms = 0 if next_worker else at.wall
        elif is_last(job.spec, launch):
            reason += f"; attempt {launch.attempt} was the last"
        return self._propose(launch, launch_commands.lose(launch, reason, next_worker, at_ms))

    def _begin(self, at: Moment, job: CronJob, launch: Launch) -> list[Action]:
        """The next attempt of a launch that waits, unless it is too early or nobody serves."""
        key, watch = launch.key, self._watches[launch.key]
        if at.now < watch.begin_at:
            self.timers.set(key, watch.begin_at)
            return []
        worker = self._next_worker(launch, job)
        if worker:
            self._slots.take(worker)
            self._starved.discard(key)
            return [self._propose(launch, launch_commands.assign(launch, worker))]
        self._starved.add(self._state, key)
        if not launch.attempts_counted and waits_without_deadline(self._state, job):
            watch.ready_since = None
            return []
        if watch.ready_since is None:
            watch.ready_since = at.now
        deadline = Monotonic(watch.ready_since + job.spec.start_deadline_s)
        if at.now < deadline:
            self.timers.set(key, deadline)
            return []
        what = "take the next attempt" if launch.attempts_counted else "run it"
        why = f"no worker could {what}: {why_none_serves(self._state, job, watch.unfit)}"
        return [self._propose(launch, launch_commands.lose(launch, why))]

    def _feed(self, at: Moment, node_id: str) -> list[Action]:
        """Gives a worker that has free slots the launches that wait for one, the most urgent first."""
        actions: list[Action] = []
        for job_id in dict.fromkeys(key[0] for key in self._starved):
            if not self._slots.has_free(node_id):
                break
            if node_id in serving_workers(self._state, self._state.jobs[job_id]):
                actions += self.review_waiting(at, job_id)
        return actions

    def _cancel(self, launch: Launch, reason: str) -> Action:
        return self._propose(launch, launch_commands.cancel(launch, reason))

    def _next_worker(self, launch: Launch, job: CronJob) -> str:
        """The first worker of the job that can run it and has a slot, after a loss another if any; empty for none."""
        lost_on = launch.worker
        if launch.state is LaunchState.WAITING:
            last = launch.earlier_attempts[-1] if launch.earlier_attempts else None
            lost_on = last.worker if last is not None and last.state is LaunchState.LOST else ""
        fit = [it for it in serving_workers(self._state, job) if it not in self._watches[launch.key].unfit]
        return self._slots.choose(fit, lost_on)

    # Bookkeeping

    def _propose(self, launch: Launch, command: command_pb2.Command) -> Action:
        command.cause = launch.cause or f"cron/{launch.job_id}/{self._state.index}"
        return self.in_flight.propose(launch.key, command)

    def _watch(self, at: Moment, launch: Launch) -> Watch:
        self._open.put(launch)
        watch = self._watches.get(launch.key)
        if watch is None:
            wait_ms = wait_left_ms(self._state.jobs.get(launch.job_id), launch, at.wall)
            watch = self._watches[launch.key] = Watch(begin_at=Monotonic(at.now + wait_ms / 1_000))
            self.timers.set(launch.key, None)
        return watch

    def _drop(self, key: LaunchKey) -> Watch | None:
        self._open.drop(key)
        self._starved.discard(key)
        self.timers.set(key, None)
        return self._watches.pop(key, None)
