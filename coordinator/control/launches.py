"""Launches that have not ended: ordered, confirmed, ended, or lost. A passive machine; part of CronControl.

The intent is in the replicated state before anything leaves this master, so a launch is *ordered* any number of times
and the worker starts a token `(job, scheduled time, attempt)` once. What the worker reports is committed before it gets
a receipt; without a receipt it reports again. The order rules:

- At most one proposal per launch is on its way; its end is followed by a fresh look at the state.
- A new attempt is made only for ON_LOST, within `attempts_max`. A COMMITTED attempt goes on when its worker is not
  heard or did not confirm within `order_timeout_s`; a RUNNING one only when it surely ended: the worker is DOWN or gone
  (its lease ended), or it came back without knowing the run (a worker kills, at its start, what outlived it).
- A launch without a next attempt is not called lost while its worker may still tell: for that, suspicion is not enough.
- While no worker can take the next attempt, one is waited for as long as the job's start deadline, then it is LOST.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.api.v1 import command_pb2, session_pb2, types_pb2
from coordinator.control.in_flight import Ended, InFlight
from coordinator.control.interface import Action, SendLaunch, SendToNode, Tokens
from coordinator.machine.state import LaunchChanged, LaunchKey, State
from coordinator.model import CronJob, Launch, LaunchState, Monotonic, NodeState, RetryPolicy, WallMs

RETRY_S = 0.5
"""How long a launch or a job waits after a proposal that failed or was refused before it is decided again."""

_FINAL_STATES = (
    types_pb2.LAUNCH_STATE_SUCCEEDED,
    types_pb2.LAUNCH_STATE_FAILED,
    types_pb2.LAUNCH_STATE_TIMED_OUT,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker said of a launch, and on which session it waits for the receipt."""

    session: int
    node_id: str
    message: session_pb2.LaunchReport


@dataclass(slots=True)
class Watch:
    """Soft state of one launch that has not ended."""

    ordered_at: Monotonic | None = None
    """When the current attempt was first ordered in the worker's latest session; None when it was not."""
    report: Report | None = None
    """The latest report that waits to be proposed."""
    proposed: Report | None = None
    """The report whose proposal is on its way."""
    unknown_to_worker: bool = False
    """True when its worker opened a session and did not name this running launch."""
    lost_since: Monotonic | None = None
    """Since when the next attempt waits for a worker."""
    backoff_until: Monotonic | None = None
    """Nothing is proposed before: the last proposal failed or was refused."""
    wake_at: Monotonic | None = None
    """When time alone changes something; set by every review."""


class LaunchTracker:
    """Follows the launches that have not ended; `wake_at` says when it wants `advance`."""

    def __init__(self, state: State, order_timeout_s: float, tokens: Tokens) -> None:
        self._state = state
        self._order_timeout_s = order_timeout_s
        self._in_flight: InFlight[LaunchKey] = InFlight(tokens)
        self._watches: dict[LaunchKey, Watch] = {}
        self._open_of_job: dict[str, set[WallMs]] = {}
        for key, launch in state.launches.items():
            if not launch.state.has_ended:
                self._watch(key)

    def open_launch(self, job_id: str) -> Launch | None:
        """The latest launch of a job that has not ended."""
        times = self._open_of_job.get(job_id)
        return self._state.launches.get((job_id, max(times))) if times else None

    def start(self, now: Monotonic) -> list[Action]:
        """A new leader: what is committed is ordered again, what was lost meanwhile is found."""
        return self.review_all(now)

    def on_applied(self, now: Monotonic, state: State, changes: Iterable[LaunchChanged]) -> list[Action]:
        """Takes in a new state with what it did to launches."""
        self._state = state
        actions: list[Action] = []
        touched: dict[LaunchKey, None] = dict.fromkeys(self._in_flight.on_state(state.index))
        for change in changes:
            key = change.after.key
            touched[key] = None
            if change.after.state.has_ended:
                continue
            before = change.before
            if before is not None and before.attempt != change.after.attempt:
                actions += _answer_waiting(self._watches.pop(key, None), change.after)
            self._watch(key)
        for key in touched:
            actions += self.review(now, key)
        return actions

    def on_ended(self, now: Monotonic, ended: Ended[LaunchKey]) -> list[Action]:
        """The outcome of one of its proposals is known."""
        watch = self._watches.get(ended.subject)
        if watch is None:
            return []
        actions: list[Action] = []
        proposed, watch.proposed = watch.proposed, None
        if proposed is not None and (ended.applied or ended.refusal):
            actions.append(_receipt(proposed, ended.refusal))
        elif proposed is not None and watch.report is None:
            watch.report = proposed
        if not ended.applied:
            watch.backoff_until = Monotonic(now + RETRY_S)
        return actions + self.review(now, ended.subject)

    def on_report(self, now: Monotonic, report: Report) -> list[Action]:
        """A worker says what became of a launch."""
        key = (report.message.job_id, WallMs(report.message.scheduled_at_unix_ms))
        verdict = _judge(self._state.launches.get(key), report)
        if verdict is not None:
            return [_receipt(report, verdict)]
        watch = self._watch(key)
        known = watch.report
        if known is None or known.message.state not in _FINAL_STATES or report.message.state in _FINAL_STATES:
            watch.report = report
        return self.review(now, key)

    def on_session(self, now: Monotonic, session: int, hello: session_pb2.Hello) -> list[Action]:
        """A worker is here: its reports count, what it was not told is ordered, what it forgot is lost."""
        node_id = hello.node.id
        known = {(m.job_id, WallMs(m.scheduled_at_unix_ms), m.attempt) for m in hello.launches}
        actions: list[Action] = []
        for message in hello.launches:
            actions += self.on_report(now, Report(session, node_id, message))
        for key in sorted(self._watches):
            launch = self._state.launches.get(key)
            if launch is None or launch.worker != node_id or (*key, launch.attempt) in known:
                continue
            watch = self._watches[key]
            if launch.state is LaunchState.COMMITTED:
                watch.ordered_at = None
            elif key not in self._in_flight and watch.report is None:
                watch.unknown_to_worker = True
            actions += self.review(now, key)
        return actions

    def review_all(self, now: Monotonic) -> list[Action]:
        """Looks at every launch again, as after a change of a worker."""
        return [action for key in sorted(self._watches) for action in self.review(now, key)]

    def advance(self, now: Monotonic) -> list[Action]:
        """Does what has become due."""
        due = [key for key, watch in self._watches.items() if watch.wake_at is not None and watch.wake_at <= now]
        return [action for key in sorted(due) for action in self.review(now, key)]

    def wake_at(self) -> Monotonic | None:
        """When `advance` has something to do at the latest."""
        return min((watch.wake_at for watch in self._watches.values() if watch.wake_at is not None), default=None)

    def forget_job(self, job_id: str) -> None:
        """The job was deleted, and its launches with it."""
        for scheduled_at_ms in self._open_of_job.pop(job_id, set()):
            self._watches.pop((job_id, scheduled_at_ms), None)

    def in_flight(self) -> InFlight[LaunchKey]:
        """Its proposals, for the owner to sort ProposalEnded events."""
        return self._in_flight

    def review(self, now: Monotonic, key: LaunchKey) -> list[Action]:
        """Decides from the state what one launch needs now."""
        watch = self._watches.get(key)
        if watch is None:
            return []
        launch = self._state.launches.get(key)
        job = self._state.jobs.get(key[0])
        if launch is None or job is None or launch.state.has_ended:
            return self._end(key, watch, launch)
        watch.wake_at = None
        if key in self._in_flight:
            return []
        if watch.backoff_until is not None and now < watch.backoff_until:
            watch.wake_at = watch.backoff_until
            return []
        watch.backoff_until = None
        if watch.report is not None:
            report, watch.report = watch.report, None
            verdict = _judge(launch, report)
            if verdict is not None:
                return [_receipt(report, verdict), *self.review(now, key)]
            watch.proposed = report
            return [self._in_flight.propose(key, _report_command(report.message, self._cause(launch)))]
        reason = self._lost_reason(now, launch, watch, job)
        if reason is not None:
            return self._lose(now, launch, watch, job, reason)
        watch.lost_since = None
        actions: list[Action] = []
        if launch.state is LaunchState.COMMITTED:
            if watch.ordered_at is None:
                watch.ordered_at = now
                actions.append(SendLaunch(launch.worker, launch, job.spec))
            deadline = Monotonic(watch.ordered_at + self._order_timeout_s)
            watch.wake_at = deadline if deadline > now else None
        return actions

    def _lost_reason(self, now: Monotonic, launch: Launch, watch: Watch, job: CronJob) -> str | None:
        """Why the current attempt counts as lost; None while it does not."""
        node = self._state.nodes.get(launch.worker)
        if node is None or node.state in (NodeState.DOWN, NodeState.LEFT):
            return f"{launch.worker} is {'gone' if node is None else node.state.name.lower()}"
        if launch.state is LaunchState.RUNNING:
            return f"{launch.worker} came back without the run" if watch.unknown_to_worker else None
        if node.is_suspect:
            may_go_on = _may_retry(launch, job) and self._next_worker(launch, job) not in ("", launch.worker)
            return f"{launch.worker} is not heard and had not confirmed the start" if may_go_on else None
        if watch.ordered_at is not None and now >= watch.ordered_at + self._order_timeout_s:
            return f"{launch.worker} did not confirm the start within {self._order_timeout_s:g} s"
        return None

    def _lose(self, now: Monotonic, launch: Launch, watch: Watch, job: CronJob, reason: str) -> list[Action]:
        next_worker = ""
        if _may_retry(launch, job):
            next_worker = self._next_worker(launch, job)
            if watch.lost_since is None:
                watch.lost_since = now
            if not next_worker and now < watch.lost_since + job.spec.start_deadline_s:
                watch.wake_at = Monotonic(watch.lost_since + job.spec.start_deadline_s)
                return []
            if not next_worker:
                reason += "; no worker could take the next attempt"
        elif job.spec.retry is RetryPolicy.ON_LOST:
            reason += f"; attempt {launch.attempt} was the last"
        command = command_pb2.Command(
            cause=self._cause(launch),
            lose_launch=command_pb2.LoseLaunch(
                job_id=launch.job_id,
                scheduled_at_unix_ms=launch.scheduled_at_ms,
                attempt=launch.attempt,
                next_worker=next_worker,
                reason=reason,
            ),
        )
        return [self._in_flight.propose(launch.key, command)]

    def _next_worker(self, launch: Launch, job: CronJob) -> str:
        """Another serving worker of the job, else the same one while it serves, else none."""
        serving = serving_workers(self._state, job)
        others = [worker for worker in serving if worker != launch.worker]
        return (others or serving or [""])[0]

    def _end(self, key: LaunchKey, watch: Watch, launch: Launch | None) -> list[Action]:
        """Stops watching. Reports that wait are answered from the state that ended the launch."""
        del self._watches[key]
        times = self._open_of_job.get(key[0])
        if times is not None:
            times.discard(key[1])
            if not times:
                del self._open_of_job[key[0]]
        return _answer_waiting(watch, launch)

    def _watch(self, key: LaunchKey) -> Watch:
        self._open_of_job.setdefault(key[0], set()).add(key[1])
        return self._watches.setdefault(key, Watch())

    def _cause(self, launch: Launch) -> str:
        return launch.cause or f"cron/{launch.job_id}/{self._state.index}"


def serving_workers(state: State, job: CronJob) -> list[str]:
    """The job's owner and backups that can run something now, in this order."""
    candidates = [worker for worker in (job.owner, *job.backups) if worker]
    return [worker for worker in candidates if (node := state.nodes.get(worker)) is not None and node.is_serving]


def _may_retry(launch: Launch, job: CronJob) -> bool:
    return job.spec.retry is RetryPolicy.ON_LOST and launch.attempt < job.spec.attempts_max


def _judge(launch: Launch | None, report: Report) -> str | None:
    """The refusal for a report's receipt, empty when it is committed already; None when it must be proposed."""
    message = report.message
    if launch is None:
        return "this launch is not known; it was deleted, or is too old to be kept"
    if message.attempt != launch.attempt:
        return f"attempt {message.attempt} was given up; attempt {launch.attempt} counts"
    if report.node_id != launch.worker:
        return f"this attempt belongs to {launch.worker}"
    if message.state == launch.state.value:
        return ""
    if launch.state.has_ended:
        return f"the launch has ended as {launch.state.name}"
    if message.state == types_pb2.LAUNCH_STATE_RUNNING or message.state in _FINAL_STATES:
        return None
    return f"a worker cannot report the state {message.state}"


def _answer_waiting(watch: Watch | None, launch: Launch | None) -> list[Action]:
    """Receipts for the reports that an attempt leaves behind, from the state that ended it."""
    waiting = () if watch is None else (watch.proposed, watch.report)
    return [_receipt(report, _judge(launch, report) or "") for report in waiting if report is not None]


def _report_command(message: session_pb2.LaunchReport, cause: str) -> command_pb2.Command:
    if message.state == types_pb2.LAUNCH_STATE_RUNNING:
        start = command_pb2.StartLaunch(
            job_id=message.job_id,
            scheduled_at_unix_ms=message.scheduled_at_unix_ms,
            attempt=message.attempt,
            started_unix_ms=message.started_unix_ms,
        )
        return command_pb2.Command(cause=cause, start_launch=start)
    finish = command_pb2.FinishLaunch(
        job_id=message.job_id,
        scheduled_at_unix_ms=message.scheduled_at_unix_ms,
        attempt=message.attempt,
        state=message.state,
        reason=message.reason,
        started_unix_ms=message.started_unix_ms,
        finished_unix_ms=message.finished_unix_ms,
        exit_status=message.exit_status,
        output=message.output,
    )
    return command_pb2.Command(cause=cause, finish_launch=finish)


def _receipt(report: Report, refusal: str) -> SendToNode:
    message = report.message
    receipt = session_pb2.LaunchReportReceipt(
        job_id=message.job_id,
        scheduled_at_unix_ms=message.scheduled_at_unix_ms,
        attempt=message.attempt,
        state=message.state,
        refusal=refusal,
    )
    return SendToNode(report.session, session_pb2.OpenResponse(launch_report_receipt=receipt))
